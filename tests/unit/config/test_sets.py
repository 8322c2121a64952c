"""The sets of images of a config: what they inherit, and one sentence for each mistake, which names its key."""

import pytest

from sushi_research.config import SDXLTraining
from sushi_research.config.command_line import config_to_dict, config_to_yaml, load_config
from sushi_research.config.sets import sets_of
from sushi_research.errors import UserError
from sushi_research.runs.identity import compare_identity, default_name, run_identity, without_locations

REQUIRED = ("--model.base", "base", "--train.steps", "10")


def load(*words: str) -> SDXLTraining:
    return load_config(SDXLTraining, [*REQUIRED, *words], script="s", intro="1\n2\n3\n4\n5")


def test_what_a_set_does_not_give_is_that_of_the_data():
    config = load(
        "--data.sets",
        "[{path: a, flip: 0.0, masks: {source: alpha}}, {path: b, revision: null, resolutions: [512, 768], crop: box}]",
        *("--data.flip", "0.5", "--data.revision", "main", "--masks.background", "0.2", "--masks.source", "files"),
    )
    one, two = sets_of(config)
    assert (one.flip, two.flip, one.revision, two.revision) == (0.0, 0.5, "main", None)
    assert (one.resolutions, two.resolutions, one.crop, two.crop) == ((1024,), (512, 768), "center", "box")
    assert (one.masks.source, two.masks.source, one.masks.background) == ("alpha", "files", 0.2)
    assert (one.key("flip"), two.key("flip")) == ("data.sets[0].flip", "data.sets[1].flip")
    assert [each.place for each in sets_of(load("--data.path", "photos"))] == ["data"]


def test_a_config_with_sets_is_read_back(tmp_path):
    """Of path and sets, those of the later layer count."""
    config = load("--data.sets", "[{path: a, role: regularisation, captions: {prefix: x}}, {path: b, repeats: 3}]")
    (tmp_path / "config.yaml").write_text(config_to_yaml(config))
    assert load("--config", str(tmp_path / "config.yaml")) == config
    short = load("--config", str(tmp_path / "config.yaml"), "--data.path", "photos")
    assert (short.data.path, short.data.sets) == ("photos", [])
    (tmp_path / "short.yaml").write_text("data: {path: photos}")
    assert load("--config", str(tmp_path / "short.yaml"), "--data.sets", "{path: a}").data.path is None


@pytest.mark.parametrize(
    ("sets", "sentence"),
    [
        (
            "[{path: a}, {path: b, flip: 2}]",
            r"^data\.sets\[1\]\.flip is 2: must be a number .* \(on the command line\)$",
        ),
        ("[{path: a, flp: 0}]", r"^unknown key data\.sets\[0\]\.flp: did you mean data\.sets\[0\]\.flip\?"),
        ("[{flip: 1}]", r"^data\.sets\[0\]\.path is missing: add"),
        ("[3]", r"^data\.sets\[0\] must be a mapping"),
        ("[{path: a, crops: 3}]", r"^data\.sets\[0\]\.crops .* has no effect while data\.sets\[0\]\.crop is center"),
        ("[{path: a, resolutions: [100]}]", r"^data\.sets\[0\]\.resolutions\[0\] .* is 100, not a multiple"),
        ("[{path: a, weight: 1}, {path: b}]", r"^data\.sets\[0\]\.weight .* but data\.sets\[1\] has no weight"),
        ("[{path: a, weight: 1, repeats: 1}]", r"weight .* and data\.sets\[0\]\.repeats are both set"),
        ("[{path: a, role: regularisation}]", "has regularisation images only"),
        (
            "[{path: a, masks: {sorce: alpha}}]",
            r"data\.sets\[0\]\.masks\.sorce.*: did you mean data\.sets\[0\]\.masks\.s",
        ),
        ("[{path: a, masks: {unmasked: 2}}]", r"data\.sets\[0\]\.masks\.unmasked.* is 2: must be a number"),
        (
            "[{path: a, captions: {tag_separator: '|'}}]",
            r"^data\.sets\[0\]\.captions\.keep_separator .* has the data\.sets\[0\]\.captions\.tag_separator '\|' in it",
        ),
        (
            "[{path: a, captions: {tag_categories: {b.c: {file: x, dropout: 0.1}}}}]",
            r"captions\.tag_categories\.b\.c .* is .*: must be the name of a category with",
        ),
        ("[{path: a, captions: {replace: {x: null}}}]", r"data\.sets\[0\]\.captions\.replace\.x .*is null: must be"),
        (
            "[{path: a, captions: {tag_categories: {hair: {file: f}}}}]",
            r"data\.sets\[0\]\.captions\.tag_categories\.hair .*has no dropout: add it",
        ),
        ("[{path: a, captions: {trigger: ' '}}]", r"^data\.sets\[0\]\.captions\.trigger .*is blank"),
        ("[]", r"^data\.path is missing: give --data\.path"),
    ],
)
def test_a_mistake_names_its_key(sets, sentence):
    with pytest.raises(UserError, match=sentence):
        load("--data.sets", sets)


