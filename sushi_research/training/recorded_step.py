"""Prepares how micro-batches run: recorded or eager. On a GPU the largest one is tried before the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sushi_research.fast.batch import Batch
from sushi_research.fast.decision import MOST_SHAPES, StepPath, decide
from sushi_research.fast.graphs import CudaGraphs
from sushi_research.fast.recording import Graphs, Recorder, StepBuffers
from sushi_research.runs import provenance
from sushi_research.runs.job import Job
from sushi_research.terminal import say
from sushi_research.training.loader import Loader
from sushi_research.training.master_weights import MasterWeights
from sushi_research.training.resume import RunState
from sushi_research.training.step_metrics import StepMetrics

# The outcomes of the trial, from good to bad: the worst of all processes counts.
FITS, UNRECORDED, TOO_LARGE = range(3)


def prepare(
    job: Job,
    run_state: RunState,
    micro_batch: Callable[[Batch], None],
    *,
    unet: Any,
    master_weights: MasterWeights,
    metrics: StepMetrics,
    loader: Loader,
) -> Recorder:
    """What runs the micro-batches of the run, recorded where the settings and the device allow (`decide`).

    On a GPU, the largest micro-batch is run first and undone, so that a step that does not fit ends the run before it begins.
    One that cannot be recorded makes the whole run eager, and a line says why. The path is noted in provenance.json, with a warning
    if it is not that of the launch before. Raises torch.OutOfMemoryError if the largest micro-batch does not fit.
    """
    path = decide(job.config, job.device)
    losses, sums = metrics.buffers()
    frozen = [unet.conv_in.weight, unet.conv_out.weight]
    places = [each.data_ptr() for each in frozen]

    def require_in_place() -> None:
        master_weights.require_in_place()
        assert [each.data_ptr() for each in frozen] == places, "the UNet was moved after its step was recorded"

    buffers = StepBuffers(
        gradients=[flat.grad for flat in master_weights.flat_parameters()],
        losses=losses,
        others=[sums],
        discard=master_weights.discard,
        require_in_place=require_in_place,
    )
    graphs = make_graphs(job.device, buffers)
    recorder = Recorder(
        micro_batch,
        buffers,
        graphs,
        wait=loader.wait_for_prefetch,
        say=say,
        most=MOST_SHAPES if path.is_recorded else 0,
    )
    if graphs is not None and (largest := loader.largest(run_state.step)) is not None:
        job.timings.enter("trying the largest micro-batch")
        path = try_out(job, recorder, largest, path)
    note(job, run_state, path)
    return recorder


def make_graphs(device: torch.device, buffers: StepBuffers) -> Graphs | None:
    """What makes recordings on the device; None where there are none. Tests put a stand-in here, which needs the buffers."""
    return CudaGraphs(device) if device.type == "cuda" else None


def try_out(job: Job, recorder: Recorder, largest: Batch, path: StepPath) -> StepPath:
    """Tries the largest micro-batch in all processes. Returns the path that all of them can take."""
    job.scaler.scale(torch.zeros((), device=job.device))  # makes its scale, which must be there before a recording
    outcome, why, error = FITS, None, None
    try:
        why = recorder.try_out(largest)
        outcome = FITS if why is None else UNRECORDED
    except torch.OutOfMemoryError as found:
        outcome, error = TOO_LARGE, found
    if job.world > 1:
        mine = torch.zeros(job.world, device=job.device)
        mine[job.rank] = outcome
        outcome = int(job.accelerator.reduce(mine, "sum").max())
    if error is not None:
        raise error
    if outcome == TOO_LARGE:
        raise SystemExit(2)  # the process that ran out of memory says so
    if outcome == FITS:
        return path
    recorder.stop()
    why = why or "another process cannot record it"
    job.say(
        f"the step is not recorded ({why}): it runs as Python launches it, with the same result (docs/fast_step.md)"
    )
    return StepPath("eager", why)


def note(job: Job, run_state: RunState, path: StepPath) -> None:
    """Writes the path to this launch's entry in provenance.json, and warns if it is not that of the launch before."""
    run_state.provenance["step_path"] = path.name
    if job.run is None or not job.is_main:
        return
    *earlier, entry = provenance.entries(job.run.provenance)
    provenance.replace_last(job.run.provenance, entry | {"step_path": path.name})
    launches = provenance.launches(earlier, run_state.step) if run_state.step else []
    for sentence in provenance.path_changes(launches[-1] if launches else None, path.name):
        job.say(f"warning: {sentence}")
