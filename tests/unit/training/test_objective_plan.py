"""What the plan says of the objective."""

import pytest

from sushi_research.config import SD15Training
from sushi_research.errors import UserError
from sushi_research.models.prediction import Prediction
from sushi_research.training.objective_plan import objective_plan

REQUIRED = {"model": {"base": "b"}, "data": {"path": "p"}, "train": {"steps": 1}}
LINES = [
    ({}, {}, []),
    ({"snr_gamma": 3.0}, {}, ["objective    mse; min_snr weights (gamma 3)"]),
    ({"weighting": "soft_min_snr"}, {}, ["objective    mse; soft_min_snr weights (gamma 5)"]),
    (
        {"type": "huber", "huber_schedule": "constant", "weighting": "v_like", "noise_offset": 0.1},
        {"max": 500},
        ["objective    huber (c 0.1); v_like weights; noise with an offset of 0.1; timesteps 0 to 500"],
    ),
    (
        {"noise_offset": 0.1, "noise_offset_random": True, "multires_iterations": 6, "input_perturbation": 0.2},
        {"distribution": "logit_normal", "mean": -0.5},
        [
            "objective    mse; noise with an offset of up to 0.1, 6 resolutions (discount 0.3), input perturbation 0.2; "
            "logit_normal timesteps (mean -0.5, std 1)"
        ],
    ),
]


@pytest.mark.parametrize(("loss", "timesteps", "lines"), LINES)
def test_the_line_says_what_is_not_the_default(loss, timesteps, lines):
    plan = objective_plan(SD15Training(**REQUIRED, loss=loss, timesteps=timesteps), Prediction())
    assert plan.describe() == lines


def test_the_weight_that_v_has_by_itself_is_called_none_other():
    config = SD15Training(**REQUIRED, loss={"weighting": "v_like"})
    v = objective_plan(config, Prediction("v_prediction", zero_terminal_snr=True))
    assert v.weighting == "v_like weights (no other than none, because the base predicts v)"
    assert objective_plan(config, Prediction("rectified_flow")).weighting == "v_like weights"


@pytest.mark.parametrize("weighting", ["min_snr", "soft_min_snr", "debiased"])
def test_a_weighting_that_is_0_at_all_chosen_timesteps_is_refused(weighting):
    loss, v = {"weighting": weighting}, Prediction("v_prediction", zero_terminal_snr=True)
    config = SD15Training(**REQUIRED, loss=loss, timesteps={"min": 999})
    sentence = rf"^loss.weighting {weighting} is 0 on average over .* drawn \(999 to 999\), .*: lower timesteps.min, or"
    with pytest.raises(UserError, match=sentence):
        objective_plan(config, v)
    assert objective_plan(config, Prediction()).weighting, "the SNR of the last timestep is above 0"
    wider = SD15Training(**REQUIRED, loss=loss, timesteps={"min": 998})
    assert objective_plan(wider, v).weighting


NEARLY_0 = [
    # The range has weights above 0, but only its last timestep is drawn.
    (
        {"snr_gamma": 5},
        {"distribution": "logit_normal", "mean": 10, "std": 0.01},
        "v_prediction",
        "lower timesteps.mean",
    ),
    # So small that the gradients would be 0 in fp32.
    ({"weighting": "p2", "p2_gamma": 10, "p2_k": 1000}, {}, "epsilon", "lower loss.p2_k or loss.p2_gamma"),
    ({"weighting": "p2", "p2_gamma": 10}, {"max": 5}, "epsilon", "lower loss.p2_k or loss.p2_gamma"),
    ({"weighting": "p2"}, {"min": 999}, "v_prediction", "lower timesteps.min"),
]


@pytest.mark.parametrize(("loss", "timesteps", "kind", "remedy"), NEARLY_0)
def test_a_weighting_that_is_nearly_0_at_the_timesteps_that_are_drawn_is_refused(loss, timesteps, kind, remedy):
    prediction = Prediction(kind, zero_terminal_snr=kind == "v_prediction")
    with pytest.raises(
        UserError, match=f"so nothing would be learned: {remedy}, or choose loss.weighting v_like or none"
    ):
        objective_plan(SD15Training(**REQUIRED, loss=loss, timesteps=timesteps), prediction)


def test_a_small_weight_is_not_refused():
    for loss in ({"weighting": "p2", "p2_gamma": 2, "p2_k": 1000}, {"snr_gamma": 0.001}):
        assert objective_plan(SD15Training(**REQUIRED, loss=loss), Prediction()).weighting