def test_an_entry_of_a_mapping_has_no_dot():
    with pytest.raises(UserError, match=r"^captions\.replace has the entry \"a\.b\" .*, and no entry can have a dot"):
        load("--data.path", "a", "--captions.replace", "{a.b: x}")


@pytest.mark.parametrize(
    ("key", "value", "other"),
    [
        ("data.crops", "8", "crop: random"),
        ("data.crop_column", "face", "crop: box"),
        ("masks.background", "0.5", "masks: {source: alpha}"),
        ("masks.folder", "m", "masks: {source: files}"),
        ("masks.column", "m", "masks: {source: column}"),
    ],
)
def test_a_setting_that_no_set_uses_is_refused(key, value, other):
    with pytest.raises(UserError, match=rf"^{key} .* has no effect while no set has the "):
        load("--data.sets", "[{path: a}, {path: b, masks: {source: none}}]", f"--{key}", value)
    load("--data.sets", f"[{{path: a}}, {{path: b, {other}}}]", f"--{key}", value)


def test_path_and_sets_are_not_given_together():
    with pytest.raises(UserError, match=r"data\.path .* and data\.sets .* are both set: keep one of them"):
        load("--data.sets", "[{path: a}]", "--data.path", "b")


def identity(sets: str, data: str = "d" * 32) -> dict:
    return run_identity(
        config_to_dict(load("--data.sets", sets)), {"data": data, "precision": "fp32", "global_batch_size": 1}
    )


def test_the_identity_has_the_settings_of_sets_and_not_their_places():
    here = identity("[{path: a}, {path: b, flip: 0.5, masks: {source: files, folder: m}}]")
    there = identity("[{path: x/a, split: test}, {path: b, flip: 0.5, masks: {source: files, folder: n}}]")
    assert compare_identity(here, there) == []
    assert [change.key for change in compare_identity(here, there | {"facts.data": "e" * 32})] == [
        "data.sets",
        "facts.data",
    ]
    other = identity("[{path: a}, {path: b, flip: 0.4, masks: {source: files, folder: m}}]")
    assert [change.key for change in compare_identity(here, other)] == ["data.sets"]
    assert without_locations(here) == without_locations(there) != without_locations(other)
    tags = "[{{path: a, captions: {{tag_categories: {{c: {{file: {}, dropout: {}}}}}}}}}]"
    assert compare_identity(identity(tags.format("x", 0.5)), identity(tags.format("y", 0.5))) == []
    assert compare_identity(identity(tags.format("x", 0.5)), identity(tags.format("x", 0.4))) != []
    # One set without settings of its own is a data.path.
    short = run_identity(
        config_to_dict(load("--data.path", "a")), {"data": "d" * 32, "precision": "fp32", "global_batch_size": 1}
    )
    assert compare_identity(short, identity("[{path: a}]")) == []
    assert default_name("sdxl", "a", here) == default_name(
        "sdxl", "a", identity("[{path: ./a/}, " + "{path: b, flip: 0.5, masks: {source: files, folder: m}}]")
    )
