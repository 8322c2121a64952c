"""The numbers of one optimizer step: summed over its micro-batches and over the processes, then logged."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import Any

import psutil
import torch
from accelerate import Accelerator

from sushi_research.errors import UserError
from sushi_research.training.precision import Masters

_WHAT_TO_DO = (
    "the last checkpoint is whole; look at the files, or begin under another --run.name with a lower optimizer.lr, or with "
    "train.precision bf16 or fp32."
)


class Tally:
    """The sums of one optimizer step over its micro-batches, then over the processes; and what the step's log line says.

    Everything travels with the gradients, in the step's one reduction.
    """

    def __init__(self, device: torch.device, world: int) -> None:
        # the loss; sum and number of samples' plain losses by timestep quarter; stop requests; seconds waited; seconds; and a
        # place for each process's peak memory, because a sum over processes has no maximum
        self._sums = torch.zeros(12 + world, device=device)
        self._seen: list[tuple[tuple[str, ...], torch.Tensor]] = []
        self._began = time.perf_counter()

    def add(self, loss: torch.Tensor, losses: torch.Tensor, quarters: torch.Tensor, names: tuple[str, ...]) -> None:
        """A micro-batch: its share of the loss, its samples' plain losses [B] with their timestep quarters, its files."""
        losses = losses.detach()
        self._sums[0] += loss.detach()
        self._sums[1:5].index_add_(0, quarters, losses)
        self._sums[5:9].index_add_(0, quarters, torch.ones_like(losses))
        self._seen.append((names, losses))

    def reduce(self, masters: Masters, accelerator: Accelerator, *, stop: int, waited: float) -> bool:
        """Sums gradients and tally over the processes, once. True if any process was asked to stop."""
        self._sums[9] = stop
        self._sums[10] = waited
        self._sums[11] = time.perf_counter() - self._began
        self._sums[12 + accelerator.process_index] = peak_memory_gib(self._sums.device)
        sum_over = None if accelerator.num_processes == 1 else lambda flat: accelerator.reduce(flat, "sum")
        # .tolist() waits for the device, so that a NaN or a stop is seen before the optimizer's step.
        self._totals = masters.reduce(sum_over, self._sums).tolist()
        return self._totals[9] > 0

    def require_finite(self, step: int) -> None:
        """Stops the run at a NaN or infinite loss, before it reaches the adapter, naming the files of the micro-batch."""
        if torch.isfinite(torch.tensor(self._totals[:5])).all():
            return
        bad = dict.fromkeys(name for names, losses in self._seen if not losses.isfinite().all() for name in names)
        where = f"with {', '.join(bad)}" if bad else "in another process"
        raise UserError(f"the loss at step {step} is not finite, {where}: {_WHAT_TO_DO}")

    def values(self, step: int, rate: float, norm: float, plan: Mapping[str, Any]) -> dict[str, Any]:
        """The step's log line. Losses are over all processes; `loss` is what was minimised, the quarters are plain MSE.

        `norm` is that of the gradients before clipping. UserError, before anything is saved, where it is not finite: the
        adapter is spoilt then. In fp16 alone it is not, because the loss scaler left the step out.
        """
        is_finite = math.isfinite(norm)
        if not is_finite and plan["dtypes"]["activations"] != "float16":
            raise UserError(f"the gradient at step {step} is not finite: {_WHAT_TO_DO}")
        samples = plan["samples_per_step"]
        seconds = time.perf_counter() - self._began
        quarters = zip(self._totals[1:5], self._totals[5:9], strict=True)
        return {
            "loss": self._totals[0],
            **{f"loss_quarter/{q}": total / count if count else None for q, (total, count) in enumerate(quarters)},
            "lr": rate,
            # fp16: a step whose gradients overflowed has no norm.
            "grad_norm": norm if is_finite else None,
            "epoch": step * samples / plan["items_per_epoch"],
            "samples_seen": step * samples,
            "images_per_second": samples / seconds,
            "data_wait_share": self._totals[10] / max(self._totals[11], 1e-9),
            "peak_memory_gib": max(self._totals[12:]),
        }


def peak_memory_gib(device: torch.device) -> float:
    """The most memory that this process held: of its GPU's allocator, or of the process where there is no GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**30
    import resource  # not there on Windows

    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
