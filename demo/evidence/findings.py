"""docs/findings.md: every question that an experiment of this repository asked, with its answer, from the recorded runs.

docs/findings.json keeps the answers with the hashes of what they follow from, so that a test sees when they are out of date.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from demo.evidence import measures, storage
from demo.evidence.answers import NOT_RECORDED, Answer, answer
from demo.evidence.findings_text import CARE, LABELS, LEAD, MEASURES, STORAGE
from demo.evidence.questions import EXPERIMENTS, Experiment
from demo.evidence.study import Study
from demo.records import ROOT, input_hash
from demo.study.results import FOLDER as STUDY
from sushi_research.files import write_atomic, write_json
from sushi_research.reports import page
from sushi_research.reports.page import Block

PAGE, ANSWERS = ROOT / "docs/findings.md", ROOT / "docs/findings.json"
# What decides the answers besides the records: the statistics, and what makes answers of them.
CODE = (
    *(f"sushi_research/reports/{name}.py" for name in ("curve", "outcome_tests", "score_statistics", "statistics")),
    *(f"sushi_research/experiments/{name}.py" for name in ("comparison", "pairs", "seeds", "variants")),
    "sushi_research/evaluation/outcomes.py",
    *(
        f"demo/evidence/{name}.py"
        for name in ("answers", "compared", "endings", "findings", "measures", "questions", "storage", "study")
    ),
    *(f"demo/study/{name}.py" for name in ("analysis", "choices", "page", "results")),
)


@dataclass(frozen=True)
class Further:
    """Answers that follow from other records than runs of variants. `files`: these records; `about`: what they are."""

    title: str
    about: str
    files: Callable[[], Iterable[Path]]
    answers: Callable[[], list[Answer]]


FURTHER = {
    "base_storage/evaluations": Further(
        "The base in fewer bits: losses on the whole base",
        *STORAGE,
        lambda: [Study.of("base_storage").folder / storage.EVALUATION],
        storage.answers,
    ),
    "measure": Further(
        "Losses and distances as measures of pictures",
        *MEASURES,
        lambda: (path for path in STUDY.glob("*.json") if path.name != "inputs.json"),
        measures.answers,
    ),
}


def answers(experiment: Experiment) -> list[Answer]:
    """The answers of an experiment; `NOT_RECORDED` where its runs are not."""
    study = experiment.study
    if not study.is_recorded():
        return [Answer(question.text, NOT_RECORDED, "", 0) for question in experiment.questions]
    return [answer(study, question) for question in experiment.questions]


def of_reference(study: Study) -> str:
    """The scores of the reference, the mean of its runs; "" without them."""
    scores = study.scores(study.reference) if study.is_recorded() else {}
    told = [f"{name} {mean(of_it):.2f}" for name, of_it in scores.items() if None not in of_it]
    return f"Scores of the reference, `{study.reference}`: {', '.join(told)}." if told else ""


def hashes() -> dict[str, str]:
    """SHA-256 of the code that decides, and of the records of each experiment."""
    found = {name: input_hash(ROOT / name) for name in CODE}
    for experiment in EXPERIMENTS:
        files = [path for run in experiment.study.records() for path in run.glob("*") if path.is_file()]
        found[experiment.folder] = _hash(sorted(files))
    return found | {folder: _hash(sorted(further.files())) for folder, further in FURTHER.items()}


def _hash(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.parent.name}/{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def write() -> None:
    """Answers the questions anew, and writes findings.json and findings.md. UserError for records that cannot be compared."""
    found = {experiment.folder: [asdict(each) for each in answers(experiment)] for experiment in EXPERIMENTS}
    found |= {folder: [asdict(each) for each in further.answers()] for folder, further in FURTHER.items()}
    references = {experiment.folder: of_reference(experiment.study) for experiment in EXPERIMENTS}
    write_json(ANSWERS, {"inputs": hashes(), "answers": found, "references": references})
    write_atomic(PAGE, markdown(found, references).encode())


def markdown(found: dict[str, list[dict[str, Any]]], references: dict[str, str]) -> str:
    """The page, from the answers by experiment."""
    recorded = [
        found[experiment.folder]
        for experiment in EXPERIMENTS
        if any(row["label"] != NOT_RECORDED for row in found[experiment.folder])
    ]
    tests = sum(max(row["tests"] for row in rows) for rows in recorded)
    numbers = {"experiments": len(recorded), "tests": tests, "questions": sum(map(len, recorded))}
    care = [text.format(**numbers, storage=storage.TESTS) for text in CARE]
    blocks = [Block("title", "Findings"), *(Block("text", text) for text in LEAD), Block("list", items=list(LABELS))]
    for experiment in EXPERIMENTS:
        rows = found[experiment.folder]
        where = f"[page](examples/{experiment.page})" if rows in recorded else "no page yet"
        about = f"`make experiment EXP=configs/experiments/{experiment.name}.yaml`, {where}. {experiment.chosen}"
        blocks += _section(experiment.title, f"{about} {references[experiment.folder]}".strip(), rows)
    for folder, further in FURTHER.items():
        blocks += _section(further.title, further.about, found[folder])
    blocks += [Block("heading", "How sure that is"), Block("list", items=care)]
    return page.to_markdown(blocks)


def _section(title: str, about: str, rows: list[dict[str, Any]]) -> list[Block]:
    table = [["question", "answer", "difference from the reference"]]
    table += [[row["question"], f"**{row['label']}**", row["size"]] for row in rows]
    return [Block("heading", title), Block("text", about), Block("table", rows=table)]


def read() -> dict[str, Any]:
    """The stored answers."""
    return json.loads(ANSWERS.read_text(encoding="utf-8"))
