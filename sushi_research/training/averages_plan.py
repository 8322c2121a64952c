"""The part of a plan on the averages of the weights (`ema`)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sushi_research.adapters.averaging import KEPT_LENGTHS, mean_age
from sushi_research.config.section import steps_text
from sushi_research.files import size_text
from sushi_research.runs.job import Job
from sushi_research.training.averages import names_of, snapshot_dtype
from sushi_research.training.length import Due
from sushi_research.training.plan_parts import INDENT, how_often


@dataclass(frozen=True)
class AveragesPlan:
    """The averages of a run. `memory` is what they take on the device, in bytes.

    `mean_age` is how many steps old the weights in the exponential average are at the end, on average; None without it. `snapshots`
    is the number of times that both power-function averages are kept, `bytes` what all of these files take; 0 without post_hoc.
    """

    memory: int
    mean_age: float | None
    is_evaluated: bool
    lengths: tuple[float, ...]
    snapshots: int
    often: str
    bytes: int
    file: str

    def to_json(self) -> dict[str, Any]:
        """The part of plan.json."""
        return asdict(self)

    def describe(self) -> list[str]:
        """Lines of the plan."""
        lines = []
        if self.mean_age is not None:
            number = f"{self.mean_age:,.0f}" if self.mean_age >= 100 else f"{self.mean_age:.3g}"
            age, used = steps_text(number), "it" if self.is_evaluated else "the weights themselves"
            lines.append(
                f"exponential, in {self.file}: of weights that are {age} old on average at the end; what is evaluated and sampled: "
                f"{used}"
            )
        if self.snapshots:
            lengths = " and ".join(f"{length:.2f}" for length in self.lengths)
            lines.append(
                f"post-hoc: {self.snapshots} snapshots of lengths {lengths} ({self.often}), {size_text(self.bytes)}; any length "
                "from them: scripts/reconstruct_ema.py"
            )
        lines.append(f"they take {size_text(self.memory)} of memory")
        return [f"{INDENT if number else 'averages     '}{line}" for number, line in enumerate(lines)]


def snapshots_in(job: Job, steps: int, due: Due, after: int = 0) -> int:
    """How often a run of `steps` steps keeps snapshots after step `after`."""
    return due.averages.count(after, steps - 1) + 1 if job.config.ema.post_hoc and after < steps else 0


def snapshot_bytes(job: Job, parameters: int) -> int:
    """What the snapshots of a step take on the disk."""
    return len(KEPT_LENGTHS) * parameters * snapshot_dtype(job.config).itemsize


def plan_of(job: Job, steps: int, due: Due, parameters: int) -> AveragesPlan | None:
    """The averages of a run of `steps` steps with so many trained parameters; None without any."""
    section = job.config.ema
    if not (names := names_of(section)):
        return None
    count, often = snapshots_in(job, steps, due), "at the end only"
    if count > 1:
        assert section.every is not None
        often = f"{how_often(section.every, due.averages)}{'' if due.averages.at(steps) else ', and at the end'}"
    return AveragesPlan(
        memory=4 * parameters * len(names),
        mean_age=None if section.decay is None else mean_age(steps, section.decay),
        is_evaluated=job.config.ema.evaluate,
        lengths=KEPT_LENGTHS if section.post_hoc else (),
        snapshots=count,
        often=often if section.post_hoc else "",
        bytes=count * snapshot_bytes(job, parameters),
        file=f"{job.config.run.name or 'NAME'}_ema.safetensors",
    )
