"""The result of a pair in words, from arrays: better, a trade-off, undecided, withheld, and losses against pictures."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from sushi_research.evaluation.outcomes import KEPT_MARGIN
from sushi_research.reports import statistics
from sushi_research.reports.outcome_tests import OUTCOMES, OutcomeTest, of_score, pair_result, values_of

IMAGES = 16
# Far within the margins: a difference of 0 is "not worse".
NOISE = 0.02
# A difference of this size is distinguishable from 0, but not from the margin.
NEAR_THE_MARGIN = KEPT_MARGIN
# One of this size is distinguishable from neither.
UNCLEAR = KEPT_MARGIN - 0.0001


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 999)
    monkeypatch.setattr(statistics, "MAX_PAIRS", 50)


def difference(shift, noise=NOISE, seed=0, pairs=1):
    """The candidate is higher by `shift`."""
    rng = np.random.default_rng([seed, round(1e6 * abs(shift))])
    noises = rng.standard_normal((IMAGES, 1))
    noises -= noises.mean()
    noise *= 32 if abs(shift) == UNCLEAR else 1
    return statistics.paired_difference(np.zeros((IMAGES, 1)), shift + noise * noises, pairs=pairs)


def result(learned=None, kept=None, bins=(), **others):
    """Of shifts of the candidate against the reference, by the kind of results."""
    shifts = {"evaluation": learned, "base_images": kept, **others}
    shifts = {kind: shift for kind, shift in shifts.items() if shift is not None}
    differences = [difference(shift, pairs=len(shifts)) for shift in shifts.values()]
    tests = [
        OutcomeTest(OUTCOMES.get(kind) or of_score(kind, "learned"), found.difference, found.adjusted_p)
        for kind, found in zip(shifts, statistics.paired_test_results(differences), strict=True)
    ]
    found = pair_result(
        ("A", "B"), tests, [None if bin is None else difference(bin) for bin in bins], {"kept": "B has none"}
    )
    assert "\n" not in found.sentence and found.sentence.endswith(".")
    return found


@pytest.mark.parametrize(
    ("shifts", "word", "said"),
    [
        ((-0.3, 0.0), "better", "A is better than B: it learned more (log loss -0.3, 95 % interval -0.3"),
        ((0.0, -0.3), "better", "A is better than B: it kept more (log loss on the base's own pictures -0.3"),
        ((0.3, 0.0), "worse", "A is worse than B: B learned more (log loss -0.3, 95 % interval -0.3"),
        ((-0.3, 0.02), "better", "and it kept less, but within the margin (log loss on the base's own pictures +0.02"),
        ((-0.3, 0.3), "trade-off", "Trade-off between A and B: A learned more (log loss -0.3"),
        ((0.3, -0.3), "trade-off", "Trade-off between A and B: A kept more (log loss on the base's own pictures -0.3"),
        # Both lower by less than the margin: neither is worse than the other in the sense of the margin.
        ((-0.02, 0.02), "trade-off", "and it kept less, but within the margin"),
        ((-0.3, NEAR_THE_MARGIN), "trade-off", "it kept less, but whether by more than the margin is undecided ("),
        ((-0.3, UNCLEAR), "undecided", "A learned more (log loss -0.3"),
        (
            (-0.3, UNCLEAR),
            "undecided",
            "and whether it kept as much is undecided (log loss on the base's own pictures +0.2,",
        ),
        ((0.3, None), "undecided", "Undecided between A and B: B learned more (log loss -0.3"),
        ((-0.3, None), "undecided", "and what it kept is not known (B has none); it is about these two runs"),
        (
            (0.0, 0.0),
            "not distinguishable",
            "A is not distinguishable from B: A learned at least as much, within the margin (",
        ),
        ((0.0, None), "not distinguishable", "and what it kept is not known (B has none)"),
    ],
)
def test_words(shifts, word, said):
    found = result(*shifts)
    assert found.word == word and said in found.sentence, found.sentence
    mirrored = {"better": "worse", "worse": "better"}
    assert result(*(shift and -shift for shift in shifts)).word == mirrored.get(word, word)


def test_a_kept_that_is_worse_on_prior_images_is_worse():
    """The base's own pictures show no loss, the prior images do: kept must not be worse by any of them."""
    assert result(-0.3, 0.0, prior=0.0).word == "better"
    found = result(-0.3, 0.0, prior=0.3)
    assert found.word == "trade-off" and "log loss on prior images +0.3" in found.sentence


