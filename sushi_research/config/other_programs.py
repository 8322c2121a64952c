"""Option names of other LoRA trainers, and the answer to someone who gives one of them here. They are hints, not aliases."""

from __future__ import annotations

import functools
from collections.abc import Container
from typing import NamedTuple

from sushi_research.config import diffusers_options, kohya_options, onetrainer_options
from sushi_research.config.keys import FLAGS

# In the order of the answer where several programs have the same name.
PROGRAMS = {
    "kohya": kohya_options.OPTIONS,
    "OneTrainer": onetrainer_options.OPTIONS,
    "diffusers": diffusers_options.OPTIONS,
}


class Option(NamedTuple):
    """An option of another program: our key ("" = there is none), and what a user has to know ("" = nothing)."""

    program: str
    name: str
    key: str
    note: str


@functools.cache
def options() -> dict[str, list[Option]]:
    """The options by name, as `normal` writes it."""
    found: dict[str, list[Option]] = {}
    for program, parts in PROGRAMS.items():
        for groups in parts.values():
            for names, key, note in groups:
                for name in names.split():
                    found.setdefault(normal(name), []).append(Option(program, name, key, note))
    return found


def normal(name: str) -> str:
    """A name as the tables are searched: without a difference between hyphens and underscores, large and small letters."""
    return name.replace("-", "_").lower()


def has_parts(path: str) -> bool:
    """Whether another program's file has a section of this name, with options that are known here (OneTrainer's `unet`)."""
    return any(name.startswith(f"{normal(path)}.") for name in options())


def hint(path: str, leaves: Container[str], hyphens: str = "") -> str | None:
    """What an unknown key is called here, or why it is not here; None if no program has it, or the config is not of a training.

    `leaves` are the keys of the config. `hyphens` stand before names of the command line.
    """
    if "train.batch_size" not in leaves:
        return None
    # An option that belongs to the other architecture (clip_skip) is not here.
    found = [option._replace(key=_there(option.key, leaves)) for option in options().get(normal(path), [])]
    return _answers(found, hyphens)


def hint_in_set(name: str) -> str | None:
    """`hint` for an unknown key of a set of images, such as one that a subset of kohya's or a concept of OneTrainer's has."""
    return _answers(options().get(normal(name), []), "", in_set=True)


def _answers(found: list[Option], hyphens: str, in_set: bool = False) -> str | None:
    answers = []
    for key in dict.fromkeys(option.key for option in found):
        same = [option for option in found if option.key == key]
        *others, last = (f"{option.program}'" + "s" * (option.program[-1] != "s") for option in same)
        owners = f"{', '.join(others)} and {last}" if others else last
        note = next((option.note for option in same if option.note), "")
        if key == "data.sets" and in_set:  # the note names the key of the set
            answers.append(f"{owners} {same[0].name} is here {note}")
        elif key:
            answers.append(f"{owners} {hyphens}{same[0].name} is {hyphens}{key} here" + (f" ({note})" if note else ""))
        else:
            answers.append(f"{owners} {hyphens}{same[0].name} is not an option here: {note}")
    return "; ".join(answers) or None


def _there(key: str, leaves: Container[str]) -> str:
    return key if key in leaves or key in FLAGS else ""


def table(program: str) -> str:
    """The options of a program as Markdown, one table for each part."""
    lines = []
    for part, groups in PROGRAMS[program].items():
        lines += [f"### {part}", "", f"| {program} | here | |", "|---|---|---|"]
        for names, key, note in groups:
            shown = ", ".join(f"`{name}`" for name in names.split())
            lines.append(f"| {shown} | {f'`{key}`' if key else '-'} | {note} |")
        lines.append("")
    return "\n".join(lines).strip()
