"""What a run says at its end: each output with the command that uses it, and what may have gone wrong without an error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from sushi_research.adapters import lora
from sushi_research.adapters.portability import sentences
from sushi_research.config.suggestions import word
from sushi_research.errors import UserError
from sushi_research.runs import records
from sushi_research.runs.job import Job
from sushi_research.terminal import say
from sushi_research.training import best_files
from sushi_research.training.state import TrainState


def tell(job: Job, state: TrainState, seconds: Mapping[str, float], step: int) -> None:
    """Prints the seconds of each stage, what the finished run wrote and how it is used, and warnings."""
    say(
        "",
        f"finished; seconds: {', '.join(f'{name} {value:.1f}' for name, value in seconds.items())}; what the run has:",
    )
    say(*outputs(job))
    for warning in _warnings(job, state, step):
        say(f"warning: {warning}")


def _programs(plan: Path, has_new_tokens: bool) -> list[str]:
    """How programs take the adapter file, and which do not load it as it is, by the run's plan."""
    try:
        not_loaded = records.read_as(plan, records.Plan, "").get("not_loaded") or {}
    except (UserError, OSError):  # the file itself is the same without a plan that can be read
        not_loaded = {}
    way = "docs/new_tokens.md" if has_new_tokens else "load_lora_weights"
    code = "" if "diffusers" in not_loaded else f" (diffusers: {way})"
    places = "models/loras of ComfyUI or models/Lora of A1111 and Forge, or import it in InvokeAI"
    return [f"copy it into {places}{code}", *sentences(not_loaded)]


def outputs(job: Job) -> list[str]:
    """A line for each output of a finished run that is there, followed by how it is used; commands can be pasted into a shell."""
    run, config = job.run, job.config
    assert run is not None
    folder, script = (
        word(str(run.path)),
        f"python scripts/evaluate.py {job.model.NAME} --config {word(str(run.config))}",
    )
    best = list(run.best_adapters().values()) if config.evaluation.keep_best else []
    steps = run.step_adapters()
    images = "" if config.evaluation.held_out or config.evaluation.path else " --data.path FOLDER_OF_OTHER_IMAGES"
    found: list[tuple[str, Path, Sequence[str]]] = [
        (
            "adapter",
            run.adapter,
            (
                *_programs(run.plan, bool(config.text_encoders.new_tokens)),
                f"pictures with it:     python scripts/sample.py --adapters {folder} --prompts 'YOUR PROMPT'",
                f"losses at each scale: {script} --adapters {folder} --lora_scales '[0.5, 0.75, 1.0]'{images}",
            ),
        ),
    ]
    as_well = "used as the finished one is, with --adapters"
    if steps:
        newest = (
            "the adapter of an earlier step" if len(steps) == 1 else f"the newest adapter of {len(steps)} earlier steps"
        )
        found.append(("earlier", steps[max(steps)], (f"{newest}; {as_well} {folder}@{max(steps)}",)))
    if config.ema.decay is not None:
        found.append(("average", run.average, (f"exponential, decay {config.ema.decay}; {as_well} {folder}@ema",)))
    if config.ema.post_hoc:
        lengths = "python scripts/reconstruct_ema.py"
        found.append(("averages", run.averages, (f"the average of another length: {lengths} {folder} --length 0.08",)))
    if best:
        found.append(("best", best[-1], (f"the adapter of the best step; {as_well} {folder}@best",)))
    found += [
        ("page", run.report, ("open it in a browser: samples, curves, settings and images in one file",)),
        ("samples", run.samples / "progress.png", ()),
        ("pictures", run.pictures, ()),
        ("curves", run.curves, ()),
        ("metrics", run.metrics, ()),
        ("losses", run.evaluation, (f"against another run: python scripts/compare_runs.py {folder} OTHER_RUN",)),
    ]
    if config.tracking.tensorboard:
        found.append(("charts", run.path / "tensorboard", (f"tensorboard --logdir {folder}/tensorboard",)))
    if any((run.path / "wandb").glob("offline-run-*")):
        found.append(("W&B", run.path / "wandb", (f"to upload it: wandb sync {folder}/wandb/offline-run-*",)))
    lines = []
    for name, path, uses in found:
        if path.exists():
            lines += [f"  {name:<9} {path}", *(f"            {use}" for use in uses)]
    return [*lines, "a larger --train.steps (or --train.epochs) with the same command trains on from here"]


def _warnings(job: Job, state: TrainState, step: int) -> Iterator[str]:
    """What a finished run may have gone wrong in without an error."""
    if state.skipped_steps:
        yield f"fp16 skipped {state.skipped_steps} of {step} steps, because their gradients overflowed"
    if job.config.evaluation.keep_best:
        if best := best_files.lost(job.run):
            yield f"{best.problem}: the run ends without the adapter of its best step"
        elif not job.run.best_adapters():
            yield "no evaluation after step 0 has finite values, so no step is best and evaluation.keep_best kept no adapter file"
    dtype = job.config.lora.save_dtype
    if lora.is_zero(state.master_weights.named_state(), getattr(torch, dtype)):
        yield (
            f"every second matrix of the adapter is zero in {dtype}, as at the start, so the adapter does not change the base: "
            "train for more steps or with a larger optimizer.lr"
        )
