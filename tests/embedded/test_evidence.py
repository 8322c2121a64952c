"""The findings and the pages of the experiments: of the present records and statistics, and what their words are made from."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from demo.evidence import findings, page
from demo.evidence.questions import EXPERIMENTS, Question
from demo.evidence.study import Study
from demo.evidence.texts import TEXTS
from sushi_research.errors import UserError
from sushi_research.reports.outcome_tests import PairResult
from sushi_research.reports.statistics import Difference


@pytest.fixture(scope="module")
def stored():
    return findings.read()


def test_the_findings_are_of_the_present_records_and_statistics(stored):
    assert stored["inputs"] == findings.hashes(), "python -m demo.evidence findings answers the questions anew"


def test_the_page_is_the_stored_answers_to_all_questions(stored):
    assert findings.PAGE.read_text(encoding="utf-8") == findings.markdown(stored["answers"])
    for experiment in EXPERIMENTS:
        assert [row["question"] for row in stored["answers"][experiment.folder]] == [
            q.text for q in experiment.questions
        ]


def test_every_variant_of_an_experiment_is_a_question():
    for experiment in EXPERIMENTS:
        [name] = {question.study for question in experiment.questions}
        asked = {question.variant for question in experiment.questions}
        assert asked == set(experiment.study(name).variants[1:]), name


def test_questions_between_bases_name_a_score():
    """Their losses are not compared, so by all that was measured they could only be undecided."""
    for experiment in EXPERIMENTS:
        for question in experiment.questions:
            study = experiment.study(question.study)
            of_variant = study.content["variants"][question.variant] or {}
            assert question.score or question.told or "base" not in of_variant.get("model", {}), question.text


def test_every_variant_of_a_page_has_its_words():
    for name, texts in TEXTS.items():
        assert list(texts.variants) == Study.of(name).variants


def test_recorded_pages_are_of_the_records():
    for name in TEXTS:
        study = Study.of(name)
        if study.is_recorded():
            text = (study.folder / f"{name}.md").read_text(encoding="utf-8")
            for variant in study.variants:
                [row] = [line for line in text.splitlines() if line.startswith(f"| {variant} |")]
                shares = [page._share(of_it) for of_it in study.scores(variant).values()]
                assert all(share in row for share in shares)


def test_the_rates_of_the_optimizers_are_the_best_recorded():
    rates = Study.of("optimizers").folder / page.RATES
    if not rates.is_file():
        pytest.skip("no learning rates are recorded yet")
    chosen = {
        each["optimizer"]["name"]: each["optimizer"]["lr"]
        for each in Study.of("optimizers").content["variants"].values()
    }
    assert chosen == page.best_rates()


def test_a_run_that_diverged_is_not_the_best_rate(monkeypatch, tmp_path):
    monkeypatch.setattr(Study, "of", classmethod(lambda cls, name, folder=None: SimpleNamespace(folder=tmp_path)))
    losses = {"lion": {"0.001": None, "0.002": 0.3, "0.004": 0.2}}
    (tmp_path / page.RATES).write_text(json.dumps({"seed": 1, "loss": losses}))
    assert page.best_rates() == {"lion": 0.004}
    assert page.rates_table()[1] == ["lion", "0.001: not finished", "0.002: 0.30000", "**0.004: 0.20000**"]


def test_rates_are_recorded_before_anything_else_of_the_optimizers_is(monkeypatch, tmp_path):
    content = {
        "seeds": [9],
        "variants": {f"lion-{lr:g}": {"optimizer": {"name": "lion", "lr": lr}} for lr in (0.1, 0.2)},
    }
    study = SimpleNamespace(content=content, trained=tmp_path, folder=tmp_path / "docs/optimizers")
    monkeypatch.setattr(Study, "of", classmethod(lambda cls, name, folder=None: study))
    monkeypatch.setattr(page, "last_loss", lambda run: {"lion-0.1-seed9": 0.5, "lion-0.2-seed9": None}[run.name])
    assert page.write_rates() == {"lion": 0.1}
    assert json.loads((study.folder / page.RATES).read_text()) == {
        "seed": 9,
        "loss": {"lion": {"0.1": 0.5, "0.2": None}},
    }


def test_the_loss_of_a_rate_is_that_of_a_finished_run(tmp_path, monkeypatch):
    """A run that diverged has an evaluation too: that of the base, before its first step."""
    (tmp_path / "metrics.jsonl").write_text('{"evaluation/loss": 0.1, "step": 0}\n')
    for record, loss in (({"finished_at": None}, None), ({"finished_at": 4}, 0.1)):
        monkeypatch.setattr(page.RunFolder, "record", lambda self, record=record: record)
        assert page.last_loss(tmp_path) == loss
    monkeypatch.undo()
    with pytest.raises(UserError, match="holds no run"):
        page.last_loss(tmp_path / "none")


def pair(kind: str, value: float, adjusted_p: float) -> tuple[str, SimpleNamespace]:
    difference = Difference(value, 0, value - 0.1, value + 0.1, adjusted_p, 0.05, 4, 0.3, 1, 32, 1, (3, 3), 5)
    word = ("better" if value < 0 else "worse") if adjusted_p <= 0.05 else "not distinguishable"
    return kind, SimpleNamespace(
        difference=difference,
        outcome=SimpleNamespace(outcome=word, adjusted_p=adjusted_p, difference=difference),
        candidate=SimpleNamespace(label="mine"),
        note="",
    )


def test_a_trade_off_within_the_margins_is_no_trap():
    small, large = ({"learned": "better", "kept": word} for word in ("not worse", "worse"))
    labels = [findings.label_of(PairResult("trade-off", "", words=words)) for words in (small, large)]
    assert labels == ["could not be told apart", "trap"]


@pytest.mark.parametrize(
    ("word", "disagreement", "tests", "label", "size"),
    [
        ("better", "", {"evaluation": (-0.2, 0.01), "score kept": (-0.3, 0.04)}, "better", "score kept -0.3"),
        ("better", "", {"evaluation": (-0.2, 0.01), "score kept": (-0.3, 0.4)}, "better", "log loss -0.2"),
        ("worse", "", {"evaluation": (-0.2, 0.001), "score concept": (0.3, 0.04)}, "worse", "score concept +0.3"),
        (
            "worse",
            "Losses disagree",
            {"evaluation": (-0.2, 0.001), "score concept": (0.3, 0.04)},
            "trap",
            "score concept +0.3",
        ),
        ("trade-off", "", {"evaluation": (-0.2, 0.001), "base_images": (0.3, 0.04)}, "trap", "log loss -0.2"),
        (
            "not distinguishable",
            "",
            {"evaluation": (-0.2, 0.9), "score concept": (0.3, 1.0)},
            "could not be told apart",
            "score concept",
        ),
        (
            "undecided",
            "",
            {"evaluation": (-0.2, 0.001), "score concept": (-0.3, 0.04)},
            "could not be told apart",
            "score concept -0.3 (-0.4 to -0.2), p = 0.04; only in part decided: learned better, kept undecided",
        ),
    ],
)
def test_a_label_and_its_number(word, disagreement, tests, label, size):
    """A decided test that says what the result says, pictures first; where nothing is decided, always the same one."""
    pairs = dict(pair(kind, *values) for kind, values in tests.items())
    found = SimpleNamespace(
        learned=[pairs["evaluation"]],
        outcomes={kind: [each] for kind, each in pairs.items()},
        results=[PairResult(word, "", disagreement, {"learned": "better", "kept": "undecided"})],
    )
    answer = findings.answer(found, Question("any", "mine", "Does it help?"))
    assert answer.label == label and answer.size.startswith(size) and answer.tests == 5
