"""What a base in fewer bits costs in loss on the whole base: the answers from the recorded evaluation of all adapters on it.

scripts/evaluate.py measured them (docs/examples/base_storage/base_storage.md). The runs' own losses are over their own bases, which
is why compare_runs.py compares none of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from statistics import mean, stdev

from demo.evidence.answers import BETTER, NO, NOT_TOLD_APART, WORSE, YES, Answer
from demo.evidence.endings import LOSS, lines_of
from demo.evidence.study import Study
from sushi_research.evaluation.outcomes import KEPT_MARGIN, LEARNED_MARGIN
from sushi_research.reports.statistics import LEVEL, t_quantile

STORED = ("int8", "fp8", "nf4")
EVALUATION = "evaluations/evaluation.json"
# What is tested: the name of the value, its unit, its margin.
SIDES = (
    ("evaluation/learned", "log loss on held-out images", LEARNED_MARGIN),
    ("evaluation/prior", "on prior images", KEPT_MARGIN),
)
TESTS = len(STORED) * len(SIDES)


def answers() -> list[Answer]:
    """An answer for each storage, and whether a run's own losses say what nf4 costs."""
    study = Study.of("base_storage")
    content = json.loads((study.folder / EVALUATION).read_text(encoding="utf-8"))["results"]

    def on_the_whole_base(run: str, key: str) -> float:
        return content[run][key]

    def by_itself(run: str, key: str) -> float:
        return next(line[key] for line in reversed(lines_of(study.run(run))) if key in line)

    return [*(_of(study, bits, on_the_whole_base) for bits in STORED), _own_losses(study, by_itself, on_the_whole_base)]


def _of(study: Study, bits: str, value: Callable[[str, str], float]) -> Answer:
    told, signs, within = [], set(), True
    for key, unit, margin in SIDES:
        differences = paired(study, bits, key, value)
        low, high = interval(differences, LEVEL / TESTS)
        signs |= {1} if low > 0 else {-1} if high < 0 else set()
        told.append(f"{unit} {shown(differences)}")
        within &= interval(differences, LEVEL)[1] < margin
    validation = paired(study, bits, LOSS, value)
    of_compute = mean(value(run, LOSS) for run in study.names(study.reference))
    higher = sum(difference > 0 for difference in validation)
    told.append(
        f"validation loss {mean(validation) / of_compute + 0.0:+.2%} (higher in {higher} of {len(validation)} seeds)"
    )
    label = {(1,): WORSE, (-1,): BETTER}.get(tuple(signs), NOT_TOLD_APART)
    end = "; both logs within the margins" if within else ""
    return Answer(f"Does a base in {bits} cost loss on the whole base?", label, ", ".join(told) + end, TESTS)


def _own_losses(
    study: Study, by_itself: Callable[[str, str], float], on_the_whole_base: Callable[[str, str], float]
) -> Answer:
    key = "evaluation/prior"
    own, whole = (paired(study, "nf4", key, value) for value in (by_itself, on_the_whole_base))
    told = f"log loss on prior images by its own losses {shown(own)}, because its base begins worse"
    told += f"; on the whole base {shown(whole)}"
    return Answer("Do a run's own losses say what nf4 costs?", YES if mean(own) * mean(whole) > 0 else NO, told, 0)


def paired(study: Study, bits: str, key: str, value: Callable[[str, str], float]) -> list[float]:
    """The difference of a storage from the reference, for each seed."""
    runs = zip(study.names(bits), study.names(study.reference), strict=True)
    return [value(one, key) - value(other, key) for one, other in runs]


def interval(differences: list[float], level: float) -> tuple[float, float]:
    """Student's interval of the mean over seeds."""
    half = t_quantile(1 - level / 2, len(differences) - 1) * stdev(differences) / math.sqrt(len(differences))
    return mean(differences) - half, mean(differences) + half


def shown(differences: list[float]) -> str:
    """The mean with its 95 % interval."""
    low, high = interval(differences, LEVEL)
    return f"{mean(differences):+.2g} ({low:+.2g} to {high:+.2g})"
