"""Decisions by the measures in use, held against the scores: results of pairs, and which length of a recipe is taken."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from demo.study.results import Measured
from sushi_research.reports import best_step, outcome_tests, statistics
from sushi_research.reports.outcome_tests import OUTCOMES, OutcomeTest

OF = 32  # pictures of a score


def score(adapter: Measured) -> float:
    """Share of the concept's pictures that are right, times that of the base's world."""
    return adapter.concept * adapter.kept / OF**2


def pairs_of(adapters: Sequence[Measured]) -> list[tuple[Measured, Measured]]:
    """The pairs of recipes at equal numbers of steps."""
    return [(a, b) for a, b in itertools.combinations(adapters, 2) if a.steps == b.steps]


def by_mse(adapters: Sequence[Measured]) -> list[int]:
    """-1 (the second is better), 1 or 0 for each pair, by the mean squared error alone, after Holm's correction."""
    pairs = pairs_of(adapters)
    differences = [
        statistics.paired_difference(a.learned["mse"][:, None], b.learned["mse"][:, None], pairs=len(pairs))
        for a, b in pairs
    ]
    words = [result.outcome for result in statistics.paired_test_results(differences)]
    return [{"better": -1, "worse": 1}.get(word, 0) for word in words]


LOSSES = ("evaluation", "base_images", "prior")
PICTURES = ("pictures_learned", "pictures_kept")


def by_outcomes(adapters: Sequence[Measured], kinds: Sequence[str]) -> list[str]:
    """The result of each pair (the second adapter's, against the first) as the product gives it from these kinds of results."""
    pairs = pairs_of(adapters)
    differences, owners = [], []
    for number, (a, b) in enumerate(pairs):
        for kind in kinds:
            one, other = (values_of(adapter, kind)[:, None] for adapter in (a, b))
            differences.append(statistics.paired_difference(one, other, pairs=len(pairs) * len(kinds)))
            owners.append((number, kind))
    adjusted = statistics.holm([difference.p_value for difference in differences])
    tests: dict[int, list[OutcomeTest]] = {}
    for (number, kind), difference, p in zip(owners, differences, adjusted, strict=True):
        tests.setdefault(number, []).append(OutcomeTest(OUTCOMES[kind], difference, float(p)))
    bins = ["log, t < 250", "log, t 250 to 499", "log, t 500 to 749", "log, t >= 750"]
    found = []
    for number, (a, b) in enumerate(pairs):
        by_bin = [statistics.paired_difference(a.learned[name][:, None], b.learned[name][:, None]) for name in bins]
        found.append(outcome_tests.pair_result(("B", "A"), tests[number], by_bin).word)
    return found


def values_of(adapter: Measured, kind: str) -> np.ndarray:
    """What the product compares, for each image or prompt."""
    return {
        "evaluation": adapter.learned["log, t >= 750"],
        "base_images": adapter.kept_measures["log, the base's images"],
        "prior": adapter.kept_measures["log, prior images"],
        "pictures_learned": adapter.learned["pictures, distance from the held-out images"],
        "pictures_kept": adapter.kept_measures["pictures, distance from the base's"],
    }[kind]


def pairs_table(studied: dict[str, list[Measured]]) -> list[list[str]]:
    """For each setting and way: pairs with a winner, how often its score is higher and lower, and the other results."""
    words = ["trade-off", "undecided", "not distinguishable"]
    rows = [["setting", "by", "pairs", "one is better", "its score is higher / lower", "by 0.1 or more", *words]]
    for setting, adapters in studied.items():
        pairs = pairs_of(adapters)
        gains = [score(b) - score(a) for a, b in pairs]
        for name, kinds in {"losses": LOSSES, "losses and pictures": LOSSES + PICTURES}.items():
            found = by_outcomes(adapters, kinds)
            signs = {"better": 1, "worse": -1}
            won = [signs[word] * gain for word, gain in zip(found, gains, strict=True) if word in signs]
            counts = Counter(found)
            rows.append(
                [
                    setting,
                    name,
                    str(len(pairs)),
                    str(len(won)),
                    _up_down(won),
                    _up_down(won, 0.1),
                    *(str(counts[w]) for w in words),
                ]
            )
        won = [-sign * gain for sign, gain in zip(by_mse(adapters), gains, strict=True) if sign]
        rows.append(
            [
                setting,
                "mean MSE alone",
                str(len(pairs)),
                str(len(won)),
                _up_down(won),
                _up_down(won, 0.1),
                "-",
                "-",
                str(len(pairs) - len(won)),
            ]
        )
    return rows


def _up_down(gains: Sequence[float], least: float = 1e-9) -> str:
    return f"{sum(gain >= least for gain in gains)} / {sum(gain <= -least for gain in gains)}"


def outcomes_of(lengths: Sequence[Measured]) -> best_step.StepOutcomes:
    """The lengths of one recipe as the product sees a run's evaluations."""
    return best_step.StepOutcomes(
        steps=tuple(adapter.steps for adapter in lengths),
        learned=np.stack([values_of(adapter, "evaluation") for adapter in lengths]),
        kept=np.stack([values_of(adapter, "base_images") for adapter in lengths]),
        prior=np.stack([values_of(adapter, "prior") for adapter in lengths]),
    )


def product_choice(lengths: Sequence[Measured]) -> int:
    """The place of the length that `evaluation.keep_best` keeps."""
    step = best_step.chosen_step(outcomes_of(lengths))
    return [adapter.steps for adapter in lengths].index(step)


# How the length of a recipe is chosen: a function of its lengths in order -> the place of the chosen one.
RULES: dict[str, Callable[[Sequence[Measured]], int]] = {
    "the last": lambda lengths: len(lengths) - 1,
    "lowest mean MSE": lambda lengths: int(np.argmin([a.learned["mse"].mean() for a in lengths])),
    "lowest log loss, t >= 750": lambda lengths: int(np.argmin([a.learned["log, t >= 750"].mean() for a in lengths])),
    "as evaluation.keep_best": product_choice,
}


def lengths_table(studied: dict[str, list[Measured]]) -> list[list[str]]:
    """For each setting and rule: how much score (share of concept x share kept) the chosen length lacks, mean over recipes."""
    rows = [["rule", *(f"{setting}: score lost" for setting in studied)]]
    for name, rule in RULES.items():
        row = [name]
        for adapters in studied.values():
            lost = []
            for recipe in dict.fromkeys(adapter.recipe for adapter in adapters):
                lengths = sorted((a for a in adapters if a.recipe == recipe), key=lambda a: a.steps)
                scores = [score(adapter) for adapter in lengths]
                lost.append(max(scores) - scores[rule(lengths)])
            row.append(f"{np.mean(lost):.3f}")
        rows.append(row)
    return rows
