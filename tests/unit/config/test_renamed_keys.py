"""A key with an old name is refused, and the error gives the new name."""

import pytest
from pydantic import Field

from sushi_research.config import TrainingConfig, other_scripts
from sushi_research.config.command_line import load_config
from sushi_research.config.keys import keys_of
from sushi_research.config.renamed_keys import RENAMED, with_new_names
from sushi_research.config.section import Section
from sushi_research.errors import UserError

INTRO = "\n".join("12345")


class Part(Section):
    """A section."""

    noise_samples: int = Field(8, description="Noise samples")
    # Nearer to the old name than the new name is.
    draw: int = Field(1, description="Something else")


class Config(Section):
    """A config."""

    evaluation: Part = Field(default_factory=Part)
    lora_scales: list[float] = Field([1.0], description="Scales")


def problem(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(Config, words, script="script.py", intro=INTRO)
    return str(caught.value)


def test_an_old_name_on_the_command_line():
    where = "unknown key evaluation.draws on the command line"
    assert problem("--evaluation.draws", "4") == f"{where}: it is now called --evaluation.noise_samples"
    assert (
        problem("--strengths", "[1.0]") == "unknown key strengths on the command line: it is now called --lora_scales"
    )


def test_an_old_name_in_a_file(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("evaluation: {draws: 4}\n")
    where = f"unknown key evaluation.draws in {file}"
    assert problem("--config", str(file)) == f"{where}: it is now called evaluation.noise_samples"


def test_a_new_name_that_this_config_does_not_have_is_no_hint():
    class Other(Section):
        """A config."""

        evaluation: Part = Field(default_factory=Part)

    with pytest.raises(UserError, match="unknown key strengths on the command line: the sections are evaluation"):
        load_config(Other, ["--strengths", "[1.0]"], script="script.py", intro=INTRO)


@pytest.mark.parametrize("old", RENAMED)
def test_a_name_is_old_or_new_and_not_both(old):
    """A new name that no config has would never be given; an old name that one still has would not be refused."""
    classes = [TrainingConfig, *(value for value in vars(other_scripts).values() if is_config(value))]
    known = {key for each in classes for key in keys_of(each.model_json_schema()).leaves}
    assert (old in known) != (RENAMED[old] in known)


def is_config(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Section) and value.__module__ == other_scripts.__name__


def test_settings_of_older_versions_have_the_names_and_values_of_this_one():
    older = {"evaluation.draws": 4, "train.gradient_checkpointing": True, "train.deterministic": True, "data.sets": []}
    assert with_new_names(older) == {
        "evaluation.noise_samples": 4,
        "train.gradient_checkpointing": "all",
        "train.deterministic": True,
        "data.sets": [],
    }
    assert with_new_names({"train.gradient_checkpointing": "none"}) == {"train.gradient_checkpointing": "none"}
