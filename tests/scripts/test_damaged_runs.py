"""Any file of a run that is damaged is named. What can be made again is; else one sentence says what to do, and doing it works."""

import json
import shutil

import pyarrow
import pyarrow.parquet
import pytest
import torch

from sushi_research.errors import UserError
from sushi_research.runs.checkpoint import latest_checkpoint, save_checkpoint
from sushi_research.training import resume
from sushi_research.training.loader import Loader

ONE = pytest.mark.parametrize("architecture", ["sd15"])
SETTINGS = {
    "train.steps": 2,
    "schedule.name": "constant",
    "schedule.warmup": 0,
    "evaluation.held_out": 0.25,
    "evaluation.noise_samples": 4,
    "evaluation.drift_captions": ["a plain wall"],
    "sample.enabled": True,
    "sample.prompts": ["a cat"],
    "sample.steps": 1,
    "checkpoint.keep": 2,
}
LONGER = {**SETTINGS, "train.steps": 3}
REFUSED, NAMED, AGAIN = "refused", "named", "made again"


def changed(**changes):
    """A file with JSON in which these keys have other values, or, with the value `...`, are gone."""

    def write(path):
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return write


def column(name, values):
    """A results file with another column in the place of one."""

    def write(path):
        table = pyarrow.parquet.read_table(path)
        place = table.column_names.index(name)
        table = table.set_column(place, name, pyarrow.array((values * table.num_rows)[: table.num_rows]))
        pyarrow.parquet.write_table(table, path)

    return write


def lines(change):
    """metrics.jsonl with its list of lines changed."""

    def write(path):
        found = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in change(found)))

    return write


def text(content):
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


def folder(path):
    path.unlink()
    path.mkdir()


def broken_link(path):
    path.unlink()
    path.symlink_to("/nowhere/at all")


