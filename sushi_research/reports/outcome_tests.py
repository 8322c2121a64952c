"""The result of a pair of variants in words, from the tests of its outcomes.

A trained adapter has two sides: what it **learned** of its images, and what it **kept** of what the base knew. Each is measured
by losses over the base's, and, where a run was asked for them, by pictures, which then decide in place of the losses, and by the
user's scores, which lead where they are decided. All tests of all pairs are one family (Holm), so the chance that even one
difference is found that is none is at most 5 %, whatever the number of outcomes. Where an outcome must not be worse, its interval
says so: the 95 % interval of that pair alone ends below the margin, which is wrong of a pair at the margin with a chance of 2.5 %,
whatever the number of pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import numpy as np

from sushi_research.evaluation import outcomes
from sushi_research.evaluation.outcomes import (
    KEPT_MARGIN,
    LEARNED_MARGIN,
    PICTURES_KEPT_MARGIN,
    PICTURES_LEARNED_MARGIN,
)
from sushi_research.reports.curve import Curve
from sushi_research.reports.statistics import LEVEL, Difference

Side = Literal["learned", "kept"]
SIDES: tuple[Side, Side] = ("learned", "kept")
BINS = range(outcomes.BINS)


@dataclass(frozen=True)
class Outcome:
    """A measured quantity, of which less is better; `is_negated` if it was made so by changing its sign.

    `about`: the side that it is evidence of; None: of neither. `margin`: differences up to it do not count as worse; None: there is
    none. `unit` names the quantity in a sentence. `leads`: pictures and scores, which lead over losses.
    """

    name: str
    about: Side | None
    margin: float | None
    unit: str
    leads: bool = False
    is_negated: bool = False


# By the kind of results that it is computed from (reports/curve.py).
OUTCOMES = {
    "evaluation": Outcome("learned", "learned", LEARNED_MARGIN, "log loss"),
    "base_images": Outcome("kept", "kept", KEPT_MARGIN, "log loss on the base's own pictures"),
    "prior": Outcome("kept, prior images", "kept", KEPT_MARGIN, "log loss on prior images"),
    "pictures_learned": Outcome(
        "pictures, learned", "learned", PICTURES_LEARNED_MARGIN, "log distance from the held-out images", True
    ),
    "pictures_kept": Outcome("pictures, kept", "kept", PICTURES_KEPT_MARGIN, "distance from the base's pictures", True),
}


def of_score(name: str, about: Side | None, higher_is_better: bool = False) -> Outcome:
    """The outcome of a user's score. It has no margin."""
    return Outcome(f"score {name}", about, None, f"score {name}", about is not None, higher_is_better)


def values_of(kind: str, curve: Curve) -> np.ndarray | None:
    """What an outcome compares, [T, N, K'] float64: the log of the loss over the base's; of the drift and of the pictures of
    neutral prompts the distance itself, because the base's is 0. None if a timestep bin that is used has no noise samples."""
    if kind in ("drift", "pictures_kept"):
        return curve.loss.astype(np.float64)
    if kind == "evaluation":
        return outcomes.learned(curve.loss, curve.base, curve.timesteps)
    return outcomes.log_ratio(curve.loss, curve.base)


@dataclass(frozen=True)
class OutcomeTest:
    """The test of one outcome of a pair: the candidate's value minus the reference's, and the p-value after Holm's correction."""

    outcome: Outcome
    difference: Difference
    adjusted_p: float

    @property
    def direction(self) -> int:
        """-1 if the candidate's value is lower (better), 1 if it is higher, 0 if the two are not distinguishable."""
        return int(np.sign(self.difference.value)) if self.adjusted_p <= LEVEL else 0

    def word(self, of_reference: bool = False) -> str:
        """ "better", "worse" (by more than the margin), "not worse" (than the margin) or "undecided", of the candidate or the
        reference."""
        _, low, high = self._seen(of_reference)
        direction, margin = -self.direction if of_reference else self.direction, self.outcome.margin
        if direction < 0:
            return "better"
        if direction > 0 and low > (margin or 0.0):
            return "worse"
        return "not worse" if margin is not None and high < margin else "undecided"

    def evidence(self, of_reference: bool = False) -> str:
        """The numbers, as seen from the candidate or the reference; of a score in its own sign."""
        value, low, high = self._seen(of_reference != self.outcome.is_negated)
        d = self.difference
        among = f" alone, {self.adjusted_p:.2g} among {d.pairs} tests" if d.pairs > 1 else ""
        return f"{self.outcome.unit} {value:+.3g}, 95 % interval {low:+.3g} to {high:+.3g}, p = {d.p_value:.2g}{among}"

    def _seen(self, of_reference: bool) -> tuple[float, float, float]:
        d = self.difference
        return (-d.value, -d.high, -d.low) if of_reference else (d.value, d.low, d.high)


