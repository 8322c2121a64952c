"""docs/findings.md: every question that an experiment of this repository asked, with its answer, from the recorded runs.

docs/findings.json keeps the answers with the hashes of what they follow from, so that a test sees when they are out of date.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from demo.evidence.questions import EXPERIMENTS, Experiment, Question
from demo.records import ROOT
from sushi_research.experiments.comparison import SCORE, Comparison
from sushi_research.experiments.pairs import Pair
from sushi_research.files import write_atomic, write_json
from sushi_research.reports import page
from sushi_research.reports.outcome_tests import OUTCOMES, PairResult
from sushi_research.reports.page import Block
from sushi_research.reports.statistics import LEVEL

PAGE, ANSWERS = ROOT / "docs/findings.md", ROOT / "docs/findings.json"
NOT_RECORDED, NOT_TOLD_APART = "not recorded", "could not be told apart"
# What is shown where nothing is decided.
FIRST = (f"{SCORE}concept", "evaluation")
# What decides the answers besides the records.
CODE = (
    "reports/statistics.py",
    "reports/score_statistics.py",
    "reports/outcome_tests.py",
    "experiments/comparison.py",
    "experiments/pairs.py",
)
LEAD = (
    "Every question that an experiment of this repository asked, with its answer. All of them were asked on the tiny embedded "
    "bases ([demo.md](demo.md)), most with three seeds: an effect on SDXL may differ in size and in sign. They show that an "
    "option does what it says, where it can do harm, and how an experiment of your own is made "
    "([experiments.md](experiments.md)).",
    "`python -m demo.evidence findings` writes this page from the records of the runs (`docs/examples/*/runs`), by the "
    "statistics of today.",
)
LABELS = (
    "**better**, **worse**: than the reference, by the rules of [experiments.md](experiments.md#the-test-result): more of what "
    "was to be learned or of what the base knew, and of neither less than the margin. Of a question that names one score, by "
    "that score.",
    f"**{NOT_TOLD_APART}**: no difference was shown that decides. It does not mean equal; the interval says how large a "
    "difference may be. Where one side is decided and the other is not (whether it learned or kept as much is open), the row says "
    "so.",
    "**trap**: what looks better by one number is worse by another. It gains on one side and loses on the other, by more than "
    "the margin on one of them at least, or losses say the opposite of pictures and scores.",
    f"**{NOT_RECORDED}**: the experiment is there, and its runs are not recorded yet.",
)
CARE = (
    "**Multiplicity.** Within an experiment all tests of all pairs are one family (Holm): the chance that even one difference "
    "in it is none is at most 5 %. Across the {experiments} experiments nothing is corrected. There are {tests} tests in "
    "{questions} questions, so with nothing but equal variants one experiment in twenty would still name a difference.",
    "**Selection.** Learning rates were chosen by the validation loss of one run each, with a seed that the experiment does "
    "not have, on the same held-out pictures: whatever was chosen so looks a little better than it is. Lengths of the "
    "trainings were chosen so that the reference is right in about half of the pictures. Two data sets of the experiments on "
    "captions and masks were given up after pilots (data.md says which). And where several measures of a pair are decided, the "
    "number is that of the one with the smallest p-value, so it is rather too large than too small.",
    "**The reference** is one recipe. That an option is no better than it here does not say what it does on another base, with "
    "another length or with other data.",
    "**Numbers** are the difference from the reference in the unit that is named, with the 95 % interval of that pair alone, "
    "and the p-value after Holm's correction. Of losses less is better, of scores more, unless the score is an error.",
)


@dataclass(frozen=True)
class Answer:
    """The answer of a question: its label, the test that gives the number, and how many tests were in its family."""

    question: str
    label: str
    size: str
    tests: int


def answers(experiment: Experiment) -> list[Answer]:
    """The answers of an experiment; `NOT_RECORDED` where its runs are not."""
    [name] = {question.study for question in experiment.questions}
    study = experiment.study(name)
    if not study.is_recorded():
        return [Answer(question.text, NOT_RECORDED, "", 0) for question in experiment.questions]
    return [answer(study.comparison, question) for question in experiment.questions]


def answer(found: Comparison, question: Question) -> Answer:
    """The answer of one question from the comparison of its experiment."""
    number = next(n for n, pair in enumerate(found.learned) if pair.candidate.label == question.variant)
    pairs = {kind: family[number] for kind, family in found.outcomes.items()}
    tested = {kind: pair for kind, pair in pairs.items() if pair.outcome is not None}
    tests = max((pair.outcome.difference.pairs for pair in tested.values()), default=0)
    if question.told is not None:
        return Answer(question.text, *question.told, tests)
    if question.score:
        pair = tested[SCORE + question.score]
        label = {"better": "better", "worse": "worse"}.get(pair.outcome.outcome, NOT_TOLD_APART)
        return Answer(question.text, label, size(SCORE + question.score, pair), tests)
    result = found.results[number]
    if result is None:
        return Answer(question.text, NOT_TOLD_APART, pairs["evaluation"].note, tests)
    kind = deciding(tested, result)
    told = size(kind, tested[kind]) if kind else "the same bit for bit"
    if is_small(result):
        told += "; more on one side and less on the other, both within the margin"
    if result.word == "undecided":
        told += "; only in part decided: " + ", ".join(f"{side} {word}" for side, word in result.words.items())
    return Answer(question.text, label_of(result), told, tests)


def label_of(result: PairResult) -> str:
    """The label of a pair's result."""
    if result.disagreement or (result.word == "trade-off" and not is_small(result)):
        return "trap"
    return {"better": "better", "worse": "worse", "identical": "the same"}.get(result.word, NOT_TOLD_APART)