def gone(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


EMPTY, NO_JSON, LIST, DEEP = text(""), text("{ no json"), text("[1]\n"), text("[" * 100_000)
SHAPES = (EMPTY, NO_JSON, LIST, DEEP, text("null\n"), text("{}\n"), text(b"\xff\xfe\0"))
PICTURE = "samples/step-00000002/00-seed0.png"
# (file, what happens to it, outcome for the finished run, outcome for the run that goes on)
TABLE = [
    *(("run.json", harm, REFUSED, REFUSED) for harm in SHAPES),
    *(
        ("run.json", changed(**{key: value}), REFUSED, REFUSED)
        for key, values in {
            "steps": (..., None, "2", 2.0, True, -1, 10**400),
            "finished_at": (..., "2", True, -1),
            "wandb_id": (..., None, 7, ""),
            "identity": (None, [], 3, {"train.seed": []}),
            "format": (1, None),
        }.items()
        for value in values
    ),
    *(("provenance.json", harm, NAMED, REFUSED) for harm in (EMPTY, NO_JSON, DEEP, LIST, text("{}"), text("[null]"))),
    ("provenance.json", text('[{"code": 1}]'), NAMED, REFUSED),
    ("provenance.json", text('[{"code": {"hash": "a", "files": {"script": 1}}}]'), NAMED, REFUSED),
    ("provenance.json", text('[{"step": "0"}]'), NAMED, REFUSED),
    *(("metrics.jsonl", harm, NAMED, REFUSED) for harm in (LIST, text("{}\n"), text('{"loss": 1}\n'), text("\n"))),
    ("metrics.jsonl", lines(lambda all: [all[0] | {"step": None}, *all[1:]]), NAMED, REFUSED),
    ("metrics.jsonl", lines(lambda all: [all[0] | {"step": -1}, *all[1:]]), NAMED, REFUSED),
    ("metrics.jsonl", lines(lambda all: [all[0] | {"step": 0.0}, *all[1:]]), NAMED, REFUSED),
    ("metrics.jsonl", lines(lambda all: [all[0] | {"step": False}, *all[1:]]), NAMED, REFUSED),
    ("metrics.jsonl", lines(lambda all: [*all[:-1], all[-1] | {"loss": float("nan")}]), NAMED, REFUSED),
    ("metrics.jsonl", lines(lambda all: [*all[:-1], all[-1] | {"lr": [1]}]), NAMED, REFUSED),
    ("metrics.jsonl", lines(lambda all: all + all), NAMED, REFUSED),
    ("metrics.jsonl", lines(lambda all: all[::-1]), NAMED, REFUSED),
    ("metrics.jsonl", lines(lambda all: all[:-2]), NAMED, NAMED),
    *(("metrics.jsonl", harm, NAMED, NAMED) for harm in (gone, EMPTY, text("\0\0\0"))),
    *((name, harm, NAMED, REFUSED) for name in ("evaluation.parquet", "drift.parquet") for harm in (EMPTY, cut, LIST)),
    ("evaluation.parquet", column("loss", ["a"]), NAMED, REFUSED),
    ("evaluation.parquet", column("loss", [None]), NAMED, REFUSED),
    ("evaluation.parquet", column("image", [b"\xff"]), NAMED, REFUSED),
    ("evaluation.parquet", column("image", [1]), NAMED, REFUSED),
    ("evaluation.parquet", column("step", [0.5]), NAMED, REFUSED),
    ("evaluation.parquet", column("step", [2**40]), NAMED, REFUSED),
    ("evaluation.parquet", column("noise_sample", [[1]]), NAMED, REFUSED),
    ("evaluation.parquet", gone, AGAIN, None),
    ("drift.parquet", gone, AGAIN, None),
    *(("config.yaml", harm, AGAIN, NAMED) for harm in (gone, EMPTY, LIST, NO_JSON, text("lora: 1\n"), text("a: [\n"))),
    *(("plan.json", harm, AGAIN, NAMED) for harm in (gone, *SHAPES, changed(global_batch_size="4"))),
    *(("data_report.json", harm, AGAIN, NAMED) for harm in (gone, *SHAPES, changed(used=[None]))),
    *(("validation_set.json", harm, AGAIN, NAMED) for harm in (gone, *SHAPES, changed(images=[{"hash": []}]))),
    *(("stage_timings.json", harm, NAMED, None) for harm in (EMPTY, LIST, text('{"a": "b"}'), text('{"a": NaN}'))),
    *(("run.safetensors", harm, AGAIN, None) for harm in (gone, EMPTY, cut, LIST)),
    *((PICTURE, harm, AGAIN, NAMED) for harm in (EMPTY, cut)),
    *(("samples/step-00000000/00-seed0.png", harm, NAMED, NAMED) for harm in (EMPTY, cut)),
    *(("samples/progress.png", harm, AGAIN, NAMED) for harm in (EMPTY, cut)),
    *(("checkpoints/step-00000002/manifest.json", harm, None, NAMED) for harm in (gone, folder, broken_link, *SHAPES)),
    ("checkpoints/step-00000002/manifest.json", changed(step="2"), None, NAMED),
    ("checkpoints/step-00000002/state.pt", gone, None, NAMED),
    ("checkpoints/step-00000002/state.pt", folder, None, NAMED),
    ("checkpoints/step-00000002/state.pt", cut, None, NAMED),
]
KINDS = ("run.json", "config.yaml", "metrics.jsonl", "evaluation.parquet", "run.safetensors", "loss.png", "wandb")


class Done(Exception):
    pass


def restore(whole, path):
    """The content of `path` as that of `whole`; the folder itself stays the one that the run has locked."""
    for entry in path.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    shutil.copytree(whole, path, dirs_exist_ok=True)


def at_the_start(trainer, monkeypatch, settings, do):
    """Calls `do(start)` where the script decides what to do: `start()` decides by what is in the run folder then."""
    real = resume.start_or_resume

    def decide(job, inputs, plan):
        do(lambda: real(job, inputs, plan))
        raise Done

    monkeypatch.setattr(resume, "start_or_resume", decide)
    with pytest.raises(Done):
        trainer.train("run", settings)
    monkeypatch.setattr(resume, "start_or_resume", real)


@ONE
@pytest.mark.slow
def test_each_damage_has_its_outcome(trainer, monkeypatch, tmp_path, capsys, caplog):
    trainer.train("run", SETTINGS)
    run, whole = trainer.folder("run"), tmp_path / "whole"
    shutil.copytree(run, whole)
    wrong = []

    def outcome_of(start, name, harm):
        restore(whole, run)
        harm(run / name)
        capsys.readouterr(), caplog.clear()
        try:
            start()
        except UserError as error:
            return REFUSED, str(error)
        said = capsys.readouterr().out + caplog.text
        damaged = run / name
        made_again = damaged.is_file() and damaged.read_bytes() == (whole / name).read_bytes()
        return (AGAIN if made_again or "made again" in said or "written again" in said else NAMED), said

    def every(place):
        def do(start):
            for number, row in enumerate(TABLE):
                if (expected := row[2 + place]) is None:
                    continue
                found, said = outcome_of(start, *row[:2])
                is_named = (
                    row[0].rpartition("/")[2] in said
                    or row[0].split("/")[-2:-1] == ["step-00000002"]
                    and "step-00000002" in said
                )
                fits = found == expected or (expected == NAMED and found == AGAIN)
                if not fits or not is_named or (found == REFUSED and "\n" in said):
                    wrong.append((number, row[0], expected, found, said[-300:]))

        return do

    at_the_start(trainer, monkeypatch, SETTINGS, every(0))
    restore(whole, run)
    at_the_start(trainer, monkeypatch, LONGER, every(1))
    assert not wrong, "\n".join(map(str, wrong))


@ONE
@pytest.mark.slow
def test_what_the_sentence_says_finishes_the_run(trainer, tmp_path, capsys, monkeypatch):
    """One run, damaged again and again: each time the advice is followed, and at the end it is the run that nothing happened to."""
    trainer.train("whole", LONGER)
    trainer.train("run", SETTINGS)
    run = trainer.folder("run")
    for name in ("run.json", "provenance.json", "evaluation.parquet", "drift.parquet", "metrics.jsonl"):
        (run / name).write_text("[1]\n")
        with pytest.raises(UserError, match=name) as refused:
            trainer.train("run", LONGER)
        assert "remove" in str(refused.value)
        (run / name).unlink()
    (run / "run.safetensors").write_bytes(b"")
    (run / PICTURE).write_bytes(b"")
    capsys.readouterr()
    assert trainer.train("run", LONGER) == 0
    said = capsys.readouterr().out
    assert "no run.json: it is made again from the checkpoint" in said
    assert (
        "metrics.jsonl has lost the lines of steps 1 to 2" in said
        and "00-seed0.png is empty: its step is left out" in said
    )
    marked, *rest = trainer.metrics("run")
    assert marked == {"step": 2, "missing_from": 1}
    assert [line for line in rest if "loss" in line] == [
        line for line in trainer.metrics("whole") if line["step"] == 3
    ][:1]
    for name, weights in trainer.adapter("whole").items():
        assert torch.equal(trainer.adapter("run")[name], weights)
    # A finished run, whose adapter file is damaged: from the last checkpoint, and without one a sentence.
    before = (run / "run.safetensors").read_bytes()
    broken = bytearray(before)
    broken[-1] ^= 1
    (run / "run.safetensors").write_bytes(broken)
    assert trainer.train("run", LONGER) == 0
    assert "run.safetensors is damaged (its tensors are not those" in capsys.readouterr().out
    assert trainer.adapter("run").keys() == trainer.adapter("whole").keys()
    (run / "run.safetensors").write_bytes(broken)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="run.safetensors is damaged .* has no checkpoint to write it again from"):
        trainer.train("run", LONGER)


