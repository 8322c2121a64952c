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
    with pytest.raises(
        UserError, match=f"loss.weighting {weighting} is 0 at the only timesteps that are trained, 999 to 999"
    ):
        objective_plan(config, v)
    assert objective_plan(config, Prediction()).weighting, "the SNR of the last timestep is above 0"
    wider = SD15Training(**REQUIRED, loss=loss, timesteps={"min": 998})
    assert objective_plan(wider, v).weighting
