"""What a model card says of a run's objective."""

import json

from sushi_research.config import SD15Training
from sushi_research.models.prediction import Prediction
from sushi_research.reports.card_settings import objective_rows
from sushi_research.training.objective_plan import objective_plan

REQUIRED = {"model": {"base": "b"}, "data": {"path": "p"}, "train": {"steps": 1}}


def rows_of(loss, timesteps=None):
    config = SD15Training(**REQUIRED, loss=loss, timesteps=timesteps or {})
    plan = json.loads(json.dumps({"objective": objective_plan(config, Prediction()).to_json()}))
    rows = objective_rows(config.model_dump(), plan)
    return {name: value for name, value in rows.items() if value is not None}


def test_the_card_says_all_that_is_not_the_default():
    assert rows_of({}) == {}
    assert rows_of({"weighting": "soft_min_snr"}) == {"loss weights": "soft_min_snr weights (gamma 5)"}
    loss = {"type": "huber", "huber_c": 0.2, "noise_offset": 0.1, "multires_iterations": 6}
    assert rows_of(loss, {"distribution": "logit_normal", "mean": -0.5}) == {
        "loss": "huber (c 0.2, snr schedule)",
        "noise": "with an offset of 0.1, 6 resolutions (discount 0.3)",
        "timesteps": "logit_normal timesteps (mean -0.5, std 1)",
    }


def test_a_run_of_an_earlier_version_has_what_its_config_says():
    assert objective_rows({"loss": {"snr_gamma": 5.0, "noise_offset": 0.0}}, {}) == {
        "min-SNR gamma": 5.0,
        "noise offset": None,
    }
    for damaged in ({"objective": None}, {"objective": {}}, {"objective": {"noise": 3}}):
        assert not any(value for value in objective_rows({}, damaged).values())