@ONE
@pytest.mark.parametrize("name", KINDS)
def test_something_else_in_the_place_of_a_file_is_refused(trainer, name, tmp_path):
    path = trainer.folder("run") / name
    path.parent.mkdir()
    for make in (broken_link, folder if "." in name else lambda path: (path.unlink(), path.write_text(""))):
        path.touch()
        make(path)
        with pytest.raises(UserError, match=f"{name} is a (broken link|folder|file), and a run has a"):
            trainer.train("run", {"train.steps": 1})
        path.unlink() if path.is_symlink() or path.is_file() else path.rmdir()


@ONE
@pytest.mark.slow
def test_a_checkpoint_with_the_state_of_another_adapter_is_a_sentence(trainer):
    trainer.train("run", {"train.steps": 2})
    folder, state = trainer.folder("run") / "checkpoints", trainer.checkpoint("run").load()
    facts = latest_checkpoint(folder).facts
    name = next(iter(state["adapter"]))
    other = {"adapter": state["adapter"] | {name: torch.zeros(3, 3)}}
    unnamed = {"optimizer": {"state": {}, "param_groups": [{"params": [0]}]}}
    groups = {"optimizer": state["optimizer"] | {"groups": [{"names": ["x"], "options": {}}]}}
    for change in ({"adapter": None}, {"optimizer": 1}, other, {"adapter": {"x": torch.zeros(1)}}, unnamed, groups):
        shutil.rmtree(folder / "step-00000002")
        save_checkpoint(folder, 2, state | change, facts, keep=2)
        with pytest.raises(
            UserError, match="state.pt does not hold the state of this run .*remove the folder step-00000002"
        ):
            trainer.train("run", {"train.steps": 3})
    shutil.rmtree(folder / "step-00000002")
    assert trainer.train("run", {"train.steps": 3}) == 0


