"""Option names of other LoRA trainers are answered with ours."""

import pytest

from sushi_research import models
from sushi_research.config import SDXLTraining
from sushi_research.config.command_line import load_config
from sushi_research.config.keys import FLAGS, keys_of
from sushi_research.config.other_programs import PROGRAMS, hint, options
from sushi_research.config.other_scripts import SamplingConfig
from sushi_research.errors import UserError

LEAVES = {name: keys_of(config.model_json_schema()).leaves for name, config in models.config_classes().items()}
REQUIRED = ["--model.base", "b", "--data.path", "p", "--train.steps", "10"]


def problem(*words: str, config: type = SDXLTraining) -> str:
    with pytest.raises(UserError) as caught:
        load_config(config, words, script="script.py", intro="\n".join("12345"))
    return str(caught.value)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_key_of_the_tables_is_there(program):
    """A key that was renamed or was never there would send a user to another error."""
    known = {*FLAGS, *(key for leaves in LEAVES.values() for key in leaves)}
    groups = [group for part in PROGRAMS[program].values() for group in part]
    assert {key for _, key, _ in groups if key} - known == set()
    assert all(key or note for _, key, note in groups), "what is not here says why"
    names = [name for group, _, _ in groups for name in group.split()]
    assert len(names) == len(set(names))
    # No hint for a name that is a key of ours: it would never be given.
    assert not known & {option.name for option in (each for found in options().values() for each in found)}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--network_dim", "8"],
            "unknown key network_dim on the command line: kohya's --network_dim is --lora.rank here (16 by default, 4 there)",
        ),
        (
            ["--Network-Dim=8"],
            "unknown key Network-Dim on the command line: kohya's --network_dim is --lora.rank here (16 by default, 4 there)",
        ),
        (
            ["--secondary_separator"],
            "unknown key secondary_separator on the command line: kohya's --secondary_separator is not an option here: tags have "
            "one separator, captions.tag_separator",
        ),
        (
            ["--lora.network_dim", "8"],
            "unknown key lora.network_dim on the command line: kohya's --network_dim is --lora.rank here (16 by default, 4 there)",
        ),
    ],
)
def test_an_option_on_the_command_line(words, sentence):
    assert problem(*REQUIRED, *words) == sentence


def test_a_file_of_onetrainer(tmp_path):
    file = tmp_path / "onetrainer.json"
    file.write_text('{"lora_rank": 16, "unet": {"learning_rate": 1e-4}, "optimizer": {"optimizer": "ADAMW"}}')
    assert problem("--config", str(file), *REQUIRED).splitlines()[1:] == [
        f"  unknown key lora_rank in {file}: OneTrainer's lora_rank is lora.rank here",
        f"  unknown key unet.learning_rate in {file}: OneTrainer's unet.learning_rate is optimizer.lr here",
        f"  unknown key optimizer.optimizer in {file}: OneTrainer's optimizer.optimizer is optimizer.name here "
        "(docs/optimizers.md has the names: adamw8bit for ADAMW_8BIT, adamw_schedulefree for SCHEDULE_FREE_ADAMW; _ADV ones and "
        "CAME_8BIT are not here; others by their import path)",
    ]


def test_options_of_textual_inversion_are_answered_with_new_tokens():
    of_tokens = {"text_encoders.new_tokens", "text_encoders.new_tokens_lr"}
    for name in (
        *("token_string", "init_word", "num_vectors_per_token"),
        *("embedding", "additional_embeddings", "embedding_learning_rate", "text_encoder.train_embedding"),
        *("train_text_encoder_ti", "token_abstraction", "num_new_tokens_per_abstraction"),
    ):
        assert {each.key for each in options()[name]} <= of_tokens, name
    answers = (each.note for found in options().values() for each in found)
    assert not [note for note in answers if "not trained" in note and ("inversion" in note or "token" in note)]


def test_options_of_subsets_and_concepts_in_a_set(tmp_path):
    file = tmp_path / "sets.yaml"
    file.write_text("data: {sets: [{path: a, is_reg: true, enable_tag_shuffling: true, image_dir: b, flp: 1, xyz: 2}]}")
    found = problem("--config", str(file), "--model.base", "b", "--train.steps", "10").split("; unknown key ")
    assert found[0].startswith(
        "unknown key data.sets[0].is_reg: kohya's is_reg is here a set with role: regularisation"
    )
    assert found[1] == "data.sets[0].enable_tag_shuffling: OneTrainer's enable_tag_shuffling is captions.shuffle here"
    assert found[2].startswith("data.sets[0].image_dir: kohya's image_dir is data.path here")
    assert found[3] == "data.sets[0].flp: did you mean data.sets[0].flip?"
    assert found[4].startswith("data.sets[0].xyz: the keys are path, revision, ")


def test_a_file_of_kohya(tmp_path):
    file = tmp_path / "kohya.toml"
    file.write_text("network_dim = 8\n")
    assert problem("--config", str(file), *REQUIRED) == (
        f"{file} is TOML, and a config file here is YAML: write the settings anew under our names (docs/guides/from_kohya.md)"
    )


def test_an_option_of_the_other_architecture():
    assert hint("clip_skip", LEAVES["sd15"]).startswith("kohya's and diffusers' clip_skip is model.clip_skip here")
    assert hint("clip_skip", LEAVES["sdxl"]).startswith(
        "kohya's and diffusers' clip_skip is not an option here: SD1.5 only"
    )


def test_other_scripts_give_no_hint():
    assert "kohya" not in problem("--network_dim", "8", "--base", "b", "--prompts", "[a]", config=SamplingConfig)
