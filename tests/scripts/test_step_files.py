"""An adapter file for each checkpoint, whatever happens to the run on its way."""

from __future__ import annotations

import errno
import shutil
import signal
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from script_runs import Trainer, assert_equal
from test_resume import Killed, at_micro_batch, kill, stop

from sushi_research.adapters import kohya_format
from sushi_research.errors import UserError
from sushi_research.files import disk_error
from sushi_research.models.header import read_header
from sushi_research.runs.checkpoint import read_checkpoint
from sushi_research.runs.run_folder import RunFolder
from sushi_research.training.adapter_output import AdapterWriter

pytestmark = pytest.mark.parametrize("architecture", ["sd15"])
SETTINGS = {
    "train.steps": 5,
    "checkpoint.every": 2,
    "checkpoint.keep": 9,
    "checkpoint.keep_adapters": None,
    "lora.save_dtype": "float32",
}


def files(trainer: Trainer) -> list[str]:
    folder = trainer.folder("run")
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors"))


def assert_is_step(path: Path, step: int) -> None:
    """The file holds the weights of that step's checkpoint."""
    weights = read_checkpoint(path.parent / f"checkpoints/step-{step:08d}").load()["adapter"]
    found = {tensor.numpy().tobytes() for name, tensor in load_file(path).items() if name.endswith(".weight")}
    assert found == {tensor.numpy().tobytes() for tensor in weights.values()}


def test_each_checkpoint_has_its_file_also_after_stops_and_longer_lengths(trainer, capsys, caplog):
    run = RunFolder(trainer.folder("run"), None)
    with at_micro_batch(trainer, 3, 0, stop):
        assert trainer.train("run", SETTINGS) == 128 + signal.SIGTERM
    assert f"its adapter file is {run.step_adapter(3)}" in capsys.readouterr().out
    assert files(trainer) == ["run-000002.safetensors", "run-000003.safetensors"]
    for step in (2, 3):
        assert_is_step(run.step_adapter(step), step)

    # A file of another step, without its hash, is no file of this one. Made again, it differs in the times alone.
    before = read_header(run.step_adapter(3)).metadata
    save_file(load_file(run.step_adapter(2)), run.step_adapter(3))
    assert trainer.train("run", SETTINGS) == 0
    assert "run-000003.safetensors is damaged or not the adapter of step 3: it is written again" in caplog.text
    assert_is_step(run.step_adapter(3), 3)
    again = read_header(run.step_adapter(3)).metadata
    differing = {key for key in before.keys() | again.keys() if before.get(key) != again.get(key)}
    assert differing <= {"ss_training_started_at", "ss_training_finished_at", "modelspec.date"}
    assert_is_step(run.step_adapter(4), 4)
    assert_is_step(run.adapter, 5)
    assert not run.step_adapter(5).exists(), "the last one has the name of the run"

    # The run goes on past its end, and keeps the file of that.
    last = run.adapter.read_bytes()
    assert trainer.train("run", SETTINGS | {"train.steps": 6}) == 0
    assert run.step_adapter(5).read_bytes() == last
    assert_is_step(run.adapter, 6)

    # It goes on from step 4: files of later steps are set aside, and made again.
    for step in (5, 6):
        shutil.rmtree(run.checkpoints / f"step-{step:08d}")
    ends = [run.step_adapter(5).read_bytes(), run.adapter.read_bytes()]
    capsys.readouterr()
    assert trainer.train("run", SETTINGS | {"train.steps": 7}) == 0
    moved = [run.earlier / f"run-00000{step}.safetensors" for step in (5, 6)]
    said = f"from after step 4, are moved to {run.earlier}: {moved[0].name}, {moved[1].name}"
    assert said in capsys.readouterr().out and [path.read_bytes() for path in moved] == ends
    assert_equal(load_file(run.step_adapter(6)), load_file(moved[1]))
    names = [f"run-00000{step}" for step in (2, 3, 4, 6)]
    assert files(trainer) == ["earlier/run-000005.safetensors", "earlier/run-000006.safetensors"] + [
        f"{name}.safetensors" for name in [*names, "run"]
    ]


