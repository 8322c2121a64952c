"""Log ratios of losses: the means that "learned" and "kept" are, by timestep bin, and what makes none."""

from types import SimpleNamespace

import numpy as np
import pytest

from sushi_research.evaluation import outcomes, summary

TIMES = np.array([[10, 300, 600, 900], [260, 20, 990, 510]])


def test_the_log_ratio_is_finite_where_the_losses_are():
    loss = np.array([[0.2, 0.0, 0.0, np.inf, np.nan]], np.float32)
    base = np.array([[0.1, 0.0, 1.0, np.inf, 1.0]], np.float32)
    found = outcomes.log_ratio(loss, base)
    assert found[0, 0] == pytest.approx(np.log(2), rel=1e-7) and found[0, 1] == 0  # the losses are in fp32
    assert found[0, 2] == pytest.approx(np.log(np.finfo(np.float32).tiny)) and np.isnan(found[0, 3:]).all()
    assert found.dtype == np.float64


def test_bins_are_chosen_for_each_image_by_itself():
    values = np.arange(16.0).reshape(2, 2, 4)
    assert outcomes.in_bins(values, TIMES, [3]).tolist() == [[[3], [6]], [[11], [14]]]
    assert outcomes.in_bins(values, TIMES, [0, 3]).tolist() == [[[0, 3], [5, 6]], [[8, 11], [13, 14]]]


@pytest.mark.parametrize("times", [[[10, 300, 600], [260, 20, 510]], [[10, 300, 800, 900], [260, 20, 990, 510]]])
def test_a_bin_without_noise_samples_gives_nothing(times):
    times = np.array(times)
    ones = np.ones(times.shape)
    assert outcomes.in_bins(ones, times, [3]) is outcomes.learned(ones, ones, times) is None
    assert "evaluation/learned" not in outcomes.learned_summary(ones, ones, times)


def test_what_is_logged_of_an_evaluation():
    base = np.array([[0.5, 0.4, 0.2, 0.1], [0.3, 0.6, 0.1, 0.2]])
    factor = np.array([[1.0, 1.1, 1.2, 0.5], [1.1, 1.0, 0.25, 1.2]])
    found = {"validation": (base * factor, base), "base_images": (base * 2, base), "trained": (base / 4, base)}
    values = summary.summary(found, SimpleNamespace(names=("a" * 32, "b" * 32), timesteps=lambda: TIMES))
    bins = [values[f"evaluation/log_loss_over_base_by_timestep/{number}"] for number in range(4)]
    assert bins == pytest.approx([0, np.log(1.1), np.log(1.2), np.log(0.5 * 0.25) / 2])
    assert values["evaluation/learned"] == bins[3]
    assert values["evaluation/learned_se"] == pytest.approx(np.log(2) / 2)  # of -log 2 and -log 4
    assert values["evaluation/kept"] == pytest.approx(np.log(2))
    assert values["evaluation/trained"] == pytest.approx(-2 * np.log(2))
    assert values["evaluation/memorised_auc"] == 1 and "evaluation/prior" not in values
    said = summary.describe(values)
    assert "learned -1.040 +- 0.35 (64.6% below the base)" in said and "kept +0.693 +- " in said
    assert "(100.0% above the base) on the base's own images" in said
    assert said.endswith("memorised AUC 1.00 (0.39 to 1.00: not shown to recognise its training images)")


def test_an_image_with_several_captions_is_one_image_for_what_is_memorised():
    base, times = np.ones((2, 4)), np.tile([100, 300, 600, 900], (2, 1))
    held_out, trained = (base * [[1.0], [1.5]], base), (base * [[0.9], [1.2]], base)

    def summary_of(rows: list[int]) -> dict:
        val_set = SimpleNamespace(names=["ab"[row] for row in rows], timesteps=lambda: times[rows])
        return summary.summary({"validation": [each[rows] for each in held_out], "trained": trained}, val_set)

    one, other = summary_of([0, 1]), summary_of([0, 0, 0, 1])
    keys = [key for key in one if key.startswith("evaluation/memorised")]
    assert len(keys) == 5 and [one[key] for key in keys] == [other[key] for key in keys]


def test_training_images_of_another_kind_are_said_to_be():
    base, times = np.ones((16, 4)), np.tile(TIMES, (8, 1))
    val_set = SimpleNamespace(names=[f"image {number}" for number in range(16)], timesteps=lambda: times)
    values = summary.summary({"validation": (base / 2, base), "trained": (base, base)}, val_set)
    assert values["evaluation/memorised_auc"] == 0
    assert "training images are of another kind" in summary.describe(values)
