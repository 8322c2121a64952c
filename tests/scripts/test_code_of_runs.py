"""Trainings of the suite's script and of copies of it: the code is recorded, compared, and reported when a run continues."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from pydantic import Field
from script_runs import ROOT, Trainer, assert_equal

from sushi_research import models
from sushi_research.config import SD15Training
from sushi_research.config.loss import LossSection
from sushi_research.errors import UserError
from sushi_research.experiments.comparison import compare
from sushi_research.experiments.variants import variants_of
from sushi_research.reports.run_record import read_record
from sushi_research.runs.provenance import entries

SCRIPT = ROOT / "scripts/train_sd15_lora.py"


class Copy:
    """A trainer whose script is changed to copies of the suite's script, each with a replaced text."""

    def __init__(self, trainer: Trainer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trainer, self.folder, self.monkeypatch = trainer, folder, monkeypatch

    def use(self, name: str, old: str = "", new: str = "") -> None:
        text = SCRIPT.read_text()
        assert old in text
        path = self.folder / name
        path.write_text(text.replace(old, new, 1))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.monkeypatch.setattr(self.trainer, "script", module)


@pytest.fixture
def copy(trainer, tmp_path, monkeypatch):
    return Copy(trainer, tmp_path, monkeypatch)


HUBER = ("loss = (losses * weights).sum()", "loss = (losses.sqrt() * weights).sum()")
COMMENT = ("            step += 1\n", "            step += 1  # the next one\n")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sd15"])
def test_a_copied_script_with_another_loss_is_another_variant(architecture, trainer, copy, capfd, tmp_path):
    settings = {"train.steps": 1, "optimizer.name": "script_runs.RecordingSGD"}
    assert trainer.train("plain-seed0", settings) == 0
    copy.use("same.py", "import contextlib\n", "import contextlib\n\n# What is below is as it was.\n")
    assert trainer.train("plain-seed1", settings | {"train.seed": 1}) == 0
    copy.use("huber.py", *HUBER)
    assert trainer.train("huber-seed0", settings) == 0
    names = ("plain-seed0", "plain-seed1", "huber-seed0")
    recorded = [entries(trainer.folder(name) / "provenance.json")[0]["code"] for name in names]
    assert recorded[0]["hash"] == recorded[1]["hash"] != recorded[2]["hash"]
    assert [code["script"] for code in recorded] == ["train_sd15_lora.py", "same.py", "huber.py"]
    assert [list(code["named"]) for code in recorded] == [["script_runs.py"]] * 3
    found = compare([read_record(trainer.folder(name)) for name in names])
    assert [(variant.label, variant.seeds) for variant in found.variants] == [("plain", (0, 1)), ("huber", (0,))]
    assert found.warnings == [
        "the code of huber-seed0 differs from that of plain-seed0, plain-seed1 in train_sd15_lora.py / huber.py: "
        "the code may cause the difference"
    ]

    # A finished run goes on with code that differs in a comment, and then with another loss.
    capfd.readouterr()
    for name, change, steps, warning in [
        ("comment.py", COMMENT, 2, ""),
        ("huber.py", HUBER, 3, "warning: the code has changed in comment.py / huber.py; the result may differ"),
    ]:
        copy.use(name, *change)
        assert trainer.train("plain-seed0", settings | {"train.steps": steps}) == 0
        printed = capfd.readouterr().out
        assert warning in printed and ("warning" in printed) is bool(warning)
    found = compare([read_record(trainer.folder(name)) for name in names])
    assert [(variant.label, variant.seeds) for variant in found.variants] == [
        ("plain-seed0", (0,)),
        ("plain-seed1", (1,)),
        ("huber-seed0", (0,)),
    ]
    assert any(
        "plain-seed0 was continued at step 2 with other code than it began with" in text for text in found.warnings
    )


class LaterLoss(LossSection):
    huber: float | None = Field(None, description="A setting that a later version adds")


class LaterTraining(SD15Training):
    """The config of a later version, with one more key."""

    loss: LaterLoss = Field(default_factory=LaterLoss)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sd15"])
def test_a_later_version_with_one_more_key_continues_the_run(architecture, trainer, capfd, monkeypatch):
    def later(name, changes, **loss):
        sections = trainer.config(name, changes).model_dump(exclude={"loss"})
        return trainer.script.main(LaterTraining(**sections, loss=loss))

    assert trainer.train("older", {"train.steps": 1}) == 0
    assert trainer.train("run", {"train.steps": 1}) == 0
    before = json.loads((trainer.folder("run") / "run.json").read_text())
    assert "loss.huber" not in before["identity"]
    with pytest.raises(UserError, match="started with other settings: loss.huber was null, is now 0.5; "):
        later("run", {"train.steps": 2}, huber=0.5)
    assert later("run", {"train.steps": 2}) == 0
    assert "continuing the run run from step 1 of 2" in capfd.readouterr().out
    after = json.loads((trainer.folder("run") / "run.json").read_text())
    assert after["identity"] == before["identity"] | {"loss.huber": None}, "a later default does not change what it was"
    # In a comparison by that version, the older run has the value as well: both are runs of one variant.
    monkeypatch.setattr(models, "config_classes", lambda: {"sd15": LaterTraining})
    variants, by_run = variants_of([read_record(trainer.folder(name)) for name in ("older", "run")])
    assert by_run and len(variants) == 2

    # The adapter file is lost: the last checkpoint has it.
    adapter = trainer.adapter("run")
    (trainer.folder("run") / "run.safetensors").unlink()
    assert later("run", {"train.steps": 2}) == 0
    assert_equal(trainer.adapter("run"), adapter)
    assert later("run", {"train.steps": 2}) == 0 and "there is nothing to do" in capfd.readouterr().out
