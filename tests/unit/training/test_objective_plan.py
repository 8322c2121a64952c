"""What the plan says of the objective."""

import pytest

from sushi_research.config.loss import LossSection
from sushi_research.config.timesteps import TimestepSection
from sushi_research.training.objective_plan import objective_plan

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
    plan = objective_plan(LossSection(**loss), TimestepSection(**timesteps))
    assert plan.describe() == lines
