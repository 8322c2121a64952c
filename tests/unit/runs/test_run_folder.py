"""Which run a command names, whether it may go on, what it does, and files that are whole or not there."""

import copy
import errno
import fnmatch
import json
import os
from types import SimpleNamespace

import pytest

from sushi_research.config import SD15Training, SDXLTraining
from sushi_research.config.command_line import config_to_dict
from sushi_research.errors import UserError
from sushi_research.files import write_atomic, write_json
from sushi_research.runs.decision import decide
from sushi_research.runs.identity import (
    ABSENT,
    MAY_CHANGE,
    SAME_CONTENT,
    ChangedSetting,
    compare_identity,
    default_name,
    depends_on_length,
    length_setting,
    require_same_run,
    run_identity,
)
from sushi_research.runs.run_folder import open_run_folder

FACTS = {
    "global_batch_size": 4,
    "precision": "bf16",
    "data": "d" * 32,
    "base_model": {"unet": "a" * 32, "vae": "b" * 32},
    "random_scheme": 1,
}


def config(config_class=SDXLTraining, **sections):
    """The resolved config of a training on ./photos, with values laid over its sections."""
    sections = {"model": {"base": "base"}, "data": {"path": "photos"}, "train": {"steps": 100}} | sections
    return config_to_dict(config_class(**sections))


def identity(facts=FACTS, **sections):
    return run_identity(config(**sections), facts)


def flat_keys(nested, prefix=""):
    for key, value in nested.items():
        if isinstance(value, dict) and value:
            yield from flat_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


# --- identity ---


@pytest.mark.parametrize("config_class", [SD15Training, SDXLTraining])
def test_the_tables_name_settings_that_exist(config_class):
    keys = set(flat_keys(config(config_class))) | {"captions.tag_categories.style.file"}  # an entry of a mapping
    assert SAME_CONTENT.keys() <= keys
    for pattern in MAY_CHANGE:
        assert fnmatch.filter(keys, pattern), pattern


def test_the_identity_of_sdxl_is_this_list():
    """A setting that is added must be decided on: it is part of the identity unless a table says otherwise."""
    assert sorted(key for key in identity() if not key.startswith("facts.")) == [
        "captions.allow_empty",
        "captions.alternatives",
        "captions.chunk_layout",
        "captions.chunks",
        "captions.dropout",
        "captions.dropout_to",
        "captions.fix_text",
        "captions.keep_separator",
        "captions.keep_tags",
        "captions.lines",
        "captions.prefix",
        "captions.shuffle",
        "captions.source",
        "captions.suffix",
        "captions.tag_dropout",
        "captions.tag_separator",
        "captions.trigger",
        "captions.underscores_to_spaces",
        "data.bucket_max_side",
        "data.bucket_min_side",
        "data.bucket_step",
        "data.caption_column",
        "data.crop",
        "data.crop_column",
        "data.crops",
        "data.flip",
        "data.image_column",
        "data.path",
        "data.resolution",
        "data.resolutions",
        "data.revision",
        "data.sets",
        "data.split",
        "data.time_ids",
        "data.upscale",
        "ema.decay",
        "ema.evaluate",
        "ema.post_hoc",
        "evaluation.held_out",
        "evaluation.prior_path",
        "lora.alpha",
        "lora.conv_alpha",
        "lora.conv_rank",
        "lora.dropout",
        "lora.init",
        "lora.kind",
        "lora.lokr_factor",
        "lora.max_norm",
        "lora.module_dropout",
        "lora.overrides",
        "lora.rank",
        "lora.rank_dropout",
        "lora.rank_stabilized",
        "lora.start_from",
        "lora.targets",
        "loss.huber_c",
        "loss.huber_schedule",
        "loss.input_perturbation",
        "loss.multires_discount",
        "loss.multires_iterations",
        "loss.noise_offset",
        "loss.noise_offset_random",
        "loss.p2_gamma",
        "loss.p2_k",
        "loss.snr_gamma",
        "loss.type",
        "loss.weighting",
        "masks.background",
        "masks.column",
        "masks.folder",
        "masks.invert",
        "masks.source",
        "masks.unmasked",
        "model.base",
        "model.base_storage",
        "model.revision",
        "model.text_encoder_1_layer",
        "model.text_encoders",
        "model.tokenizers",
        "model.vae",
        "model.vae_revision",
        "model.variant",
        "optimizer.lora_plus_ratio",
        "optimizer.lr",
        "optimizer.name",
        "schedule.cycles",
        "schedule.decay",
        "schedule.name",
        "schedule.power",
        "schedule.span",
        "schedule.timescale",
        "schedule.warmup",
        "text_encoders.alpha",
        "text_encoders.lr",
        "text_encoders.new_tokens",
        "text_encoders.new_tokens_lr",
        "text_encoders.rank",
        "text_encoders.targets",
        "text_encoders.train",
        "text_encoders.until",
        "timesteps.distribution",
        "timesteps.max",
        "timesteps.mean",
        "timesteps.min",
        "timesteps.std",
        "train.max_grad_norm",
        "train.seed",
    ]


