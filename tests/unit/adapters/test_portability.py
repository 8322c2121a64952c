"""What loads where: every cell of the table in docs/formats.md, on a part of the layers, and what the plan says of failures."""

import re
from pathlib import Path

import pytest

from sushi_research.adapters import portability
from testing import adapter_acceptance as acceptance

PAGE = Path(__file__).parents[3] / "docs/formats.md"
# Of peft's layout SD1.5 alone: the names are those of diffusers in both. `make acceptance` loads all.
FILES = [file for file in acceptance.files(some=True) if file.layout == "kohya" or file.architecture == "sd15"]


def committed():
    """(kind, layout, architecture) -> program -> what the table says."""
    rows = re.findall(r"^\| (.+) \| (kohya|peft) \| (both|SD1\.5|SDXL) \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    return {
        (title, layout, architecture): dict(zip(portability.PROGRAMS, cells.split(" | "), strict=True))
        for title, layout, base, cells in rows
        for architecture, label in acceptance.ARCHITECTURES.items()
        if base in ("both", label)
    }


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.kind.title}-{file.layout}-{file.architecture}")
def test_every_cell(file):
    """A program loads what the table says, and `limits` names exactly the programs that do not."""
    found = dict(acceptance.outcomes(file))
    matches = acceptance.in_components(file.made())
    limits = portability.limits(file.architecture, matches, layout=file.layout)
    loads = {program for program, words in found.items() if words == acceptance.LOADS}
    assert loads == set(portability.PROGRAMS) - limits.keys()
    cells = committed()[file.kind.title, file.layout, file.architecture]
    assert loads == {program for program, words in cells.items() if words == acceptance.LOADS}
    said = [sentence.partition(" will not load this adapter as it is: ") for sentence in portability.sentences(limits)]
    assert sorted(program for programs, _, _ in said for program in programs.split(" and ")) == sorted(limits)
    assert all(reason.endswith(".") and 10 < len(reason) < 150 and "\n" not in reason for _, _, reason in said)


def test_the_table_is_of_this_code():
    assert f"`{acceptance.inputs_hash()}`" in PAGE.read_text(), "the table is older: run make acceptance-files"
    assert len(committed()) == len(acceptance.files())


@pytest.mark.parametrize("architecture", acceptance.ARCHITECTURES)
def test_text_encoders_without_out_proj(architecture):
    """diffusers turns kohya's q, k and v into an old spelling, which it only reads where there is an out_proj."""
    kind = acceptance.Kind("", "lora", conv=False, without=("self_attn.out_proj",))
    file = acceptance.File(kind, "kohya", architecture, some=True)
    limits = portability.limits(architecture, acceptance.in_components(file.made()))
    loads = {program for program, words in acceptance.outcomes(file) if words == acceptance.LOADS}
    assert "diffusers" in limits and loads == set(portability.PROGRAMS) - limits.keys()
