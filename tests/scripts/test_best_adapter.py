"""`evaluation.keep_best`: the adapter of the best evaluated step, whatever happens to the run on its way."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from script_runs import Trainer, assert_equal
from test_evaluating import make_pictures
from test_resume import Killed, at_micro_batch, kill, stop

from sushi_research.adapters.chosen_step import chosen_step
from sushi_research.evaluation.results import Results
from sushi_research.files import disk_error
from sushi_research.runs.checkpoint import read_checkpoint
from sushi_research.training.adapter_output import AdapterWriter

# A tiny run has no best step of its own. Files are written at steps 1 and 3; checkpoints are at 2 and 4.
RANKING = {1: 4.0, 2: 4.5, 3: 3.0, 4: 3.5}

pytestmark = pytest.mark.parametrize("architecture", ["sd15"])


@pytest.fixture
def ranking(monkeypatch) -> dict[int, float]:
    """What the criterion says about each step."""
    ranking = dict(RANKING)
    rank = lambda outcomes: [np.array([[ranking.get(step, 9.0)] for step in outcomes.steps])]  # noqa: E731
    monkeypatch.setattr("sushi_research.reports.best_step.criterion", rank)
    return ranking


@pytest.fixture(scope="session")
def two_pictures(tmp_path_factory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("two"), 2, 3)


@pytest.fixture
def settings(two_pictures) -> dict:
    return {
        "train.steps": 4,
        "checkpoint.every": 2,
        "evaluation.path": str(two_pictures),
        "evaluation.every": 1,
        "evaluation.noise_samples": 4,
        "evaluation.drift_captions": [],
        "evaluation.keep_best": True,
        "lora.save_dtype": "float32",
    }


def best_files(trainer: Trainer, name: str) -> list[int]:
    return sorted(int(path.stem.rpartition("-")[2]) for path in trainer.folder(name).glob("*-best-*"))


def best(trainer: Trainer, name: str, step: int) -> dict:
    return load_file(trainer.folder(name) / f"{name}-best-{step:06d}.safetensors")


def test_a_run_in_pieces_keeps_what_an_uninterrupted_one_keeps(trainer, settings, ranking, capsys):
    assert trainer.train("whole", settings) == 0
    assert best_files(trainer, "whole") == [3]
    printed = capsys.readouterr().out
    assert "whole-best-000003.safetensors" in printed and "report.html" in printed
    chosen = chosen_step(trainer.folder("whole") / "whole-best-000003.safetensors")
    assert (chosen.step, chosen.among, len(chosen.images)) == ("3", "3", 2)
    assert chosen.validation_set == Results(trainer.folder("whole") / "evaluation.parquet").set_hash()

    with pytest.raises(Killed), at_micro_batch(trainer, 4, 0, kill):
        trainer.train("pieces", settings)
    assert best_files(trainer, "pieces") == [1, 3], "the run may go on from step 2, where step 1 is the best"
    with at_micro_batch(trainer, 4, 0, stop):
        trainer.train("pieces", settings)
    assert best_files(trainer, "pieces") == [3]
    page = (trainer.folder("pieces") / "report.html").read_text(encoding="utf-8")
    assert "Stopped at step 4 of 4." in page and "Step 3 is the best of 3 evaluated steps" in page
    assert trainer.train("pieces", settings) == 0
    assert best_files(trainer, "pieces") == [3]
    assert_equal(best(trainer, "pieces", 3), best(trainer, "whole", 3))

    # Step 2 is the best now, and has a checkpoint: the finished run makes its file again.
    ranking[2] = 0.0
    file = trainer.folder("whole") / "whole-best-000002.safetensors"
    assert trainer.train("whole", settings) == 0
    assert f"{file.name} is missing: it is made again" in capsys.readouterr().out
    assert best_files(trainer, "whole") == [2]
    weights = read_checkpoint(trainer.folder("whole") / "checkpoints/step-00000002").load()["adapter"]
    found = {tensor.numpy().tobytes() for name, tensor in best(trainer, "whole", 2).items() if name.endswith(".weight")}
    assert found == {tensor.numpy().tobytes() for tensor in weights.values()}
    assert_equal(trainer.checkpoint("whole").load(), trainer.checkpoint("pieces").load())
    assert_equal(trainer.adapter("whole"), trainer.adapter("pieces"))

    shutil.rmtree(trainer.folder("whole") / "checkpoints")
    file.unlink()
    assert trainer.train("whole", settings) == 0
    assert f"{file.name} is missing, and no checkpoint of its step is left" in capsys.readouterr().out


def test_a_full_disk_and_averaged_weights(trainer, settings, ranking, monkeypatch, caplog, capsys):
    """The best file holds the averaged weights, as the last one does; one that cannot be written leaves the one before it."""
    settings |= {"optimizer.name": "schedule_free.ScheduleFree", "train.steps": 2, "optimizer.kwargs": {}}
    ranking[2] = 0.0
    write = AdapterWriter.write

    def full(writer, path, *arguments):
        if path.name == "run-best-000002.safetensors":
            raise disk_error(f"cannot write {path}", OSError(errno.ENOSPC, "No space left on device"))
        write(writer, path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(AdapterWriter, "write", full)
        assert trainer.train("run", settings) == 0
    assert "No space left on device: the run goes on without the adapter file of step 2" in caplog.text
    assert "the run ends without the adapter of its best step" in capsys.readouterr().out
    assert best_files(trainer, "run") == [1]

    assert trainer.train("run", settings) == 0
    assert best_files(trainer, "run") == [2]
    assert_equal(best(trainer, "run", 2), trainer.adapter("run"))
