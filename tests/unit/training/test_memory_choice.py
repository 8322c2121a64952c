"""What train.memory chooses, with costs as SDXL's at 1024 px on a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from sushi_research import models
from sushi_research.config import SDXLTraining
from sushi_research.errors import UserError
from sushi_research.planning import memory
from sushi_research.planning.memory import GIB
from sushi_research.runs.job import Job
from sushi_research.runs.run_folder import RunFolder
from sushi_research.training import memory_choice
from sushi_research.training.memory_choice import fit_memory

DATA: Any = SimpleNamespace(
    items=SimpleNamespace(buckets=((1024, 1024), (1216, 832)), bucket_ids=np.array([0, 0, 1])),
    captions=None,
    measured=False,
)


class Costs:
    """GiB and TFLOP of a sample of SDXL; half of the base's memory with base_storage."""

    def __init__(self, job: Job) -> None:
        self._held = (5.04 if job.config.model.base_storage == "compute" else 2.7) * GIB

    def flops(self, mode: str, samples: int, size: tuple[int, int]) -> float:
        return {"none": 14.58e12, "feed_forward": 17e12, "all": 19.73e12}[mode] * samples

    def peak(self, mode: str, samples: int, size: tuple[int, int], recorded: bool) -> memory.Memory:
        live = {"none": 5.28, "feed_forward": 3.5, "all": 0.511}[mode] * GIB * samples * size[0] * size[1] / 2**20
        return memory.on_gpu(self._held, live, checkpointing=mode, recorded=recorded)

    def caching(self, size: tuple[int, int]) -> memory.Memory:
        return memory.on_gpu(0.31 * GIB, 2.51 * GIB)

    def evaluating(self, mode: str, samples: int, size: tuple[int, int]) -> memory.Memory:
        return memory.on_gpu(self._held, 2.2 * GIB)

    def sampling(self, size: tuple[int, int], tile: int) -> memory.Memory:
        return memory.on_gpu(self._held + 0.31 * GIB, 0.19 * GIB)


@pytest.fixture
def fitted(monkeypatch, tmp_path):
    """A function: settings of the section `train` -> the section with what was chosen."""
    monkeypatch.setattr(Job, "device", torch.device("cuda", 0))
    monkeypatch.setattr(memory_choice, "_costs", lambda job, base, data: Costs(job))
    monkeypatch.setattr(memory_choice, "device_bytes", lambda job: 80 * GIB)

    def fit(dry_run: Any = True, **train: Any) -> Any:
        config = SDXLTraining(
            model={"base": "none"},
            data={"path": "none"},
            train={"steps": 1, "batch_size": 2, "accumulation": 2, **train},
            run={"folder": str(tmp_path), "name": "run"},
        )
        job = Job(config, models.load("sdxl"), Accelerator(cpu=True), "bf16", dry_run=dry_run)
        return fit_memory(job, None, DATA).config

    return fit


def chosen(config: Any) -> tuple[int, int, str]:
    return config.train.batch_size, config.train.accumulation, config.train.gradient_checkpointing


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("8GB", (1, 4, "all")),
        ("9GiB", (2, 2, "all")),
        # The whole step at once with recomputed activations takes less time than four without.
        ("12GiB", (4, 1, "all")),
        ("40GB", (4, 1, "none")),
        ("500GB", (4, 1, "none")),
    ],
)
def test_the_least_work_that_fits(fitted, capsys, size, expected):
    assert chosen(fitted(memory=size)) == expected
    assert f"memory       train.memory {size}" in capsys.readouterr().out


def test_without_the_key_and_with_a_given_mode(fitted):
    assert chosen(fitted(gradient_checkpointing="feed_forward")) == (2, 2, "feed_forward")
    assert chosen(fitted(memory="40GB", gradient_checkpointing="all")) == (4, 1, "all")


def test_evaluating_fits_too(fitted, monkeypatch):
    monkeypatch.setattr(DATA, "measured", True)
    assert chosen(fitted(memory="9.7GB")) == (2, 2, "all")
    with pytest.raises(
        UserError, match="what the run does besides training .* takes 8.5"
    ):  # its choice for training alone: (1, 4, "all")
        fitted(memory="9GB")


def test_only_what_a_config_can_say_is_chosen(fitted):
    assert chosen(fitted(memory="40GB", batch_size=3, accumulation=7)) == (3, 7, "none")
    with pytest.raises(UserError, match="the smallest micro-batch .16 with"):  # 8 x 8192 would fit
        fitted(memory="12GB", batch_size=16, accumulation=4096)


def test_what_does_not_fit_names_what_would_and_sets_nothing(fitted):
    with pytest.raises(UserError) as caught:
        fitted(memory="6GB")
    sentence = str(caught.value)
    assert sentence.startswith(
        "train.memory is 6GB, and the smallest micro-batch (1 with gradient_checkpointing all) takes 7.1"
    )
    needed = float(sentence.partition("give at least ")[2].partition("GB")[0])
    assert chosen(fitted(memory=f"{needed}GB")) == (1, 4, "all")
    assert "--model.base_storage int8" in sentence and fitted(memory="8GB").model.base_storage == "compute"
    with pytest.raises(UserError) as caught:
        fitted(memory="3GB")
    assert "base_storage" not in str(caught.value)


def test_a_run_keeps_its_choice(fitted, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(RunFolder, "record", lambda self: {"finished_at": None})
    (tmp_path / "run").mkdir()
    before = "train: {memory: 8 GB, batch_size: 2, accumulation: 2, gradient_checkpointing: feed_forward}\n"
    (tmp_path / "run/config.yaml").write_text(before)
    assert chosen(fitted(memory="8GB")) == (2, 2, "feed_forward")
    assert "as the run has begun with it" in capsys.readouterr().out
    # Another memory, another number of samples per step, and another mode that was asked for choose again.
    assert chosen(fitted(memory="40GB")) == (4, 1, "none")
    assert chosen(fitted(memory="8GB", batch_size=1)) == (1, 2, "all")
    assert chosen(fitted(memory="8GB", gradient_checkpointing="all")) == (1, 4, "all")


def test_the_process_is_held_to_the_memory(fitted, monkeypatch):
    found = []
    properties = SimpleNamespace(total_memory=80 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", found.append)
    fitted(memory="8GiB", dry_run=None)
    fitted(memory="8GiB", dry_run=None, record_step=False)
    fitted(dry_run=None)
    assert found == [pytest.approx((8 - 1.0) / 80), pytest.approx((8 - 0.8) / 80)]