def test_an_identity_survives_json():
    current = identity(lora={"rank": 8, "alpha": 0.1}, optimizer={"kwargs": {"eps": 1e-8}})
    assert json.loads(json.dumps(current)) == current
    assert current["optimizer.kwargs.eps"] == 1e-8 and current["facts.base_model.unet"] == "a" * 32


def test_a_fact_that_nobody_knows_is_a_mistake():
    with pytest.raises(AssertionError, match="dataset"):
        identity({"dataset": "d"})


def test_what_may_change_is_no_difference():
    changed = identity(
        train={"epochs": 3, "batch_size": 4, "accumulation": 2, "precision": "bf16", "gradient_checkpointing": True},
        checkpoint={"every": 7, "keep": 5},
        sample={"prompts": ["a cat"]},
        tracking={"wandb": "offline", "tags": ["x"]},
        run={"name": "other"},
        cache={"folder": "/elsewhere"},
        dry_run=True,
    )
    assert compare_identity(identity(), changed) == []


def test_every_difference_is_found():
    stored = identity(optimizer={"kwargs": {"eps": 1e-8}})
    current = identity(FACTS | {"global_batch_size": 8}, lora={"rank": 32}, train={"steps": 100, "seed": 1})
    assert compare_identity(stored, current) == [
        ChangedSetting("facts.global_batch_size", 4, 8),
        ChangedSetting("lora.rank", 16, 32),
        ChangedSetting("optimizer.kwargs.eps", 1e-8, ABSENT),
        ChangedSetting("train.seed", 0, 1),
    ]


def test_a_place_may_change_while_its_content_does_not():
    moved = {"model": {"base": "/mnt/base", "revision": "v2"}, "data": {"path": "/mnt/photos"}}
    assert compare_identity(identity(), identity(**moved)) == []
    other_vae = copy.deepcopy(FACTS)
    other_vae["base_model"]["vae"] = "c" * 32
    assert [difference.key for difference in compare_identity(identity(), identity(other_vae, **moved))] == [
        "facts.base_model.vae",
        "model.base",
        "model.revision",
    ]
    assert [
        difference.key for difference in compare_identity(identity(), identity(FACTS | {"data": "e"}, **moved))
    ] == [
        "data.path",
        "facts.data",
    ]


def test_without_the_facts_a_place_decides():
    stored, current = ({"data.path": path} for path in ("photos", "elsewhere"))
    assert compare_identity(stored, current) == [ChangedSetting("data.path", "photos", "elsewhere")]


def test_the_refusal_names_every_key_and_both_values():
    with pytest.raises(UserError) as caught:
        require_same_run("trial", identity(), identity(FACTS | {"global_batch_size": 8}, lora={"rank": 32}))
    assert str(caught.value) == (
        "the run trial was started with other settings: global_batch_size (train.batch_size x train.accumulation x "
        "processes) was 4, is now 8; lora.rank was 16, is now 32; give another --run.name, or restore the earlier "
        "settings to continue"
    )
    require_same_run("trial", identity(), identity())


SCHEDULES = [
    ({"name": "constant"}, False),
    ({"name": "constant_with_warmup", "warmup": 10}, False),
    ({"name": "constant_with_warmup", "warmup": "1 epoch"}, False),
    ({"name": "constant_with_warmup", "warmup": 0.1}, True),
    ({"name": "inverse_sqrt", "warmup": 10, "timescale": 100}, False),
    ({"name": "inverse_sqrt", "warmup": 0.1}, True),
    ({"name": "wsd"}, True),
    ({"name": "linear"}, True),
    ({"name": "cosine"}, True),
]


def test_which_schedules_depend_on_the_length():
    for schedule, depends in SCHEDULES:
        assert depends_on_length(identity(schedule=schedule)) is depends, schedule
    for until, setting in (("1 epoch", None), (5, None), (0.5, "text_encoders.until 0.5")):
        for trained in ({"train": True}, {"new_tokens": [{"token": "<cat>"}]}):
            assert length_setting(identity(text_encoders={**trained, "until": until})) == setting


# --- the name ---


