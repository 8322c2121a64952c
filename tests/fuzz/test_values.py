"""Readers return a value or raise UserError, in one line, for any values in their files: `hypothesis` builds the values.

`make fuzz` damages bytes, and seldom meets a file that is sound but for one value of another kind. Here one is planted into a sound
document: lists and mappings, numbers beyond sense, text with control characters, halves of surrogate pairs, Unicode forms.
"""

import contextlib
import copy
import functools
import io
import json
import os
from pathlib import Path

import numpy
import pytest
from fake_runs import fake_run
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from sushi_research.adapters.peft_settings import KEY
from sushi_research.adapters.reading import read_adapter
from sushi_research.config import SDXLTraining
from sushi_research.config.command_line import load_config
from sushi_research.config.sets import sets_of
from sushi_research.config.yaml12 import dump_yaml, parse_yaml
from sushi_research.data.folder_files import list_files
from sushi_research.data.found import CaptionRule
from sushi_research.data.image_folder import find_in_folder
from sushi_research.data.scan import Scan
from sushi_research.data.tables import open_folder, open_saved
from sushi_research.errors import UserError, UserErrors
from sushi_research.experiments.experiment import Experiment, plan
from sushi_research.fingerprints import HashCache
from sushi_research.remembered import NOTHING_REMEMBERED
from sushi_research.reports.run_record import read_record
from sushi_research.runs.metrics_file import MetricsFile
from sushi_research.runs.run_folder import open_run_folder

ROOT = Path(__file__).parents[2]
# Numbers as JSON and YAML have them. The hexadecimal one has more digits than Python writes.
NUMBERS = [0, -1, 1.5, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 1e300, 5e-324, float("inf"), float("nan")]
TEXTS = [
    "",
    " ",
    "\0",
    "\x1b[2J",
    "\ud800",
    "\udcff",
    "e\u0301",
    "\u00e9",
    "\u304b\u3099",
    "\ufeff",
    "..",
    "/",
    "~",
    "~x",
]
TEXTS += [
    "null",
    "true",
    "1e5",
    "[",
    "{}",
    "a" * 5000,
    "\u2028",
    "\r\n",
    "=",
    "a.b",
    "%s",
    "{}",
    "*a",
    "&a",
    "!!int",
    "<<",
]
texts = st.sampled_from(TEXTS) | st.text(st.characters(exclude_categories=()), max_size=4)
scalars = st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.integers() | st.floats() | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)


def places(document, place=()):
    """The paths of all values in a document."""
    inside = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [place, *(found for key, value in inside for found in places(value, (*place, key)))]


@st.composite
def planted(draw, document):
    """The document with one value replaced, or an entry removed or added."""
    document, place = copy.deepcopy(document), draw(st.sampled_from(places(document)))
    if not place:
        return draw(values)
    *above, last = place
    parent = functools.reduce(lambda part, key: part[key], above, document)
    if draw(st.integers(0, 5)) == 0:
        del parent[last]
    elif isinstance(parent, dict) and draw(st.integers(0, 5)) == 0:
        parent[draw(texts)] = draw(values)
    else:
        parent[last] = draw(values)
    return document


def read(call, *arguments):
    """Calls a reader; a refusal must be one line, or a list of such lines."""
    try:
        return call(*arguments)
    except UserError as error:
        assert str(error).strip() and (isinstance(error, UserErrors) or str(error).isprintable())
        return None


def load(words, kind=SDXLTraining):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        return load_config(kind, words, script="x", intro="1\n2\n3\n4\n5")


