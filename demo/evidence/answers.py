"""The answer of a question: a label, and the difference that it follows from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from demo.evidence.questions import Question
from demo.evidence.study import Study
from sushi_research.experiments.comparison import SCORE
from sushi_research.experiments.pairs import Pair
from sushi_research.reports.outcome_tests import OUTCOMES, PairResult
from sushi_research.reports.statistics import LEVEL

NOT_RECORDED, NOT_TOLD_APART, NOT_TESTED = "not recorded", "could not be told apart", "not tested"
BETTER, WORSE, SAME, TRADE_OFF, TRAP, DIVERGED = "better", "worse", "the same", "trade-off", "trap", "diverged"
YES, NO, IN_PART = "yes", "no", "in part"
# What is shown where nothing is decided.
FIRST = (f"{SCORE}concept", "evaluation")
# A side of a pair in plain words, by the words of its result.
SAID = {
    "better": "it {side} more",
    "worse": "it {side} less",
    "not worse": "it {side} at least as much, within the margin",
    "undecided": "whether it {side} as much is open",
    "withheld": "what it {side} is not said, because its measures contradict each other",
    "not measured": "what it {side} was not measured",
}


@dataclass(frozen=True)
class Answer:
    """The answer of a question: its label, the test that gives the number, and how many tests were in its family."""

    question: str
    label: str
    size: str
    tests: int


def answer(study: Study, question: Question) -> Answer:
    """The answer of a question from the recorded runs of its experiment."""
    sides = question.variant, question.reference or study.reference
    for side in sides:
        if study.diverged(side):
            return Answer(question.text, DIVERGED, f"{side} {study.said_of_diverged(side)}", 0)
    found = study.comparison
    number = next(n for n, pair in enumerate(found.learned) if (pair.candidate.label, pair.reference.label) == sides)
    pairs = {kind: family[number] for kind, family in found.outcomes.items()}
    return of_pair(question, pairs, found.results[number])


def of_pair(question: Question, pairs: dict[str, Pair], result: PairResult | None) -> Answer:
    """The answer of a question from the tests of its pair, by kind of results, and the pair's result."""
    tested = {kind: pair for kind, pair in pairs.items() if pair.outcome is not None}
    tests = max((pair.outcome.difference.pairs for pair in tested.values()), default=0)
    if question.kind:
        pair = pairs.get(question.kind)
        if pair is None or pair.outcome is None:
            return Answer(question.text, NOT_TESTED, pair.note if pair else f"no run has {question.kind}", tests)
        label = {"better": BETTER, "worse": WORSE}.get(pair.outcome.outcome, NOT_TOLD_APART)
        return Answer(question.text, label, size(question.kind, pair), tests)
    if result is None:
        return Answer(question.text, NOT_TESTED, pairs["evaluation"].note, tests)
    label, kind = label_of(result, loss_is_lower(pairs)), deciding(tested, result)
    told = [size(kind, tested[kind]) if kind else "the same bit for bit"]
    told += [said] if (said := sides_of(result, label)) else []
    if result.disagreement:
        told.append("losses say the opposite")
    return Answer(question.text, label, "; ".join(told), tests)


def loss_is_lower(pairs: dict[str, Pair]) -> bool:
    """Whether the loss of the candidate on held-out images is decidedly lower."""
    outcome = pairs["evaluation"].outcome
    return outcome is not None and outcome.outcome == "better"


def label_of(result: PairResult, loss_is_lower: bool = False) -> str:
    """The label of a pair's result.

    A trap has what looks like a gain, a lower loss on held-out images or more that was learned, and is worse on a side, which is
    more than the margin.
    """
    gains = loss_is_lower or result.words.get("learned") == "better"
    if gains and "worse" in result.words.values():
        return TRAP
    if result.word == "trade-off":
        return NOT_TOLD_APART if is_small(result) else TRADE_OFF
    return {"better": BETTER, "worse": WORSE, "identical": SAME}.get(result.word, NOT_TOLD_APART)


def is_small(result: PairResult) -> bool:
    """Whether a trade-off is one within the margins on both sides."""
    return result.word == "trade-off" and set(result.words.values()) == {"better", "not worse"}


def sides_of(result: PairResult, label: str) -> str:
    """What is to be said of the sides besides the number: of a trap, a trade-off, and of a pair that is decided in part."""
    words = set(result.words.values())
    if is_small(result):
        return "more on one side and less on the other, both within the margin"
    told = " and ".join(SAID[word].format(side=side) for side, word in result.words.items())
    if label in (TRAP, TRADE_OFF):
        return told
    if result.word == "undecided" and words & {"better", "worse"}:
        return f"only in part decided: {told}"
    return told if "withheld" in words else ""


def deciding(tested: dict[str, Pair], result: PairResult) -> str | None:
    """The kind of results whose test gives the number.

    Of those that are decided, one that says what the result says, a score or pictures before losses, with the least p. If none is
    decided, or none of them decides, always the same one, whatever came out: the score of the concept, or else the loss.
    """
    if result.word == "identical":
        return None
    decided = [kind for kind, pair in tested.items() if pair.outcome.adjusted_p <= LEVEL]
    if not decided or result.word == "not distinguishable":
        return next((kind for kind in FIRST if kind in tested), next(iter(tested)))

    def rank(kind: str) -> tuple[bool, bool, float]:
        outcome = tested[kind].outcome
        return outcome.outcome != result.word, not kind.startswith((SCORE, "pictures")), outcome.difference.p_value

    return min(decided, key=rank)


def size(kind: str, pair: Pair) -> str:
    """The difference of a pair in the unit of the kind of results, with its interval and its corrected p-value."""
    d, unit = pair.difference, OUTCOMES[kind].unit if kind in OUTCOMES else kind
    value, p = f"{unit} {d.value + 0.0:+.3g}", f"p = {pair.outcome.adjusted_p:.2g}"
    if kind.startswith(SCORE) and d.low == d.high:
        return f"{value}, {p}; {_why_equal(pair)}: no interval"
    low, high = (f"{end + 0.0:+.3g}" if math.isfinite(end) else "unbounded" for end in (d.low, d.high))
    return f"{value} ({low} to {high}), {p}"


def _why_equal(pair: Pair) -> str:
    """Why a score has no interval: nothing varies."""
    one, other = (np.asarray(side) for side in pair.values)
    if np.ptp(one) == 0 == np.ptp(other) and one.flat[0] == other.flat[0]:
        return "all units equal (score at its limit)"
    return "every unit differs by as much" if pair.difference.value else "no unit differs"