@dataclass(frozen=True)
class PairResult:
    """The result of a pair.

    `word`: "better" (the candidate), "worse", "trade-off", "not distinguishable", "undecided" or "identical". `sentence` says it
    with its reasons. `disagreement`: "", or that losses and pictures point in opposite directions. `words`: of the candidate, by
    side.
    """

    word: str
    sentence: str
    disagreement: str = ""
    words: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _SideResult:
    """One side of a pair: the words of candidate and reference, the tests that give them, and the reason why there is none."""

    side: Side
    candidate: str
    reference: str
    tests: tuple[OutcomeTest, ...]
    why: str = ""
    disagreement: str = ""


def pair_result(
    names: tuple[str, str],
    tests: Sequence[OutcomeTest],
    bins: Sequence[Difference | None] = (),
    missing: Mapping[str, str] = MappingProxyType({}),
) -> PairResult:
    """The result of a pair called `names` (candidate, reference).

    `bins`: the difference of the held-out losses in each timestep bin, None without noise samples. `missing`: by side, why nothing
    of the pair is measured.
    """
    candidate, reference = names
    sides = [_side(side, names, tests, bins, missing.get(side, "not measured")) for side in SIDES]
    of_candidate, of_reference = ([getattr(side, who) for side in sides] for who in ("candidate", "reference"))
    disagreement = " ".join(side.disagreement for side in sides if side.disagreement)

    def made(word: str, statement: str, said: str) -> PairResult:
        found = ", ".join(dict.fromkeys(test.difference.scope for test in tests if test.outcome.about))
        scope = f"; it is about {found}" if found else ""
        words = {side.side: side.candidate for side in sides}
        return PairResult(word, f"{statement}: {said}{scope}.", disagreement, words)

    better = _is_better(of_candidate), _is_better(of_reference)
    if better == (True, False):
        return made("better", f"{candidate} is better than {reference}", _told(sides, "it", False))
    if better == (False, True):
        return made("worse", f"{candidate} is worse than {reference}", _told(sides, reference, True))
    if all(better) or any({"better", "worse"} <= set(words) for words in (of_candidate, of_reference)):
        return made("trade-off", f"Trade-off between {candidate} and {reference}", _told(sides, candidate, False))
    withheld = any(side.candidate == "withheld" for side in sides)
    if not withheld and not {"better", "worse"} & {*of_candidate, *of_reference}:
        statement = f"{candidate} is not distinguishable from {reference}"
        return made("not distinguishable", statement, _told(sides, candidate, False))
    flipped = not {"better"} & set(of_candidate) and "better" in of_reference
    told = _told(sides, reference if flipped else candidate, flipped)
    return made("undecided", f"Undecided between {candidate} and {reference}", told)


def _is_better(words: Sequence[str]) -> bool:
    return "better" in words and all(word in ("better", "not worse") for word in words)


def _side(
    side: Side, names: tuple[str, str], tests: Sequence[OutcomeTest], bins: Sequence[Difference | None], missing: str
) -> _SideResult:
    """One side, by the pictures and scores that are decided, else by the pictures, else by the losses.

    Losses decide nothing where pictures are measured: in the study of measures (docs/examples/measure) pictures follow the scores
    on every concept, and losses on some.
    """
    about = [test for test in tests if test.outcome.about == side]
    losses, judged = ([test for test in about if test.outcome.leads is leads] for leads in (False, True))
    decided = [test for test in judged if test.direction]
    opposite = _bins_that_disagree(bins) if side == "learned" and losses else ""
    if decided:
        if len({test.direction for test in decided}) > 1:
            why = f"{' and '.join(test.outcome.name for test in decided)} disagree"
            return _SideResult(side, "withheld", "withheld", tuple(decided), why)
        disagreement = "" if opposite else _disagreement(side, names, losses, decided)
        return _SideResult(side, *_combined(decided), tuple(decided), disagreement=disagreement)
    if pictures := [test for test in judged if test.outcome.margin is not None]:
        return _SideResult(side, *_combined(pictures), tuple(pictures))
    if opposite:
        return _SideResult(side, "withheld", "withheld", tuple(losses), opposite)
    if not losses:
        return _SideResult(side, "not measured", "not measured", (), missing)
    return _SideResult(side, *_combined(losses), tuple(losses))


