"""The sizes that train.memory takes."""

from __future__ import annotations

import pytest

from sushi_research.config import SD15Training
from sushi_research.config.command_line import load_config
from sushi_research.config.section import memory_bytes
from sushi_research.errors import UserError


def load(text: str) -> SD15Training:
    argv = ["--model.base", "b", "--data.path", "p", "--train.steps", "1", "--train.memory", text]
    return load_config(SD15Training, argv, script="scripts/train_sd15_lora.py", intro="1\n2\n3\n4\n5")


@pytest.mark.parametrize(("text", "expected"), [("8GB", 8e9), ("7.5 gib", 7.5 * 2**30), ("24GiB", 24 * 2**30)])
def test_both_units(text, expected):
    assert memory_bytes(load(text).train.memory) == expected


@pytest.mark.parametrize("text", ["8", "8TB", "0GB", "-8GB", "GB", "1e3GB", ""])
def test_others_are_refused_in_one_sentence(text):
    with pytest.raises(UserError, match="train.memory .*must be a number with GB .* or GiB .*, or null") as caught:
        load(text)
    assert "\n" not in str(caught.value)
