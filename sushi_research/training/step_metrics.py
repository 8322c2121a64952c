"""The metrics of one optimizer step, summed over its micro-batches and over the processes."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import psutil
import torch

from sushi_research.config.sets import sets_of
from sushi_research.errors import NotFinite
from sushi_research.runs.job import Job
from sushi_research.training.master_weights import MasterWeights
from sushi_research.training.run_plan import Plan

_WHAT_TO_DO = (
    "the last checkpoint is intact; check the files, or start a new run (another --run.name) with a lower optimizer.lr, or "
    "with train.precision bf16 or fp32."
)


# By their number in a batch's `roles`.
ROLES = ("train", "regularisation")


class StepMetrics:
    """Sums over the micro-batches of a step, then over the processes. One object per run; call `start()` at each step.

    Only `add` is called inside the training step. It writes into buffers with a fixed address, as a CUDA graph of the step
    requires. The sums are reduced together with the gradients, in the single reduction of the step.
    """

    def __init__(self, job: Job) -> None:
        # [0] loss; [1:5] sum and [5:9] count of the unweighted losses by timestep bin; [9] stop requests; [10] seconds waited for
        # data; [11] seconds; [12] whether the main process has lost its run folder; with regularisation images [13:15] sum and
        # [15:17] count of the unweighted losses by role; then two slots per rank, for peak memory and CPU seconds: we can only
        # all-reduce a sum.
        self._has_roles = any(each.is_regularisation for each in sets_of(job.config))
        self._ranks = 17 if self._has_roles else 13
        self._sums = torch.zeros(self._ranks + 2 * job.world, device=job.device)
        # The unweighted losses of the last micro-batch.
        self._losses = torch.zeros(job.config.train.batch_size, device=job.device)
        self._bins = torch.arange(4, device=job.device)[:, None]
        self._job = job
        # The time that training takes is the device's, which other load on the machine hardly changes. It is read where the step
        # waits for the GPU anyway.
        on_gpu = job.device.type == "cuda"
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_gpu else []
        self.start()

    def start(self) -> None:
        """Begins a step: sets all sums to 0."""
        self._sums.zero_()
        self._micro_batches: list[tuple[tuple[str, ...], torch.Tensor]] = []
        self._started, self._cpu_started = time.perf_counter(), time.process_time()
        if self._events:
            self._events[0].record()

    def buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(the unweighted losses of the last micro-batch, the sums): all that `add` writes to, at addresses that do not change."""
        return self._losses, self._sums

    def add(self, loss: torch.Tensor, losses: torch.Tensor, bins: torch.Tensor) -> None:
        """Adds a micro-batch: its part of the loss, its unweighted losses [B] fp32, and their timestep bins [B] int64."""
        losses = losses.detach()
        self._losses[: len(losses)].copy_(losses)
        self._sums[0] += loss.detach()
        # Not index_add_: with deterministic kernels it may wait for the device, to check the indices, which a recording refuses.
        is_in = bins == self._bins  # [4, B]
        self._sums[1:5] += losses.expand(4, -1).masked_fill(~is_in, 0.0).sum(1)
        self._sums[5:9] += is_in.sum(1)

    def record(self, names: tuple[str, ...], roles: torch.Tensor | None) -> None:
        """Records the file names of the last micro-batch, for the error of `require_finite_loss`, and its losses by role.

        `roles` [B] int64: 1 for regularisation images, 0 for others; None if the run has none.
        """
        losses = self._losses[: len(names)].clone()
        self._micro_batches.append((names, losses))
        if roles is not None:
            self._sums[13:15].index_add_(0, roles, losses)
            self._sums[15:17].index_add_(0, roles, torch.ones_like(losses))

    def sum_over_processes(self, master_weights: MasterWeights, *, stop: int, waited: float) -> bool:
        """Sums the gradients and these metrics over the processes, once per step. True if any process was asked to stop.

        If the run folder was moved, deleted or replaced, all processes end: the main process with a UserError.
        """
        job, accelerator = self._job, self._job.accelerator
        self._sums[9] = stop
        self._sums[10] = waited
        self._sums[11] = time.perf_counter() - self._started
        lost = job.run.lost() if job.run else None
        self._sums[12] = lost is not None
        self._sums[self._ranks + 2 * job.rank] = peak_memory_gib(self._sums.device)
        self._sums[self._ranks + 2 * job.rank + 1] = time.process_time() - self._cpu_started
        self._waited, self._cpu_reduced = waited, time.process_time()
        sum_over = None if job.world == 1 else lambda flat: accelerator.reduce(flat, "sum")
        # .tolist() synchronizes with the device, so a NaN or a stop request is seen before the optimizer's step.
        self._totals = master_weights.reduce(sum_over, self._sums).tolist()
        if self._totals[12] > 0:
            raise lost or SystemExit(2)
        return self._totals[9] > 0

    def require_finite_loss(self, step: int) -> None:
        """Raises NotFinite for a NaN or infinite loss, before it reaches the adapter. Names the files of the micro-batch."""
        if torch.isfinite(torch.tensor(self._totals[:5])).all():
            return
        bad = dict.fromkeys(
            name for names, losses in self._micro_batches if not losses.isfinite().all() for name in names
        )
        where = f"with {', '.join(bad)}" if bad else "in another process"
        raise NotFinite(f"the loss at step {step} is not finite, {where}: {_WHAT_TO_DO}")

    def values(self, plan: Plan, step: int, learning_rate: float, norm: torch.Tensor | float) -> dict[str, Any]:
        """The metrics to log. Losses are over all processes: `loss` is the minimised loss, the losses by bin are without weights.

        `norm` is the gradient norm before clipping, still on the device: reading it waits for the end of the step. Raises
        NotFinite, before anything is saved, if it is not finite: the adapter is then corrupted. In fp16 no error is raised: the
        loss scaler has skipped the step.
        """
        if self._events:
            self._events[1].record()
        norm = float(norm)
        is_finite = math.isfinite(norm)
        if not is_finite and self._job.precision != "fp16":
            raise NotFinite(f"the gradient at step {step} is not finite: {_WHAT_TO_DO}")
        samples = plan.global_batch_size
        seconds = time.perf_counter() - self._started
        bins = zip(self._totals[1:5], self._totals[5:9], strict=True)
        roles = zip(ROLES, self._totals[13:15], self._totals[15:17], strict=True) if self._has_roles else ()
        return {
            "loss": self._totals[0],
            **{f"loss_by_timestep/{q}": total / count if count else None for q, (total, count) in enumerate(bins)},
            **{f"loss_by_role/{role}": total / count if count else None for role, total, count in roles},
            "lr": learning_rate,
            # In fp16, a step with overflowed gradients has no norm.
            "grad_norm": norm if is_finite else None,
            "epoch": step * samples / plan.items_per_epoch,
            "samples_seen": step * samples,
            "images_per_second": samples / seconds,
            **self._device_seconds(),
            "data_wait_share": self._totals[10] / max(self._totals[11], 1e-9),
            "peak_memory_gib": max(self._totals[self._ranks :: 2]),
        }

    def _device_seconds(self) -> dict[str, float]:
        """The step's time on the device: `gpu_seconds`, from its first to its last kernel, or else `cpu_seconds` of all threads.

        Of several processes it is that of the slowest. GPUs wait for each other in the reduction, so this process's time is that of
        all. CPU time until the reduction is the largest of all processes; after it all do the same.
        """
        if not self._events:
            return {"cpu_seconds": max(self._totals[self._ranks + 1 :: 2]) + time.process_time() - self._cpu_reduced}
        # The step began with an idle GPU and with waiting for data.
        return {"gpu_seconds": max(self._events[0].elapsed_time(self._events[1]) / 1000 - self._waited, 0.0)}


def peak_memory_gib(device: torch.device) -> float:
    """The peak memory of this process in GiB: of the GPU allocator, or the resident memory of the process without a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**30
    import resource  # not available on Windows

    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