def name(path="photos", facts=FACTS, **sections):
    return default_name("sdxl", path, identity(facts, data={"path": path}, **sections))


def test_the_same_command_gives_the_same_name():
    assert name() == "sdxl-photos-" + name()[-8:] and set(name()[-8:]) <= set("0123456789abcdef")
    assert name("photos/")[-8:] == name("./photos")[-8:] == name()[-8:]
    assert name(train={"steps": 999, "batch_size": 2}, tracking={"wandb": "off"}) == name()


def test_what_is_found_in_the_files_does_not_change_the_name():
    settings_only = {fact: FACTS[fact] for fact in ("global_batch_size", "precision")}
    assert name(facts=settings_only) == name()


def test_another_experiment_gets_another_name():
    names = {
        name(),
        name(lora={"rank": 32}),
        name(facts=FACTS | {"global_batch_size": 8}),
        name(facts=FACTS | {"precision": "fp32"}),
        name(model={"base": "another"}),
        name("elsewhere/photos"),
    }
    assert len(names) == 6


SLUGS = [
    ("My Photos (2)/", "my-photos-2"),
    ("user/naruto-blip", "naruto-blip"),
    ("/data/\u5199\u771f", "data"),
    ("x" * 99, "x" * 40),
]


def test_the_folder_in_the_name():
    for path, slug in SLUGS:
        assert name(path).rpartition("-")[0] == f"sdxl-{slug}"
        config(run={"name": name(path)})  # is accepted as --run.name


# --- what running again does ---


def record(finished_at=None, steps=100, **sections):
    return {"identity": identity(**sections), "steps": steps, "finished_at": finished_at}


def checkpoint(step, **sections):
    return SimpleNamespace(step=step, facts={"identity": identity(**sections)})


def test_a_new_run_starts():
    decision = decide("trial", None, None, identity(), 100)
    assert decision == ("start", "starting the run trial", [])


def test_a_run_without_a_checkpoint_starts_again_whatever_it_was():
    decision = decide("trial", record(lora={"rank": 64}), None, identity(), 100)
    assert decision.action == "start" and "afresh" in decision.sentence


def test_a_run_continues():
    decision = decide("trial", record(), checkpoint(40), identity(), 100)
    assert decision == ("continue", "continuing the run trial from step 40 of 100", [])


def test_a_run_that_was_killed_after_its_last_step_continues_to_write_its_adapter():
    assert decide("trial", record(), checkpoint(100), identity(), 100).action == "continue"


@pytest.mark.parametrize("where", ["record", "checkpoint"])
def test_another_identity_is_refused(where):
    other = {"lora": {"rank": 64}}
    stored = record(**other) if where == "record" else record()
    found = checkpoint(40, **other) if where == "checkpoint" else checkpoint(40)
    with pytest.raises(UserError, match="lora.rank was 64, is now 16"):
        decide("trial", stored, found, identity(), 100)


def test_a_finished_run_has_nothing_to_do():
    for steps, found in ((50, None), (50, checkpoint(100)), (100, None), (100, checkpoint(100))):
        decision = decide("trial", record(finished_at=100), found, identity(), steps)
        assert decision.action == "nothing", (steps, found)
        assert "finished, at step 100" in decision.sentence and "another --run.name" in decision.sentence


def test_a_finished_run_of_another_identity_is_refused():
    with pytest.raises(UserError, match="lora.rank was 16, is now 8"):
        decide("trial", record(finished_at=100), None, identity(lora={"rank": 8}), 100)


def test_a_finished_run_goes_on_when_it_grows():
    decision = decide("trial", record(finished_at=100), checkpoint(100), identity(), 150)
    assert decision == ("continue", "continuing the run trial from step 100 of 150", [])


def test_a_finished_run_cannot_grow_without_its_checkpoints():
    with pytest.raises(UserError, match="finished at step 100 and its checkpoints are gone"):
        decide("trial", record(finished_at=100), None, identity(), 150)


def test_a_run_cannot_end_before_its_checkpoint():
    with pytest.raises(UserError, match="is at step 80, past its end at step 50"):
        decide("trial", record(), checkpoint(80), identity(), 50)


def test_a_record_that_is_gone_is_made_again_from_a_checkpoint_of_the_same_settings():
    action, _, [warning] = decide("trial", None, checkpoint(80), identity(), 100)
    assert action == "continue" and "no run.json: it is made again from the checkpoint" in warning
    cosine = {"schedule": {"name": "cosine"}}
    [warning] = decide("trial", None, checkpoint(80, **cosine), identity(**cosine), 100).warnings
    assert "up to step 80 it followed that length, if it was not 100 steps" in warning
    with pytest.raises(UserError, match="lora.rank was 16, is now 8"):
        decide("trial", None, checkpoint(80), identity(lora={"rank": 8}), 100)
    with pytest.raises(UserError, match="adapter file but neither a run.json nor a checkpoint"):
        decide("trial", None, None, identity(), 100, has_adapter=True)


