"""Values of the section train that have several spellings."""

import pytest
from pydantic import ValidationError

from sushi_research.config.learning import TrainSection


@pytest.mark.parametrize(
    ("given", "mode"),
    [
        (True, "all"),
        (False, "none"),
        ("true", "all"),
        ("False", "none"),
        ("feed_forward", "feed_forward"),
        ("all", "all"),
    ],
)
def test_checkpointing_takes_a_switch_too(given, mode):
    assert TrainSection(steps=1, gradient_checkpointing=given).gradient_checkpointing == mode


@pytest.mark.parametrize("given", ["some", None, 1, "on"])
def test_other_modes_are_refused(given):
    with pytest.raises(ValidationError):
        TrainSection(steps=1, gradient_checkpointing=given)


@pytest.mark.parametrize("given", ["xformers", ["cudnn"], ["flash", "efficient", "math"]])
def test_attention_is_a_name_or_an_order(given):
    assert TrainSection(steps=1, attention=given).attention == given


@pytest.mark.parametrize("given", ["flash", [], ["flash", "flash"], ["xformers"], ["Flash"]])
def test_other_attention_is_refused(given):
    with pytest.raises(ValidationError):
        TrainSection(steps=1, attention=given)
