"""Run folders that no training made: with losses, settings and pictures as a test wants them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sushi_research.evaluation.results import Results
from sushi_research.runs.run_folder import FORMAT

IMAGES, NOISE_SAMPLES, GLOBAL_BATCH_SIZE = 12, 8, 4


@dataclass(frozen=True)
class FakeValidationSet:
    """N images x K noise samples, stratified."""

    names: tuple[str, ...] = tuple(f"image{number}" for number in range(IMAGES))
    noise_samples: int = NOISE_SAMPLES
    hash: str = "set-hash"

    def timesteps(self) -> np.ndarray:
        return np.tile((np.arange(self.noise_samples) * 1000 + 500) // self.noise_samples, (len(self.names), 1))


def base_loss(val_set: FakeValidationSet) -> np.ndarray:
    """[N, K]: images and timesteps differ much, as they do."""
    rng = np.random.default_rng(0)
    return 0.2 + 0.1 * rng.random((len(val_set.names), 1)) + 0.3 * rng.random((1, val_set.noise_samples))


def losses(val_set: FakeValidationSet, gain: float, seed: int | list[int], noise: float = 0.002) -> np.ndarray:
    """The base's losses, lower by `gain` on the mean, with an effect of the run on each image."""
    rng = np.random.default_rng([*np.atleast_1d(seed), 1])
    return base_loss(val_set) - gain + noise * rng.standard_normal((len(val_set.names), 1))


def fake_run(
    folder: Path,
    gain: float = 0.05,
    *,
    seed: int = 0,
    noise_seed: int | None = None,
    noise: float = 0.002,
    steps: tuple[int, ...] = (0, 10, 20),
    rank: int = 8,
    val_set: FakeValidationSet = FakeValidationSet(),  # noqa: B008
    rate: float = 8.0,
    finished: bool = True,
    entry: dict[str, Any] | None = None,
    pictures: bool = False,
    times: dict[str, float] | None = None,
    kept: float | None = 0.0,
) -> Path:
    """A finished run whose loss falls linearly to `gain` below the base's. `times` are further keys of a step's line.

    `kept`: how far its loss on the base's own pictures rises above the base's; None: not measured, as by older versions.
    """
    folder.mkdir(parents=True)
    identity = {
        "train.seed": seed,
        "lora.rank": rank,
        "facts.global_batch_size": GLOBAL_BATCH_SIZE,
        "facts.base_model.unet": "unet",
    }
    record = {"format": FORMAT, "steps": steps[-1], "finished_at": steps[-1] if finished else None, "wandb_id": "w"}
    (folder / "run.json").write_text(json.dumps(record | {"identity": identity}))
    (folder / "plan.json").write_text(json.dumps({"global_batch_size": GLOBAL_BATCH_SIZE}))
    settings = {"lora": {"rank": rank}, "train": {"seed": seed, "batch_size": 1}, "run": {"name": folder.name}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    known = {
        "code": {"commit": "c" * 40, "dirty": False},
        "libraries": {"torch": "2"},
        "base": {"unet": "unet"},
        "device": "a CPU",
        "world": 1,
        "precision": "fp32",
        "random_scheme": 1,
    }
    (folder / "provenance.json").write_text(json.dumps([known | (entry or {})]))
    lines = [
        {"step": step, "loss": 0.1, "images_per_second": rate, "data_wait_share": 0.01, "peak_memory_gib": 1.5}
        | (times or {})
        for step in range(1, steps[-1] + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results, base = Results(folder / "evaluation.parquet"), base_loss(val_set)
    last = losses(val_set, gain, seed if noise_seed is None else noise_seed, noise)
    for step in steps:
        share = step / steps[-1]
        results.append(val_set, step, (1 - share) * base + share * last, base)
    if kept is not None:
        own = FakeValidationSet(tuple(f"caption {number}" for number in range(IMAGES)), NOISE_SAMPLES, "base-images")
        results, base = Results(folder / "base_images.parquet"), base_loss(own)
        last = losses(own, -kept, [seed if noise_seed is None else noise_seed, 2], noise)
        for step in steps:
            share = step / steps[-1]
            results.append(own, step, (1 - share) * base + share * last, base)
    if pictures:
        for step in (0, steps[-1]):
            place = folder / f"samples/step-{step:08d}"
            place.mkdir(parents=True)
            described = PngInfo()
            described.add_text("prompt", "a cat")
            Image.new("RGB", (16, 16), (step * 10, 90, 90)).save(place / "00-seed0.png", pnginfo=described)
    return folder