FEW = settings(max_examples=60)
BASE = ["--config", "configs/demo_sdxl.yaml", "--data.path", "photos"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("values")


KEYS = "lora.rank lora.targets train.steps optimizer.lr optimizer.kwargs sample.prompts data.path run.name lora dry_run"


@FEW
@given(st.sampled_from(KEYS.split()), values)
@example("lora.rank", 10**400)
@example("optimizer.kwargs", {"\ud800": 1})
def test_values_on_the_command_line(key, value):
    found = read(load, [*BASE, f"--{key}={json.dumps(value)}"])
    assert found is None or dump_yaml(found.model_dump()).encode()


@pytest.mark.parametrize("number", [f"!!int 0x{'f' * 6000}", f"!!int 0b{'1' * 30000}", f"{{a: !!int 0x{'f' * 6000}}}"])
def test_a_number_with_more_digits_than_python_writes(number):
    with pytest.raises(UserError, match="cannot be read as int"):
        load([*BASE, f"--optimizer.kwargs={number}"])


@settings(max_examples=15)
@given(st.data())
def test_values_in_config_files(folder, data):
    for name, kind in (("configs/sdxl_lora.yaml", SDXLTraining), ("configs/experiments/rank.yaml", Experiment)):
        document = parse_yaml((ROOT / name).read_text(), name)
        (folder / "config.yaml").write_text(json.dumps(data.draw(planted(document))))
        found = read(load, ["--config", str(folder / "config.yaml"), *(BASE[2:] if kind is SDXLTraining else [])], kind)
        if found is not None and kind is Experiment:
            read(plan, found)


SETS = [
    {
        "path": "photos",
        "repeats": 2,
        "resolutions": [128, 160],
        "crop": "random",
        "crops": 3,
        "masks": {"source": "files"},
    },
    {"path": "cats", "role": "regularisation", "target": "base", "loss_weight": 0.5, "flip": 0.5},
]


@settings(max_examples=30)
@given(planted(SETS))
@example([])
@example([{}])
@example([{"path": "photos", "masks": {"background": float("nan")}}])
@example([{"path": "photos", "loss_weight": 10**400}])
def test_values_in_sets(folder, sets):
    (folder / "sets.yaml").write_text(json.dumps({"data": {"sets": sets}}))
    found = read(load, [*BASE[:2], "--config", str(folder / "sets.yaml")])
    if found is not None:
        resolved = sets_of(found)
        assert len(resolved) == max(1, len(found.data.sets)) and all(each.resolutions for each in resolved)
        assert dump_yaml(found.model_dump()).encode()


ENTRY = {"file_name": "a.png", "text": "tuna", "caption": "salmon", "tags": ["x"]}


@FEW
@given(st.lists(planted(ENTRY), min_size=1, max_size=3), texts)
def test_values_in_a_metadata_file(folder, entries, column):
    (folder / "photos").mkdir(exist_ok=True)
    for name in ("a", "e\u0301"):
        (folder / f"photos/{name}.png").touch()
    (folder / "photos/metadata.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    result = Scan(source="photos")
    found = find_in_folder(result, list_files(result, folder / "photos", {}), CaptionRule(column), NOTHING_REMEMBERED)
    assert len(found.names) == 2
    named = {problem.name for problem in result.problems}
    images = zip(found.names.to_pylist(), found.captions.to_pylist(), strict=True)
    assert all(captions or name in named for name, captions in images)


DOCUMENTS = (
    "run.json plan.json provenance.json data_report.json validation_set.json stage_timings.json metrics.jsonl".split()
)


@FEW
@given(st.sampled_from(DOCUMENTS), st.data())
def test_values_in_a_run_folder(folder, name, data):
    run = folder / "run"
    if not run.exists():
        fake_run(run)
        image = {"name": "a.png", "hash": "0" * 32, "caption": "tuna", "size": [64, 64]}
        report = {"used": ["a.png"], "problems": [{"name": "b.png", "reason": "damaged"}]}
        (run / "data_report.json").write_text(json.dumps(report))
        (run / "validation_set.json").write_text(json.dumps({"hash": "x", "noise_samples": 4, "images": [image]}))
        (run / "stage_timings.json").write_text(json.dumps({"caching": 1.5}))
    before = (run / name).read_text()
    first, _, rest = before.partition("\n") if name.endswith("l") else (before, "", "")
    (run / name).write_text(f"{json.dumps(data.draw(planted(json.loads(first))))}\n{rest}")
    try:
        read(lambda: read_record(run))
        read(lambda: open_run_folder(folder, "run", writer=False).record())
        read(lambda: MetricsFile(run / "metrics.jsonl").read())
    finally:
        (run / name).write_text(before)


SETTINGS = {"unet.r": 4, "unet.lora_alpha": 8.0, "unet.use_rslora": False, "unet.rank_pattern": {"x": 4}}
SETTINGS |= {"unet.alpha_pattern": {"to_q": 4}, "unet.lora_bias": False, "unet.init_lora_weights": True}


@FEW
@given(planted(SETTINGS))
@example(SETTINGS | {"unet.r": 10**400})
@example(SETTINGS | {"unet.rank_pattern": 1})
@example(SETTINGS | {"unet.rank_pattern": {"a{99999999999}": 4}})
@example(SETTINGS | {"unet.rank_pattern": {"(" * 149 + ")" * 149: 4}})
def test_values_in_the_metadata_of_an_adapter(folder, document):
    layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    pair = {f"{layer}.lora_A.weight": numpy.ones((4, 8)), f"{layer}.lora_B.weight": numpy.ones((8, 4))}
    save_file(pair, folder / "adapter.safetensors", metadata={KEY: json.dumps(document)})
    read(read_adapter, folder / "adapter.safetensors")


@FEW
@given(planted({"version": 0, "files": {"/a": {"state": [1, 2, 3, 4], "facts": {"hash": "0" * 32}}}}))
def test_values_in_the_hash_cache(folder, document):
    (folder / "files.json").write_text(json.dumps(document))
    HashCache(folder / "files.json").save()


CARD = {
    "license": "mit",
    "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "train.*"}]}],
}
CARD |= {
    "dataset_info": {
        "features": [{"name": "text", "dtype": "string"}],
        "splits": [{"name": "train", "num_examples": 1}],
    }
}


@settings(max_examples=25)
@given(planted(CARD))
def test_values_in_the_card_of_a_dataset(folder, document):
    import datasets

    table = folder / "table"
    if not table.exists():
        table.mkdir()
        datasets.Dataset.from_dict({"text": ["tuna"]}).to_parquet(table / "train.parquet")
    (table / "README.md").write_text(f"---\n{json.dumps(document)}\n---\n# Sushi\n")
    read(open_folder, table, "train", HashCache(Path(os.devnull)))


@settings(max_examples=25)
@given(st.sampled_from(["state.json", "dataset_info.json"]), st.data())
def test_values_in_a_saved_dataset(folder, name, data):
    import datasets

    saved = folder / "saved"
    if not saved.exists():
        datasets.Dataset.from_dict({"text": ["tuna"]}).save_to_disk(saved)
    before = (saved / name).read_text()
    (saved / name).write_text(json.dumps(data.draw(planted(json.loads(before)))))
    try:
        read(open_saved, saved, "train", HashCache(Path(os.devnull)))
    finally:
        (saved / name).write_text(before)
