"""A step is its samples: how they are split into micro-batches, or over processes, changes nothing but the last digits.

In fp32 with AdamW the adapters are compared; elsewhere what goes into a step: its samples, their noise, timesteps and
posterior samples, which are equal bit for bit.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from script_runs import RATE, ROOT, TOLERANCE, Trainer, assert_equal, largest_difference

from sushi_research.config.command_line import config_to_yaml
from sushi_research.fast.batch import Batch
from sushi_research.runs.checkpoint import read_checkpoint
from sushi_research.training.loader import Loader
from testing.forked_scripts import free_port, ranks


@pytest.fixture
def loaders(monkeypatch: pytest.MonkeyPatch) -> list[Loader]:
    """The loaders of all runs; each has what it gave in `seen`: step -> sample -> that sample's tensors."""
    made: list[Loader] = []
    original = Loader.step

    def step(self: Loader, number: int) -> Iterator[Batch]:
        if self not in made:
            made.append(self)
            self.seen = {}
        self.seen[number] = {}
        for batch in original(self, number):
            assert 1 <= len(batch) <= self.batch_size
            self.seen[number] |= samples_of(batch)
            yield batch

    monkeypatch.setattr(Loader, "step", step)
    return made


def samples_of(batch: Batch) -> dict[str, Any]:
    """Each sample of a micro-batch by its key: its file, and its part of all tensors and draws."""
    tensors = {
        "mean": batch.mean,
        "std": batch.std,
        "time_ids": batch.time_ids,
        "noise": batch.normal("noise"),
        "posterior": batch.normal("posterior"),
        "timestep": batch.integers("timestep", 1000),
        **batch.text,
    }
    return {
        repr(key): {"name": batch.names[i], **{name: tensor[i] for name, tensor in tensors.items()}}
        for i, key in enumerate(batch.keys)
    }


def assert_same_samples(found: dict[int, Any], expected: dict[int, Any]) -> None:
    """Two records hold the same samples in each step, with the same tensors, in whichever order."""
    assert found.keys() == expected.keys()
    for step in expected:
        assert_equal(dict(sorted(found[step].items())), dict(sorted(expected[step].items())), f"step {step}")


def assert_close(trainer: Trainer, found: str, expected: str, steps: int) -> None:
    """The master weights after `steps` steps are equal up to TOLERANCE, and so is what was logged up to there."""
    master_weights = [
        read_checkpoint(trainer.folder(name) / f"checkpoints/step-{steps:08d}").load()["adapter"]
        for name in (found, expected)
    ]
    difference = largest_difference(*master_weights) / RATE
    assert 0 < difference < TOLERANCE, difference
    logged = [trainer.metrics(name)[:steps] for name in (found, expected)]
    for one, other in zip(*logged, strict=True):
        # Loss, gradient norm and the losses by timestep bin; None where a step had no sample of a quarter.
        assert {key for key in one if one[key] is None} == {key for key in other if other[key] is None}
        there = [key for key in other if other[key] is not None]
        assert [one[key] for key in there] == pytest.approx([other[key] for key in there], rel=1e-4)


def split(batch_size: int, accumulation: int) -> dict[str, Any]:
    return {"train.batch_size": batch_size, "train.accumulation": accumulation}


@pytest.mark.slow
def test_accumulation_changes_nothing(trainer: Trainer, loaders: list[Loader]) -> None:
    settings = {"train.steps": 4, "data.flip": 0.5}
    assert trainer.train("whole", {**settings, **split(4, 1)}) == 0
    assert trainer.train("halves", {**settings, **split(2, 2)}) == 0
    whole, halves = loaders
    assert whole.seen.keys() == set(range(4)) and all(len(samples) == 4 for samples in whole.seen.values())
    assert_same_samples(halves.seen, whole.seen)
    assert_close(trainer, "halves", "whole", 4)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sdxl"])