def test_learned_is_withheld_when_timestep_bins_disagree():
    found = result(-0.3, 0.0, bins=(0.1, 0.0, None, -0.3))
    assert found.word == "undecided" and found.words["learned"] == "withheld"
    assert "its loss is lower at t 750-999 and higher at t 0-249" in found.sentence
    # A bin that is not distinguishable from 0 disagrees with none, and with one sign nothing is withheld.
    assert result(-0.3, 0.0, bins=(0.0001, -0.3, None, -0.3)).word == "better"
    # Pictures that are decided lead all the same.
    assert result(-0.3, 0.0, bins=(0.1, 0.0, None, -0.3), pictures_learned=-0.3).word == "better"


def test_pictures_lead_and_a_disagreement_is_said():
    found = result(-0.3, 0.0, pictures_learned=0.3)
    assert found.word == "worse" and "B learned more (log distance from the held-out images -0.3" in found.sentence
    said = "Losses and pictures disagree: by the losses A learned more than B (log loss -0.3"
    assert found.disagreement.startswith(said) and found.disagreement.endswith("the result follows pictures.")
    # Losses decide nothing where pictures are measured; where both agree, nothing disagrees.
    found = result(-0.3, 0.0, pictures_learned=0.0)
    assert found.word == "not distinguishable" and "log distance from the held-out images" in found.sentence
    assert result(-0.3, 0.0, pictures_learned=-0.3).disagreement == ""
    assert result(0.0, 0.0, pictures_kept=0.3).word == "worse"
    # Where no loss says what was kept, pictures that are not worse do.
    assert result(-0.3, None, pictures_kept=0.0).word == "better"
    # A score leads too, and one that disagrees with the pictures decides nothing.
    assert "Losses and score judge disagree" in result(0.3, 0.0, judge=-0.3).disagreement
    found = result(-0.3, 0.0, pictures_learned=0.3, judge=-0.3)
    assert found.word == "undecided" and "pictures, learned and score judge disagree" in found.sentence


def test_no_difference_is_rarely_called_better(monkeypatch):
    """Three equal variants, of which all outcomes of all pairs are one family: at most 5 % have any "better" or trade-off."""
    monkeypatch.setattr(statistics, "RESAMPLES", 499)
    families, wrong, alone = 200, 0, 0
    kinds = ("evaluation", "base_images", "pictures_learned", "pictures_kept")
    for family in range(families):
        rng = np.random.default_rng([family, 7])
        values = {kind: NOISE * rng.standard_normal((3, IMAGES, 1)) for kind in kinds}
        pairs = list(itertools.combinations(range(3), 2))
        cells = [(pair, kind) for pair in pairs for kind in kinds]
        differences = [
            statistics.paired_difference(values[kind][a], values[kind][b], pairs=len(cells)) for (a, b), kind in cells
        ]
        found = dict(zip(cells, statistics.paired_test_results(differences), strict=True))
        words = set()
        for pair in pairs:
            tests = [(OUTCOMES[kind], found[pair, kind]) for kind in kinds]
            tests = [OutcomeTest(outcome, test.difference, test.adjusted_p) for outcome, test in tests]
            words.add(pair_result(("A", "B"), tests).word)
        wrong += bool(words & {"better", "worse", "trade-off"})
        alone += any(d.p_value <= 0.05 for d in differences)
    # Without the correction a third of the families has a difference.
    assert wrong / families <= 0.05 < 0.25 < alone / families


def test_the_drift_is_compared_in_its_own_unit():
    """Its base is 0, so a log ratio would weigh the smallest drifts most."""
    curve = SimpleNamespace(loss=np.array([[[0.5, 0.25]]], np.float32), base=np.zeros((1, 2), np.float32))
    assert values_of("drift", curve).tolist() == [[[0.5, 0.25]]]
