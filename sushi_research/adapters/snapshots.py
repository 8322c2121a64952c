"""Snapshots of a run's averages (`ema.post_hoc`), and the adapter that is made from them: RUN/ema/STEP-LENGTH.safetensors.

Each is an adapter file of its own, as other programs load them. Their tensors depend linearly on what is trained, so the
combination of files is that of the averages.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sushi_research.adapters import averaging
from sushi_research.adapters.averaging import Combination
from sushi_research.adapters.formats.writing import MAGNITUDES
from sushi_research.adapters.kohya_format import add_metadata, problem_of, tensors_hash
from sushi_research.errors import UserError, some
from sushi_research.files import remove, write_atomic
from sushi_research.models.header import read_header
from sushi_research.runs.run_folder import RunFolder

# In the metadata of a file: which average it holds, in words.
AVERAGE = "sushi_research.average"
# Of a reconstruction: the error of its profile, and how many steps were trained when it was made.
ERROR = "sushi_research.average_error"
_NAME = re.compile(r"([0-9]{6,18})-(0\.[0-9]{2})\.safetensors")


@dataclass(frozen=True)
class Snapshot:
    """The power-function average of this length after `step` steps."""

    path: Path
    step: int
    length: float


def path_of(run: RunFolder, step: int, length: str) -> Path:
    """The file of a snapshot; `length` as in its name, such as 0.05."""
    return run.averages / f"{step:06d}-{length}.safetensors"


def snapshots_of(run: RunFolder) -> list[Snapshot]:
    """The snapshots of a run that there are, by step and length."""
    found = [(path, _NAME.fullmatch(path.name)) for path in run.averages.glob("*.safetensors")]
    snapshots = [Snapshot(path, int(match[1]), float(match[2])) for path, match in found if match]
    return sorted(snapshots, key=lambda each: (each.step, each.length))


def cut_back(run: RunFolder, step: int) -> None:
    """Removes the snapshots of steps after `step`, from which the run goes on and makes its own; -1 removes all."""
    for snapshot in snapshots_of(run):
        if snapshot.step > step:
            remove(snapshot.path)


def read(run: RunFolder, step: int | None) -> list[Snapshot]:
    """The whole snapshots up to `step`, by default the last one's. UserError if there are none, or none of that step, or if one
    is damaged."""
    found = snapshots_of(run)
    if not found:
        raise UserError(
            f"{run.path} has no snapshots of averages, which a run keeps in its folder {run.averages.name} with "
            "--ema.post_hoc true: give such a run."
        )
    steps = sorted({each.step for each in found})
    step = steps[-1] if step is None else step
    if step not in steps:
        raise UserError(
            f"{run.averages} has no snapshot of step {step}: give one of {some([str(each) for each in steps], 8)}."
        )
    found = [each for each in found if each.step <= step]
    for each in found:
        if problem := problem_of(each.path):
            raise UserError(f"{problem}: restore it, or remove it (the others give the same average less exactly).")
    return found


def combine(snapshots: Sequence[Snapshot], length: float) -> Combination:
    """How they give the average of this length at the step of the last one. UserError for a length that there is none of."""
    if not averaging.SHORTEST <= length <= averaging.LONGEST:
        raise UserError(
            f"the length {length:g} is not between {averaging.SHORTEST} and {averaging.LONGEST}: the average of all steps alike "
            "has 0.289, and the weights of the last step are the run's adapter itself."
        )
    return averaging.reconstruct([(each.step, each.length) for each in snapshots], snapshots[-1].step, length)


def reconstructed(
    snapshots: Sequence[Snapshot], combinations: Iterable[Combination], dtype: torch.dtype
) -> list[dict[str, torch.Tensor]]:
    """The tensors of an adapter file for each combination, summed in fp64, in `dtype`, but for the magnitudes of a DoRA, which stay
    fp32; each file is read once. UserError if they do not have the same tensors, or if a value overflows in `dtype`."""
    import safetensors.torch

    combinations = list(combinations)
    sums: list[dict[str, torch.Tensor]] = [{} for _ in combinations]
    fixed: dict[str, torch.Tensor] = {}
    for place, snapshot in enumerate(snapshots):
        tensors = safetensors.torch.load_file(snapshot.path)
        parts = {key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}
        alphas = {key: tensor for key, tensor in tensors.items() if key.endswith(".alpha")}
        if place == 0:
            fixed = alphas
            for found in sums:
                found |= {key: torch.zeros(part.shape, dtype=torch.float64) for key, part in parts.items()}
        if parts.keys() != sums[0].keys() or not _are_equal(alphas, fixed):
            raise UserError(
                f"{snapshot.path} and {snapshots[0].path} hold adapters of other settings: remove those of another run."
            )
        for found, combination in zip(sums, combinations, strict=True):
            for key, part in parts.items():
                found[key].add_(part, alpha=combination.factors[place])

    def in_file(key: str, total: torch.Tensor) -> torch.Tensor:
        found = total.to(torch.float32 if key.endswith(MAGNITUDES) else dtype)
        if not found.isfinite().all():
            raise UserError(
                f"the average's {key} has values that {str(dtype).removeprefix('torch.')} cannot hold, in which the run's adapter "
                "is (lora.save_dtype): give a length nearer to those that are kept."
            )
        return found

    return [{key: in_file(key, total) for key, total in found.items()} | fixed for found in sums]


def write(path: Path, tensors: Mapping[str, torch.Tensor], snapshot: Path, entries: Mapping[str, str]) -> None:
    """Writes an adapter file with the metadata of a snapshot, but for `entries`; none if a run has none (lora.metadata)."""
    import safetensors.torch

    metadata = read_header(snapshot).metadata
    write_atomic(path, safetensors.torch.save(dict(tensors)))
    if metadata.keys() > {AVERAGE, "sshs_model_hash", "modelspec.hash_sha256"}:
        digest = tensors_hash(path)
        hashes = {"sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"}
        add_metadata(path, {**metadata, **entries, **hashes})


def _are_equal(some_tensors: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> bool:
    return some_tensors.keys() == others.keys() and all(
        torch.equal(tensor, others[key]) for key, tensor in some_tensors.items()
    )