def test_another_length_under_a_schedule_that_depends_on_it_is_reported():
    cosine = {"schedule": {"name": "cosine"}}
    decision = decide("trial", record(**cosine), checkpoint(40, **cosine), identity(**cosine), 200)
    (warning,) = decision.warnings
    assert "from 100 to 200 steps" in warning and "cosine" in warning and "step 40" in warning
    assert decide("trial", record(**cosine), checkpoint(40, **cosine), identity(**cosine), 100).warnings == []


# --- the folder ---


def test_the_record_of_a_run_through_its_life(tmp_path):
    with open_run_folder(tmp_path / "runs", "trial") as run:
        assert run.record() is None
        started = run.mark_started(identity(), 100)
        assert started == run.record()
        assert (started["steps"], started["finished_at"], started["identity"]) == (100, None, identity())
        assert run.mark_finished(100) == started | {"finished_at": 100}
        now = identity(lora={"rank": 8})
        assert run.mark_continued(150, now) == started | {"steps": 150, "identity": now} == run.record()
        assert run.mark_started(identity(), 100)["wandb_id"] != started["wandb_id"]
    assert json.loads((tmp_path / "runs" / "trial" / "run.json").read_text())["steps"] == 100


def test_a_record_that_cannot_be_read_is_reported(tmp_path):
    with open_run_folder(tmp_path, "trial") as run:
        run.run.write_text("{")
        with pytest.raises(UserError, match="run.json is not valid JSON"):
            run.record()
        whole = {"steps": 4, "finished_at": None, "wandb_id": "w", "identity": {}}
        for content, words in [
            (
                whole | {"format": 1},
                "has format 1, this version reads format 2: use the version that wrote it, or give",
            ),
            (whole | {"format": 3}, "has format 3, this version reads format 2"),
            (whole, "has no format, this version reads format 2"),
            (whole | {"format": "2"}, 'has format "2", this version reads format 2'),
            (whole | {"format": True}, "has format true"),
            (whole | {"format": [2, {"a": 1}]}, r'has format \[2, {"a": 1}\]'),
            ([1], "does not hold what a run writes .*: restore it, or remove it so that"),
            (None, "does not hold what a run writes"),
            (whole | {"format": 2, "identity": None}, "does not hold what a run writes"),
            (whole | {"format": 2, "finished_at": "4"}, "does not hold what a run writes"),
            ({"format": 2}, "does not hold what a run writes"),
        ]:
            run.run.write_text(json.dumps(content))
            with pytest.raises(UserError, match=words) as caught:
                run.record()
            assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.name == "nt", reason="POSIX locks")
def test_a_run_is_open_once_at_a_time(tmp_path):
    first = open_run_folder(tmp_path, "trial")
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} on "):
        open_run_folder(tmp_path, "trial")
    first.close()
    open_run_folder(tmp_path, "trial").close()


def test_a_file_system_without_locks_is_reported(tmp_path, monkeypatch, caplog):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    open_run_folder(tmp_path, "trial").close()
    assert "trial cannot be locked: do not launch this run twice" in caplog.text


def test_a_folder_that_cannot_be_made_is_reported(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError, match="cannot make the run folder .*runs.trial"):
        open_run_folder(tmp_path / "runs", "trial")


# --- files ---


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"b": 1.5, "a": ["\u5199\u771f.png", None]})
    assert json.loads(path.read_bytes()) == {"b": 1.5, "a": ["\u5199\u771f.png", None]}
    assert "\u5199\u771f" in path.read_text(encoding="utf-8") and path.read_text(encoding="utf-8").index("b") < 10
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_a_file_name_that_is_not_unicode_survives(tmp_path):
    strange = os.fsdecode(b"caf\xe9.png")
    write_json(tmp_path / "a.json", [strange])
    assert json.loads((tmp_path / "a.json").read_bytes()) == [strange]


def test_what_is_not_json_is_refused(tmp_path):
    write_json(tmp_path / "a.json", 1)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError):
            write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_bytes()) == 1


@pytest.mark.parametrize("where", ["os.fsync", "os.replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, where):
    path = tmp_path / "a.json"
    write_atomic(path, b"old")

    def refuse(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(where, refuse)
    with pytest.raises(UserError, match="cannot write .*a.json: No space left on device; free some space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