def test_files_are_kept_removed_or_not_written_as_configured(trainer, capsys):
    assert trainer.train("run", SETTINGS | {"checkpoint.every": 1, "checkpoint.keep_adapters": 2}) == 0
    assert files(trainer) == [f"run{step}.safetensors" for step in ("-000003", "-000004", "")]
    # The file of an earlier end counts too.
    assert trainer.train("run", SETTINGS | {"train.steps": 6, "checkpoint.keep_adapters": 2}) == 0
    assert files(trainer) == [f"run{step}.safetensors" for step in ("-000004", "-000005", "")]
    # A run that is started afresh sets aside what was there.
    shutil.rmtree(trainer.folder("run") / "checkpoints")
    folder = trainer.folder("run")
    (folder / "run.json").write_text(
        (folder / "run.json").read_text().replace('"finished_at": 6', '"finished_at": null')
    )
    with at_micro_batch(trainer, 2, 0, stop):
        trainer.train("run", SETTINGS | {"checkpoint.keep_adapters": 0})
    assert files(trainer) == [f"earlier/run-00000{step}.safetensors" for step in (4, 5, 6)]
    assert "the same command with --train.steps 2 writes one" in capsys.readouterr().out


def test_an_interruption_and_a_full_disk(trainer, monkeypatch, caplog):
    """What interrupts samples saves the step with its file; a file that cannot be written does not stop the run."""
    settings = SETTINGS | {
        "checkpoint.every": 3,
        "sample.enabled": True,
        "sample.prompts": ["a cat"],
        "sample.every": 2,
    }
    calls = []

    def generate(*_):
        calls.append(1)
        if len(calls) == 2:
            kill()
        return [Image.new("RGB", (8, 8))]

    monkeypatch.setattr("sushi_research.sampling.sample_grids.generate_images", generate)
    with pytest.raises(Killed):
        trainer.train("run", settings)
    assert files(trainer) == ["run-000002.safetensors"]
    assert_is_step(trainer.folder("run") / "run-000002.safetensors", 2)

    write = AdapterWriter.write

    def full(writer, path, *arguments):
        if path.name == "run-000003.safetensors":
            raise disk_error(f"cannot write {path}", OSError(errno.ENOSPC, "No space left on device"))
        write(writer, path, *arguments)

    monkeypatch.setattr(AdapterWriter, "write", full)
    assert trainer.train("run", settings) == 0
    assert "No space left on device: the run goes on without the adapter file of step 3" in caplog.text
    assert files(trainer) == ["run-000002.safetensors", "run.safetensors"]


def test_values_that_fp16_cannot_hold_cost_a_file_on_the_way_and_not_the_run(trainer, monkeypatch, caplog):
    settings = SETTINGS | {"lora.save_dtype": "float16", "checkpoint.every": 1, "train.steps": 3}
    tensors = kohya_format.file_tensors
    calls = []

    def overflowing(components, architecture, state, dtype):
        calls.append(dtype)
        factor = 1e9 if len(calls) == 1 else 1
        return tensors(components, architecture, {name: each * factor for name, each in state.items()}, dtype)

    monkeypatch.setattr(kohya_format, "file_tensors", overflowing)
    assert trainer.train("run", settings) == 0
    assert "set lora.save_dtype to float32: the run goes on without the adapter file of step 1" in caplog.text
    assert files(trainer) == ["run-000002.safetensors", "run.safetensors"]


def test_a_picture_that_damages_the_finished_file_ends_the_run(trainer, monkeypatch):
    settings = SETTINGS | {"train.steps": 1, "sample.enabled": True, "sample.prompts": ["a cat"]}
    monkeypatch.setattr("sushi_research.sampling.sample_grids.generate_images", lambda *_: [Image.new("RGB", (8, 8))])
    add = kohya_format.write_atomic

    def write(path, data):
        is_again = path.exists()
        add(path, data[:-1] + b"x" if is_again else data)

    monkeypatch.setattr(kohya_format, "write_atomic", write)
    with pytest.raises(UserError, match="run.safetensors is damaged"):
        trainer.train("run", settings)
    monkeypatch.setattr(kohya_format, "write_atomic", add)
    assert trainer.train("run", settings) == 0
    assert kohya_format.problem_of(trainer.folder("run") / "run.safetensors") is None