def is_small(result: PairResult) -> bool:
    """Whether a trade-off is one within the margins on both sides."""
    return result.word == "trade-off" and set(result.words.values()) == {"better", "not worse"}


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
    low, high = (f"{end + 0.0:+.3g}" if math.isfinite(end) else "unbounded" for end in (d.low, d.high))
    return f"{unit} {d.value + 0.0:+.3g} ({low} to {high}), p = {pair.outcome.adjusted_p:.2g}"


def hashes() -> dict[str, str]:
    """SHA-256 of the code that decides, and of the records of each experiment."""
    found = {name: _hash([ROOT / "sushi_research" / name]) for name in CODE}
    for experiment in EXPERIMENTS:
        [name] = {question.study for question in experiment.questions}
        files = [path for run in experiment.study(name).records() for path in run.glob("*") if path.is_file()]
        found[experiment.folder] = _hash(sorted(files))
    return found


def _hash(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.parent.name}/{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def write() -> None:
    """Answers the questions anew, and writes findings.json and findings.md."""
    found = {experiment.folder: [asdict(each) for each in answers(experiment)] for experiment in EXPERIMENTS}
    write_json(ANSWERS, {"inputs": hashes(), "answers": found})
    write_atomic(PAGE, markdown(found).encode())


def markdown(found: dict[str, list[dict[str, Any]]]) -> str:
    """The page, from the answers by experiment."""
    recorded = [rows for rows in found.values() if any(row["label"] != NOT_RECORDED for row in rows)]
    tests = sum(max(row["tests"] for row in rows) for rows in recorded)
    care = [text.format(experiments=len(recorded), tests=tests, questions=sum(map(len, recorded))) for text in CARE]
    blocks = [Block("title", "Findings"), *(Block("text", text) for text in LEAD), Block("list", items=list(LABELS))]
    for experiment in EXPERIMENTS:
        [name] = {question.study for question in experiment.questions}
        rows = [["question", "answer", "difference from the reference"]]
        rows += [[row["question"], f"**{row['label']}**", row["size"]] for row in found[experiment.folder]]
        where = f"[page](examples/{experiment.page})"
        if all(row["label"] == NOT_RECORDED for row in found[experiment.folder]):
            where = "no page yet"
        blocks += [
            Block("heading", experiment.title),
            Block("text", f"`make experiment EXP=configs/experiments/{name}.yaml`, {where}."),
            Block("table", rows=rows),
        ]
    blocks += [Block("heading", "How sure that is"), Block("list", items=care)]
    return page.to_markdown(blocks)


def read() -> dict[str, Any]:
    """The stored answers."""
    return json.loads(ANSWERS.read_text(encoding="utf-8"))