@ONE
def test_a_cache_file_truncated_while_training_is_a_sentence(trainer, monkeypatch, tmp_path):
    """Reading a mapped file would kill the process, also in the loader's thread; the rows are read."""
    settings = {"train.steps": 4, "cache.folder": str(tmp_path / "cache")}
    prepare = Loader._prepare

    def truncate(loader, step):
        # In the loader's thread: in another one it could fall between the check of a file and its reading.
        if step == 2:
            for shard in (tmp_path / "cache").rglob("*.arrow"):
                shard.write_bytes(b"")
        return prepare(loader, step)

    monkeypatch.setattr(Loader, "_prepare", truncate)
    with pytest.raises(
        UserError, match=r"the cache file .*\.arrow is damaged \(it was truncated\): run the same command again"
    ):
        trainer.train("run", settings)
    monkeypatch.setattr(Loader, "_prepare", prepare)
    assert trainer.checkpoint("run").step in (1, 2, 3)
    assert trainer.train("run", settings) == 0
    assert [line["step"] for line in trainer.metrics("run")] == [1, 2, 3, 4]


@ONE
def test_metrics_removed_or_cut_while_training_are_marked(trainer, monkeypatch, caplog):
    metrics, step = trainer.folder("run") / "metrics.jsonl", trainer.script.training_step

    def lose(job, unet, batch, *rest):
        if batch.step == 2:
            metrics.unlink()
        if batch.step == 4:
            metrics.write_bytes(metrics.read_bytes()[:-5])
        step(job, unet, batch, *rest)

    monkeypatch.setattr(trainer.script, "training_step", lose)
    trainer.train("run", {"train.steps": 5})
    assert [(line["step"], line.get("missing_from")) for line in trainer.metrics("run")] == [
        (2, 1),
        (3, None),
        (4, 4),
        (5, None),
    ]
    assert "was changed or removed while this run was writing it" in caplog.text
