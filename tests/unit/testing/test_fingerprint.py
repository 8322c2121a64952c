"""The fingerprint of a run: the clock and the machine do not change it, every other value does."""

import json
import shutil

import pytest
import torch
from fake_runs import fake_run
from safetensors.torch import save_file

from sushi_research.runs.checkpoint import save_checkpoint
from testing.fingerprint import digest, fingerprint

METADATA = {"ss_steps": "20", "modelspec.date": "today", "ss_training_started_at": "1", "ss_training_finished_at": "2"}
CHECKPOINTS = {"checkpoints/step-00000010", "checkpoints/step-00000020"}


def write_adapter(run, metadata, value=1.0):
    save_file({"a": torch.tensor([value, 0.0]), "b": torch.ones(2)}, run / f"{run.name}.safetensors", metadata)


@pytest.fixture
def run(tmp_path):
    folder = fake_run(tmp_path / "run", pictures=True)
    write_adapter(folder, METADATA)
    for step in (10, 20):
        save_checkpoint(folder / "checkpoints", step, {"a": torch.ones(step)}, {"world": 1, "identity": {}}, keep=3)
    return folder


def test_what_depends_on_the_clock_or_the_machine_is_left_out(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    (other / "run.safetensors").unlink()
    write_adapter(other, METADATA | {"modelspec.date": "tomorrow", "ss_training_finished_at": "3"})
    lines = (other / "metrics.jsonl").read_text().replace('"images_per_second": 8.0', '"images_per_second": 9.0')
    (other / "metrics.jsonl").write_text(lines)
    record = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps(record | {"wandb_id": "another"}))
    assert fingerprint(other) == fingerprint(run)


def test_every_result_has_its_digest(run):
    before = fingerprint(run)
    assert CHECKPOINTS | {"NAME.safetensors", "NAME.safetensors, metadata", "metrics.jsonl", "run.json"} <= set(before)
    write_adapter(run, METADATA | {"ss_steps": "21"}, value=1.0 + 2**-23)
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text().replace('"step": 7,', '"step": 8,'))
    with open(run / "checkpoints/step-00000010/state.pt", "r+b") as file:
        file.truncate(100)
    shutil.rmtree(run / "checkpoints/step-00000020")
    (run / "evaluation.parquet").unlink()
    after = fingerprint(run)
    assert after["checkpoints/step-00000010"] == "damaged"
    assert before.keys() - after.keys() == {"checkpoints/step-00000020", "evaluation.parquet"}
    changed = {what for what in after if after[what] != before[what]} - CHECKPOINTS
    assert changed == {"NAME.safetensors", "NAME.safetensors, metadata", "metrics.jsonl"}


def test_a_digest_covers_type_shape_and_bits():
    values = [1, 1.0, "1", [1], (1,), {"a": 1}, {1: "a"}, None, True, b"1", [1, [2]], [[1], 2]]
    values += [
        torch.tensor([0.0]),
        torch.tensor([-0.0]),
        torch.tensor([[0.0]]),
        torch.tensor([0.0], dtype=torch.bfloat16),
    ]
    values += [torch.tensor(0), torch.zeros(0)]
    assert len({digest(value) for value in values}) == len(values)
