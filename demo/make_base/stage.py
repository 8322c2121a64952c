"""Code shared by all training stages: a fixed number of steps, regular checkpoints, and random numbers by step."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from sushi_research.errors import UserError


class Stage:
    """The training state of one stage: modules, AdamW with a cosine schedule, a moving average, and the current step.

    All random numbers of a step come from `generator(seed, purpose, step)`, so a resumed stage ends with the same weights as an
    uninterrupted one (on the same machine with the same number of threads).
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        modules: dict[str, torch.nn.Module],
        *,
        steps: int,
        lr: float | dict[str, float],
        decay: float,
        every: int,
    ) -> None:
        # Slow to import, and not needed by code that only uses `pixels` and `psnr`.
        from diffusers.optimization import get_cosine_schedule_with_warmup
        from diffusers.training_utils import EMAModel

        self.folder, self.name, self.modules, self.steps, self.every = folder, name, modules, steps, every
        self.parameters = [p for module in modules.values() for p in module.parameters()]
        groups = [
            {"params": list(module.parameters()), "lr": lr if isinstance(lr, float) else lr[name]}
            for name, module in modules.items()
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, min(200, steps // 10), steps)
        self.average = EMAModel(self.parameters, decay=decay, foreach=True)
        self.step = 0
        self.log: list[dict[str, float]] = []
        self.seconds = 0.0

    @property
    def file(self) -> Path:
        return self.folder / f"{self.name}.pt"

    def restore(self) -> None:
        """Resumes from the stage's checkpoint if there is one."""
        if not self.file.is_file():
            return
        state = torch.load(self.file, weights_only=True)
        if state["steps"] != self.steps:
            raise UserError(
                f"{self.file} is of a stage of {state['steps']} steps, and this one has {self.steps}: remove it to begin anew."
            )
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.average.load_state_dict(state["average"])
        self.step, self.log, self.seconds = state["step"], state["log"], state["seconds"]

    def save(self) -> None:
        """Writes the checkpoint atomically."""
        state = {
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "average": self.average.state_dict(),
            "step": self.step,
            "steps": self.steps,
            "log": self.log,
            "seconds": self.seconds,
        }
        torch.save(state, self.file.with_suffix(".new"))
        os.replace(self.file.with_suffix(".new"), self.file)

    def run(
        self, loss_of: Callable[[int], torch.Tensor], *, main: bool = True, backward: Callable = torch.Tensor.backward
    ) -> None:
        """Trains to the last step. `loss_of(step)` returns the loss of one batch, which it samples with `generator`.

        Every process calls this; only the `main` one saves and reports.
        """
        started, sums = time.perf_counter() - self.seconds, []
        bar = tqdm(
            range(self.step, self.steps),
            initial=self.step,
            total=self.steps,
            desc=self.name,
            disable=not main,
            mininterval=10,
        )
        for step in bar:
            loss = loss_of(step)
            backward(loss)
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.average.step(self.parameters)
            sums.append(loss.item())
            self.step, self.seconds = step + 1, time.perf_counter() - started
            if self.step % self.every == 0 or self.step == self.steps:
                self.log.append({"step": self.step, "loss": float(np.mean(sums)), "seconds": round(self.seconds, 1)})
                bar.set_postfix(loss=f"{np.mean(sums):.4f}")
                sums = []
                if main:
                    self.save()

    def averaged(self) -> None:
        """Copies the moving average into the modules, which the next stage uses."""
        self.average.copy_to(self.parameters)
        for module in self.modules.values():
            module.eval().requires_grad_(False)


def generator(seed: int, *key: int) -> np.random.Generator:
    """A generator of random numbers that depend only on `seed` and `key`."""
    return np.random.default_rng([seed, *key])


def pixels(rows: np.ndarray) -> torch.Tensor:
    """uint8 `(n, height, width, 3)` as float `(n, 3, height, width)` in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(rows)).permute(0, 3, 1, 2).float() / 127.5 - 1


def psnr(picture: torch.Tensor, reference: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1], over all of them together."""
    return float(10 * torch.log10(4 / (picture.clamp(-1, 1) - reference).square().mean()))


def batches(total: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover range(total)."""
    for start in range(0, total, size):
        yield slice(start, start + size)


def write_result(folder: Path, name: str, result: dict[str, Any]) -> None:
    """Writes a stage's measured results as JSON; the model card uses them."""
    (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(name, json.dumps({key: value for key, value in result.items() if key != "log"}), flush=True)
