"""The findings and the pages of the experiments: of the present records and statistics, and what their words are made from."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from demo.evidence import answers, endings, findings, page, rates, storage
from demo.evidence.answers import Answer
from demo.evidence.questions import EXPERIMENTS, Question
from demo.evidence.study import FURTHER_PAIRS, Study
from demo.evidence.texts import TEXTS, Texts
from demo.records import ROOT
from sushi_research.errors import UserError
from sushi_research.reports.outcome_tests import PairResult
from sushi_research.reports.statistics import Difference

NOT_FINITE = "exit status 2: the loss at step 7 is not finite, with cat.png: lower optimizer.lr"


@pytest.fixture(scope="module")
def stored():
    return findings.read()


def test_the_findings_are_of_the_present_records_and_statistics(stored):
    assert stored["inputs"] == findings.hashes(), "python -m demo.evidence findings answers the questions anew"


def test_the_page_is_the_stored_answers_to_all_questions(stored):
    assert findings.PAGE.read_text(encoding="utf-8") == findings.markdown(stored["answers"], stored["references"])
    for experiment in EXPERIMENTS:
        assert [row["question"] for row in stored["answers"][experiment.folder]] == [
            q.text for q in experiment.questions
        ]


def test_every_pair_of_an_experiment_is_a_question():
    for experiment in EXPERIMENTS:
        asked = {(question.variant, question.reference) for question in experiment.questions}
        pairs = {(variant, "") for variant in experiment.study.variants[1:]}
        assert asked == pairs | set(FURTHER_PAIRS.get(experiment.name, ())), experiment.name


def test_questions_between_bases_name_a_score():
    """Their losses are not compared, so by all that was measured they could only be undecided."""
    for experiment in EXPERIMENTS:
        variants = experiment.study.content["variants"]
        for question in experiment.questions:
            sides = (variants[name] or {} for name in (question.variant, question.reference) if name)
            bases = {side.get("model", {}).get("base") for side in sides}
            assert question.score or bases == {None} or question.reference and len(bases) == 1, question.text


def test_every_variant_of_a_page_has_its_words():
    for name, texts in TEXTS.items():
        assert list(texts.variants) == Study.of(name).variants


def test_recorded_pages_are_of_the_records():
    for name in TEXTS:
        study = Study.of(name)
        if study.is_recorded():
            text = (study.folder / f"{name}.md").read_text(encoding="utf-8")
            for variant in study.variants:
                # The first: the page of the optimizers has their learning rates too.
                row = next(line for line in text.splitlines() if line.startswith(f"| {variant} |"))
                assert all(page.share(of_it) in row for of_it in study.scores(variant).values())


def test_the_rates_of_the_optimizers_are_the_best_recorded():
    if not (Study.of("optimizers").folder / rates.RATES).is_file():
        pytest.skip("no learning rates are recorded yet")
    variants = Study.of("optimizers").content["variants"].values()
    assert {each["optimizer"]["name"]: each["optimizer"]["lr"] for each in variants} == rates.best(rates.read()["loss"])


def test_a_rate_that_diverged_is_not_the_best_and_one_must_not_have(monkeypatch, tmp_path):
    monkeypatch.setattr(Study, "of", classmethod(lambda cls, name, folder=None: SimpleNamespace(folder=tmp_path)))
    with pytest.raises(UserError, match="evidence rates"):
        rates.read()
    losses = {"lion": {"0.001": float("nan"), "0.002": 0.3, "0.004": 0.2}, "muon": {"0.1": None, "0.2": 0.4}}
    (tmp_path / rates.RATES).write_text(json.dumps({"seed": 1, "loss": losses}))
    assert rates.best(losses) == {"lion": 0.004, "muon": 0.2}
    assert rates.table()[1] == ["lion", "0.001: diverged", "0.002: 0.30000", "**0.004: 0.20000**"]
    assert rates.table()[2] == ["muon", "0.1: diverged", "**0.2: 0.40000**", ""]
    with pytest.raises(UserError, match="no run of came"):
        rates.best({"came": {"0.1": None, "0.2": None}})


def test_rates_are_recorded_before_anything_else_of_the_optimizers_is(monkeypatch, tmp_path):
    content = {
        "seeds": [9],
        "variants": {f"lion-{lr:g}": {"optimizer": {"name": "lion", "lr": lr}} for lr in (0.1, 0.2)},
    }
    study = SimpleNamespace(content=content, trained=tmp_path, folder=tmp_path / "docs/optimizers")
    monkeypatch.setattr(Study, "of", classmethod(lambda cls, name, folder=None: study))
    monkeypatch.setattr(rates, "last_loss", lambda run: {"lion-0.1-seed9": 0.5, "lion-0.2-seed9": None}[run.name])
    assert rates.write() == {"lion": 0.1}
    assert json.loads((study.folder / rates.RATES).read_text()) == {
        "seed": 9,
        "loss": {"lion": {"0.1": 0.5, "0.2": None}},
    }


def test_the_loss_of_a_rate_is_that_of_a_run_that_has_ended(tmp_path, monkeypatch):
    """A run that diverged has an evaluation too: that of the base, before its first step."""
    run, launch = tmp_path / "lion", tmp_path / "logs/lion.json"
    run.mkdir()
    launch.parent.mkdir()
    (run / "metrics.jsonl").write_text('{"evaluation/loss": 0.1, "step": 0}\n')
    cases = [
        ({"finished_at": 4}, "", 0.1),
        ({"finished_at": None}, NOT_FINITE, None),
        ({"finished_at": None}, "signal 9", "has not finished"),
        (None, "", "holds no run"),
    ]
    for record, reason, loss in cases:
        monkeypatch.setattr(endings.RunFolder, "record", lambda self, record=record: record)
        launch.write_text(json.dumps({"reason": reason}))
        if isinstance(loss, str):
            with pytest.raises(UserError, match=loss):
                rates.last_loss(run)
        else:
            assert rates.last_loss(run) == loss
    monkeypatch.setattr(endings.RunFolder, "record", lambda self: {"finished_at": 4})
    (run / "metrics.jsonl").write_text('{"evaluation/loss": 0.1}\n{"evaluation/loss": null}\n')
    assert rates.last_loss(run) is None


@pytest.fixture
def ranks(tmp_path):
    """The recorded experiment on ranks in a folder of its own, where its records can be changed."""
    shutil.copytree(ROOT / "docs/examples/rank/runs", tmp_path / "rank/runs")
    return Study("rank", tmp_path / "rank")


def diverge(run, launch):
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"finished_at": None}))
    launch.parent.mkdir(exist_ok=True)
    launch.write_text(json.dumps({"reason": NOT_FINITE}))


def test_a_run_that_diverged_and_one_without_scores_are_results(ranks, monkeypatch):
    run = ranks.run("rank-32-seed1")
    diverge(run, run / endings.LAUNCH)
    (ranks.run("rank-2-seed0") / "scores.json").unlink()
    assert ranks.is_recorded()
    found = [
        answers.answer(ranks, Question("rank", *asked)) for asked in (("rank-32", "?"), ("rank-2", "?", "concept"))
    ]
    assert found[0] == Answer("?", "diverged", "rank-32 diverged in 1 of 3 seeds", 0)
    assert found[1].label == "not tested" and "rank-2-seed0 has no score concept" in found[1].size
    texts = Texts("Ranks", "", dict.fromkeys(ranks.variants, ""), ("None.",))
    monkeypatch.setitem(TEXTS, "rank", texts)
    blocks = page.blocks(ranks)
    rows = {row[0]: row for block in blocks for row in block.rows}
    assert rows["rank-32"][-1] == "diverged in 1 of 3 seeds" and rows["rank-32"][2] == "-"
    assert rows["rank-2"][4].startswith("- (-, 0.")
    said = [item for block in blocks for item in block.items]
    assert any("rank-32-seed1: exit status 2: the loss at step 7 is not finite" in item for item in said)


def test_nothing_is_compared_with_a_reference_that_diverged(ranks):
    run = ranks.run("rank-8-seed0")
    diverge(run, run / endings.LAUNCH)
    assert answers.answer(ranks, Question("rank", "rank-2", "?")).size == "rank-8 diverged in 1 of 3 seeds"
    assert "Nothing is compared with the reference, because a run of it diverged." in page.results(ranks)


def test_a_run_with_other_code_is_named(ranks):
    path = ranks.run("rank-32-seed2") / "provenance.json"
    entries = json.loads(path.read_text())
    for entry in entries:
        entry["code"]["hash"] = "0" * 64
    path.write_text(json.dumps(entries))
    with pytest.raises(UserError, match="rank-32-seed2 in .*other code"):
        _ = ranks.comparison


def test_variants_may_have_optimizers_of_other_packages(ranks):
    for seed in range(3):
        path = ranks.run(f"rank-32-seed{seed}") / "provenance.json"
        entries = json.loads(path.read_text())
        for entry in entries:
            entry["code"]["named"] = {"lion/optimizer.py": "1" * 32}
        path.write_text(json.dumps(entries))
    assert len(ranks.comparison.results) == len(ranks.variants) - 1


def test_runs_are_kept_if_each_has_ended(ranks, tmp_path):
    trained, kept = tmp_path / "trained", Study("rank", tmp_path / "kept")
    shutil.copytree(ranks.folder / "runs", trained)
    kept.__dict__["content"] = ranks.content | {"folder": str(trained)}
    diverge(trained / "rank-32-seed1", trained / "logs/rank-32-seed1.json")
    with pytest.raises(UserError, match="has no comparison"):
        kept.keep()
    (trained / "comparison").mkdir()
    (trained / "comparison/comparison.md").write_text("compared")
    (trained / "logs/rank-32-seed1.json").write_text('{"reason": "signal 9"}')
    with pytest.raises(UserError, match="rank-32-seed1 has not finished, and did not diverge: make experiment"):
        kept.keep()
    assert not kept.folder.exists()
    (trained / "logs/rank-32-seed1.json").write_text(json.dumps({"reason": NOT_FINITE}))
    kept.keep()
    assert kept.is_recorded() and kept.diverged("rank-32") == {"rank-32-seed1": NOT_FINITE}


def test_the_page_about_storage_has_the_numbers_of_its_records():
    text = (ROOT / "docs/examples/base_storage/base_storage.md").read_text(encoding="utf-8")
    content = json.loads((ROOT / "docs/examples/base_storage" / storage.EVALUATION).read_text())["results"]
    [row] = [line for line in text.splitlines() if line.startswith("| nf4 | 0.08")]
    study = Study.of("base_storage")
    for key, *_ in storage.SIDES:
        differences = storage.paired(study, "nf4", key, lambda run, key: content[run][key])
        assert "({:+.3f} to {:+.3f})".format(*storage.interval(differences, 0.05)) in row


def pair(kind: str, value: float, adjusted_p: float) -> tuple[str, SimpleNamespace]:
    difference = Difference(value, 0, value - 0.1, value + 0.1, adjusted_p, 0.05, 4, 0.3, 1, 32, 1, (3, 3), 5)
    word = ("better" if value < 0 else "worse") if adjusted_p <= 0.05 else "not distinguishable"
    return kind, SimpleNamespace(
        difference=difference,
        outcome=SimpleNamespace(outcome=word, adjusted_p=adjusted_p, difference=difference),
        candidate=SimpleNamespace(label="mine"),
        note="",
    )


def test_a_score_at_its_limit_has_no_interval():
    _, flat = pair("score plate", 0.0, 1.0)
    flat.difference = SimpleNamespace(value=0.0, low=0.0, high=0.0)
    flat.values = np.ones((3, 24, 1)), np.ones((3, 24, 1))
    assert answers.size("score plate", flat).endswith("all units equal (score at its limit): no interval")
    flat.values = np.ones((3, 2, 1)) * [[1], [0]], np.ones((3, 2, 1)) * [[1], [0]]
    assert answers.size("score plate", flat).endswith("no unit differs: no interval")


@pytest.mark.parametrize(
    ("word", "learned", "kept", "loss_is_lower", "label"),
    [
        ("trade-off", "better", "not worse", True, "could not be told apart"),
        ("trade-off", "better", "worse", True, "trap"),
        ("trade-off", "better", "undecided", True, "trade-off"),
        ("trade-off", "worse", "better", False, "trade-off"),  # a slow learner
        ("worse", "worse", "not worse", True, "trap"),  # by the scores it learned less
        ("worse", "worse", "not worse", False, "worse"),
        ("better", "better", "not worse", False, "better"),  # although its loss may be higher
        ("undecided", "withheld", "not worse", False, "could not be told apart"),
    ],
)
def test_a_trap_looks_like_a_gain_and_is_worse_by_more_than_the_margin(word, learned, kept, loss_is_lower, label):
    result = PairResult(word, "", words={"learned": learned, "kept": kept})
    assert answers.label_of(result, loss_is_lower) == label
    assert "only in part decided" not in answers.sides_of(result, label)


BETTER_ONCE = {"learned": "better", "kept": "undecided"}


@pytest.mark.parametrize(
    ("word", "words", "tests", "label", "size"),
    [
        ("better", {}, {"evaluation": (-0.2, 0.01), "score kept": (-0.3, 0.04)}, "better", "score kept -0.3"),
        ("better", {}, {"evaluation": (-0.2, 0.01), "score kept": (-0.3, 0.4)}, "better", "log loss -0.2"),
        (
            "worse",
            {"learned": "worse"},
            {"evaluation": (-0.2, 0.001), "score concept": (0.3, 0.04)},
            "trap",
            "score concept +0.3 (+0.2 to +0.4), p = 0.04; it learned less; losses say the opposite",
        ),
        (
            "better",
            {"learned": "better"},
            {"evaluation": (0.2, 0.001), "score concept": (-0.3, 0.04)},
            "better",
            "score concept -0.3 (-0.4 to -0.2), p = 0.04; losses say the opposite",
        ),
        (
            "not distinguishable",
            {},
            {"evaluation": (-0.2, 0.9), "score concept": (0.3, 1.0)},
            "could not be told apart",
            "score concept",
        ),
        (
            "undecided",
            BETTER_ONCE,
            {"evaluation": (-0.2, 0.001), "score concept": (-0.3, 0.04)},
            "could not be told apart",
            "score concept -0.3 (-0.4 to -0.2), p = 0.04; only in part decided: it learned more and whether it kept as much is",
        ),
        (
            "undecided",
            {"learned": "withheld", "kept": "not worse"},
            {"evaluation": (-0.2, 0.9)},
            "could not be told apart",
            "log loss -0.2 (-0.3 to -0.1), p = 0.9; what it learned is not said",
        ),
    ],
)
def test_a_label_and_its_number(word, words, tests, label, size):
    """A decided test that says what the result says, pictures first; where nothing is decided, always the same one."""
    pairs = dict(pair(kind, *values) for kind, values in tests.items())
    result = PairResult(word, "", "Losses disagree" if "opposite" in size else "", words)
    found = answers.of_pair(Question("any", "mine", "Does it help?"), pairs, result)
    assert found.label == label and found.size.startswith(size) and found.tests == 5
