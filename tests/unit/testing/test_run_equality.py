"""Two run folders are equal, or it is said what differs: every kind of difference is found."""

import json
import shutil

import pytest
import torch
from fake_runs import FakeValidationSet, base_loss, fake_run
from safetensors.torch import save_file

from sushi_research.evaluation.results import Results
from sushi_research.runs.checkpoint import save_checkpoint
from testing.run_equality import differences

FACTS = {"samples_seen": 0, "epoch": 0, "world": 1, "identity": {}}


def state(value=1.0):
    return {"adapter": {"a": torch.full((2,), value)}, "optimizer": {"state": {0: {"step": 3}}}}


@pytest.fixture
def run(tmp_path):
    folder = fake_run(tmp_path / "run", pictures=True)
    save_file({"a": torch.tensor([1.0, 0.0]), "b": torch.ones(2, dtype=torch.bfloat16)}, folder / "run.safetensors")
    save_checkpoint(folder / "checkpoints", 20, state(), FACTS, keep=2)
    return folder


@pytest.fixture
def other(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    (other / "run.safetensors").rename(other / "other.safetensors")
    return other


def test_equal_but_for_the_clock_and_the_tracker(run, other):
    record = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps(record | {"wandb_id": "another"}))
    lines = (other / "metrics.jsonl").read_text().replace('"images_per_second": 8.0', '"images_per_second": 9.0')
    (other / "metrics.jsonl").write_text(lines.replace('"peak_memory_gib": 1.5', '"peak_memory_gib": 1.6'))
    assert differences(other, run) == []


def minus_zero(other):
    save_file({"a": torch.tensor([1.0, -0.0]), "b": torch.ones(2, dtype=torch.bfloat16)}, other / "other.safetensors")


def another_dtype(other):
    save_file({"a": torch.tensor([1.0, 0.0]), "b": torch.ones(2)}, other / "other.safetensors")


def one_value_logged(other):
    path = other / "metrics.jsonl"
    path.write_text(path.read_text().replace('"step": 7, "loss": 0.1,', '"step": 7, "loss": 0.10000000000000002,'))


def one_line_fewer(other):
    path = other / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def one_loss(other):
    loss = base_loss(FakeValidationSet())
    loss[3, 3] += 1e-6
    Results(other / "evaluation.parquet").append(FakeValidationSet(), 0, loss, base_loss(FakeValidationSet()))


def no_results(other):
    (other / "evaluation.parquet").unlink()


def another_state(other):
    shutil.rmtree(other / "checkpoints")
    save_checkpoint(other / "checkpoints", 20, state(1.0 + 2**-23), FACTS, keep=2)


def another_step(other):
    shutil.rmtree(other / "checkpoints")
    save_checkpoint(other / "checkpoints", 19, state(), FACTS, keep=2)


def no_checkpoint(other):
    shutil.rmtree(other / "checkpoints")


def not_finished(other):
    record = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps(record | {"finished_at": None}))


def no_adapter(other):
    (other / "other.safetensors").unlink()


def a_pixel(other):
    from PIL import Image

    path = other / "samples/step-00000020/00-seed0.png"
    with Image.open(path) as picture:
        picture.load()
    picture.putpixel((3, 3), (0, 0, 0))
    picture.save(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (minus_zero, "the adapter NAME.safetensors, a has other values"),
        (another_dtype, "the adapter NAME.safetensors, b has other values"),
        (one_value_logged, "metrics.jsonl, entry 6, loss is 0.10000000000000002 in place of 0.1"),
        (one_line_fewer, "metrics.jsonl has 19 entries in place of 20"),
        (one_loss, "evaluation.parquet, entry 27, loss is"),
        (no_results, "evaluation.parquet is a NoneType"),
        (another_state, "the last checkpoint, adapter, a has other values"),
        (another_step, "the last checkpoint's step is 19 in place of 20"),
        (no_checkpoint, "one has a checkpoint and the other has none"),
        (not_finished, "run.json, finished_at is a NoneType in place of a int"),
        (no_adapter, "NAME.safetensors is missing"),
        (a_pixel, "images, samples/step-00000020/00-seed0.png is"),
    ],
)
def test_each_difference_is_named(run, other, change, words):
    change(other)
    found = differences(other, run)
    assert found and any(words in difference for difference in found), found