def test_no_precision_and_no_split_changes_the_samples(
    architecture: str, trainer: Trainer, loaders: list[Loader]
) -> None:
    """In bf16 two such runs differ by a step of Adam and more, so their adapters are not compared."""
    settings = {"train.steps": 4, "data.flip": 0.5}
    for precision, batch_size in [("fp32", 4), ("bf16", 4), ("bf16", 2), ("fp16", 1)]:
        changes = {"train.precision": precision, **split(batch_size, 4 // batch_size)}
        assert trainer.train(f"{precision}-{batch_size}", {**settings, **changes}) == 0
    first, *others = loaders
    assert len(others) == 3
    for other in others:
        assert_same_samples(other.seen, first.seen)

    # The shares of two processes, and of three, are the same samples too, each in one of them.
    for world in (2, 3):
        shares = [
            Loader(
                first.items,
                first.sampler,
                first.caches,
                batch_size=2,
                rank=rank,
                world=world,
                device=first.device,
                sets=first.sets,
                time_ids=first.time_ids,
            )
            for rank in range(world)
        ]
        for step, expected in first.seen.items():
            for share in shares:
                list(share.step(step))
            assert sum(len(share.seen[step]) for share in shares) == 4
            together = {key: sample for share in shares for key, sample in share.seen[step].items()}
            assert_same_samples({step: together}, {step: expected})
        for share in shares:
            share.close()


# --- two processes ---


def environment(**variables: str) -> dict[str, str]:
    """For processes that train on the CPU; the launcher overrules ACCELERATE_USE_CPU, so there must be no GPU to see."""
    fixed = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **fixed, **variables}


def accelerate_launch(trainer: Trainer, words: list[str], output: Path) -> subprocess.Popen[bytes]:
    """`accelerate launch` with two processes. On a CPU, --multi_gpu is what makes it start more than one."""
    accelerate = Path(sys.executable).with_name("accelerate")
    flags = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    command = [str(accelerate), "launch", *flags.split(), "--main_process_port", str(free_port()), *words]
    with open(output, "wb") as file:
        return subprocess.Popen(command, env=environment(), stdout=file, stderr=file, cwd=ROOT)


def stopped_at(text: str) -> int:
    found = re.findall(r"stopped at step (\d+) of", text)
    assert len(found) == 1, text  # the main process alone says it
    return int(found[0])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sdxl"])
def test_two_processes(architecture: str, trainer: Trainer, forked: Callable[..., Any], tmp_path: Path) -> None:
    """They learn what one learns; a signal to either stops both at one step; they continue as if nothing had been."""
    steps = 16
    settings = {"train.steps": steps, "checkpoint.every": 4, "checkpoint.keep": 9, "data.flip": 0.5}
    settings |= {"text_encoders.train": True, "text_encoders.rank": 2}
    settings |= {"text_encoders.new_tokens": [{"token": "picture", "vectors": 2}]}
    settings |= {"optimizer.lora_plus_ratio": 2.0, "lora.max_norm": 0.003}
    settings |= {"ema.decay": 0.9, "ema.post_hoc": True, "ema.every": 4}
    assert trainer.train("one", {**settings, **split(4, 1), "train.steps": 4}) == 0

    script = f"scripts/train_{trainer.architecture}_lora.py"

    def words(name: str) -> list[str]:
        config = tmp_path / f"{name}.yaml"
        config.write_text(config_to_yaml(trainer.config(name, {**settings, **split(1, 2)})))
        return ["--config", str(config)]

    def both(name: str) -> list[Any]:
        """Two processes without a launcher, each with its own exit status."""
        given = words(name)  # once: the second process must not write the file that the first one reads
        return [forked(script, *given, **place) for place in ranks(2, free_port())]

    whole = both("two")
    assert [process.wait() for process in whole] == [0, 0], whole[0].err
    assert_close(trainer, "two", "one", 4)
    assert trainer.metrics("one")[-1]["max_norm/scaled"] > 0
    averages = [
        read_checkpoint(trainer.folder(name) / "checkpoints/step-00000004").load()["averages"]
        for name in ("two", "one")
    ]
    assert all(
        0 < largest_difference(*pair) / RATE < TOLERANCE for pair in zip(*map(dict.values, averages), strict=True)
    )

    # The launcher passes the signal on to both. Its own status is not theirs, so it says little.
    log = tmp_path / "launched.txt"
    launched = accelerate_launch(trainer, [script, *words("pieces")], log)
    try:
        wait_for_step(trainer, "pieces", 2, launched, log)
        launched.send_signal(signal.SIGTERM)
        launched.wait(timeout=240)
    finally:
        launched.kill()  # after a failure; the workers notice that their launcher is gone
    first = stopped_at(log.read_text())
    # None if the second process was faster, and the first one stops because of it.
    assert log.read_text().count("SIGTERM: stopping at the next step boundary") <= 1
    assert 2 < first < steps and trainer.checkpoint("pieces").step == first
    assert len(trainer.metrics("pieces")) == first
    # Without this, the launcher may have started one process, and the rest would prove nothing.
    assert trainer.plan("pieces")["split"] == {"batch_size": 1, "accumulation": 2, "processes": 2}
    assert trainer.plan("pieces")["global_batch_size"] == 4

    # One of the two is asked, and it is not the one that writes.
    main, other = both("pieces")
    wait_for_step(trainer, "pieces", first + 2, main)
    other.send_signal(signal.SIGTERM)
    assert [main.wait(), other.wait()] == [128 + signal.SIGTERM] * 2, main.err
    second = stopped_at(main.out)
    assert "stopping at the next step boundary" not in main.err + other.err  # only the first process announces a stop
    assert first + 2 < second < steps and trainer.checkpoint("pieces").step == second

    last = both("pieces")
    assert [process.wait() for process in last] == [0, 0], last[0].err
    assert f"continuing the run pieces from step {second} of {steps}" in last[0].out
    assert trainer.metrics("pieces") == trainer.metrics("two")
    assert_equal(trainer.adapter("pieces"), trainer.adapter("two"))
    assert_equal(trainer.checkpoint("pieces").load(), trainer.checkpoint("two").load())


def wait_for_step(trainer: Trainer, name: str, step: int, process: Any, log: Path | None = None) -> None:
    """Returns when the run has logged that step."""
    metrics = trainer.folder(name) / "metrics.jsonl"
    while not metrics.exists() or f'"step": {step},' not in metrics.read_text():
        assert process.poll() is None, log.read_text() if log else process.err
        time.sleep(0.005)