def _combined(tests: Sequence[OutcomeTest]) -> tuple[str, str]:
    """(word of the candidate, of the reference) from all tests of a side: it must not be worse by any of them."""
    found = []
    for of_reference in (False, True):
        words = [test.word(of_reference) for test in tests]
        found.append(next(word for word in ("worse", "undecided", "better", "not worse") if word in words))
    return found[0], found[1]


def _bins_that_disagree(bins: Sequence[Difference | None]) -> str:
    """Why nothing is said of what was learned: timestep bins whose intervals exclude 0 on different sides; else ""."""
    signs = {number: np.sign(d.value) for number, d in enumerate(bins) if d is not None and d.low * d.high > 0}
    if len(set(signs.values())) < 2:
        return ""
    lower, higher = ([bin_name(number) for number, sign in signs.items() if sign == wanted] for wanted in (-1, 1))
    return f"its loss is lower at {' and '.join(lower)} and higher at {' and '.join(higher)}"


def bin_name(number: int) -> str:
    """The timesteps of a bin, for a sentence."""
    return f"t {250 * number}-{250 * number + 249}"


def _disagreement(
    side: Side, names: tuple[str, str], losses: Sequence[OutcomeTest], decided: Sequence[OutcomeTest]
) -> str:
    """A sentence if decided losses and decided pictures or scores point in opposite directions, else ""."""
    opposite = [(loss, judge) for loss in losses for judge in decided if loss.direction * judge.direction < 0]
    if not opposite:
        return ""
    loss, judge = opposite[0]
    by_loss, by_judge = names if loss.direction < 0 else names[::-1]
    judges = "pictures" if judge.outcome.name.startswith("pictures") else judge.outcome.name
    return (
        f"Losses and {judges} disagree: by the losses {by_loss} {side} more than {by_judge} ({loss.evidence(loss.direction > 0)}), "
        f"by {judges} it is the other way round ({judge.evidence(judge.direction > 0)}); the result follows {judges}."
    )


def _told(sides: Sequence[_SideResult], subject: str, of_reference: bool) -> str:
    """Both sides in words, seen from the candidate or the reference; the decided side first."""
    ordered = sorted(sides, key=lambda side: (side.reference if of_reference else side.candidate) != "better")
    parts = [_clause(side, subject if number == 0 else "it", of_reference) for number, side in enumerate(ordered)]
    return " and ".join(parts)


def _clause(side: _SideResult, subject: str, of_reference: bool) -> str:
    word = side.reference if of_reference else side.candidate
    numbers = "; ".join(test.evidence(of_reference) for test in side.tests)
    margins = {test.outcome.margin for test in side.tests if test.outcome.margin is not None}
    margin = f", margin {max(margins):g}" if margins else ""
    if word == "not measured":
        return f"what {subject} {side.side} is not known ({side.why})"
    if word == "withheld":
        return f"what {subject} {side.side} is withheld, because {side.why} ({numbers})"
    is_less = any(test.direction == (-1 if of_reference else 1) for test in side.tests)
    said = {
        "better": f"{subject} {side.side} more",
        "worse": f"{subject} {side.side} less",
        "not worse": f"{subject} {side.side} {'less, but within the margin' if is_less else 'at least as much, within the margin'}",
        "undecided": f"{subject} {side.side} less, but whether by more than the margin is undecided"
        if is_less
        else f"whether {subject} {side.side} as much is undecided",
    }
    return f"{said[word]} ({numbers}{margin if word != 'better' else ''})"
