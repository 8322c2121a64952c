"""The base class of all config sections, shared value types with their bounds, and the check of texts.

Every number, text and list has an upper bound that nobody means to exceed: a larger one is a slip of the keyboard, and would end in
a traceback or in days of work. Bounds of numbers are part of the schema, so that --help lists them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from functools import partial
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema

from sushi_research import caption_text
from sushi_research.user_files import expand_path

# A name, a revision, an argument of a launcher.
_MOST_LETTERS = 1_000
# The entries of a list: prompts, seeds, adapters, module names.
_MOST_ENTRIES = 1_000


def _bounded_text(text: str) -> str:
    if len(text) > _MOST_LETTERS:
        raise ValueError(f"it has {len(text):,} letters, and at most {_MOST_LETTERS:,} can be used")
    return text


def _bounded_list(entries: list[Any]) -> list[Any]:
    if len(entries) > _MOST_ENTRIES:
        raise ValueError(f"it has {len(entries):,} entries, and at most {_MOST_ENTRIES:,} can be used")
    return entries


Text = Annotated[str, Field(min_length=1), AfterValidator(_bounded_text)]
# A path, with ~ replaced by the home folder; or a hub id, where the key takes one.
Location = Annotated[str, Field(min_length=1), AfterValidator(expand_path)]
# For lists: `Annotated[list[Text], Bounded]`.
Bounded = AfterValidator(_bounded_list)
Seed = Annotated[int, Field(ge=0, lt=2**32)]
# Four months at a step per second.
MOST_STEPS = 10_000_000
Steps = Annotated[int, Field(ge=1, le=MOST_STEPS)]


def plural(number: int | float | str) -> str:
    """The ending of a noun after a number."""
    return "" if number == 1 else "s"


def steps_text(steps: int | float | str) -> str:
    """A number of steps in words: 1 step, 5 steps."""
    return f"{steps} step{plural(steps)}"


_WITH_UNIT = re.compile(r"(\d{1,9}(?:\.\d{0,9})?|\.\d{1,9})\s*(step|epoch)s?", re.IGNORECASE)


def _number_or_epochs(value: int | float | str | None, least: int, allowed: str) -> int | float | str | None:
    """A part of the run in one spelling: a number of steps (also of "500 steps"), a fraction of the run, or a text such as
    "1 epoch" or "0.5 epochs". ValueError for anything else, and for less than `least` (0 or 1) steps."""
    if value is None:
        return None
    if isinstance(value, str):
        match = _WITH_UNIT.fullmatch(value.strip())
        number = Decimal(match[1]).normalize() if match else Decimal(-1)
        if match and match[2].lower() == "epoch" and number > 0:
            return f"{number:f} epoch{'' if number == 1 else 's'}"
        value = int(number) if number == int(number) else -1  # which is refused
    fits = 0 <= value < 1 and (value > 0 or least == 0) if isinstance(value, float) else least <= value <= MOST_STEPS
    if not fits:
        raise ValueError(f"must be {allowed}")
    return value


def _part_of_run(least: int, allowed: str, *, optional: bool) -> Any:
    """The type of a part of the run that is at least `least` (0 or 1) steps long."""
    fraction = {"minimum" if least == 0 else "exclusiveMinimum": 0, "exclusiveMaximum": 1}
    types = [{"type": "integer", "minimum": least, "maximum": MOST_STEPS}, {"type": "number", **fraction}]
    types += [{"type": "string"}, *([{"type": "null"}] if optional else [])]
    return Annotated[
        (int | float | str | None) if optional else (int | float | str),
        AfterValidator(partial(_number_or_epochs, least=least, allowed=allowed)),
        WithJsonSchema({"anyOf": types, "allowed": allowed}),
    ]


# `training/length.py` turns both into steps.
Every = _part_of_run(
    1,
    'a positive number of steps (500, "500 steps") or of epochs ("1 epoch", "0.5 epochs"), a fraction of the run below 1 (0.1), '
    "or null",
    optional=True,
)
Warmup = _part_of_run(
    0,
    'a number of steps (0, 50, "50 steps") or of epochs ("1 epoch"), or a fraction of the run below 1 (0.05)',
    optional=False,
)
Part = _part_of_run(
    1,
    'a positive number of steps (50, "50 steps") or of epochs ("1 epoch"), or a fraction of the run below 1 (0.2)',
    optional=False,
)
_MEMORY = re.compile(r"(\d{1,6}(?:\.\d{0,6})?)\s*(GB|GiB)", re.IGNORECASE)
_MEMORY_ALLOWED = 'a number with GB (10^9 bytes) or GiB (2^30 bytes), such as "8GB" or "7.5GiB", or null'


def memory_bytes(text: str) -> float:
    """The bytes of a memory size: "8GB" is 8 x 10^9, "8GiB" is 8 x 2^30. ValueError for any other text, and for nothing."""
    match = _MEMORY.fullmatch(text.strip())
    found = float(match[1]) * (2**30 if match[2].lower() == "gib" else 10**9) if match else 0.0
    if not found:
        raise ValueError(f"must be {_MEMORY_ALLOWED}")
    return found


def _memory_text(value: str | int | float | None) -> str | None:
    if value is None:
        return None
    memory_bytes(str(value))  # a number without a unit is refused by this, and not as another type
    return "".join(str(value).split())


Memory = Annotated[
    str | int | float | None,
    AfterValidator(_memory_text),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "null"}], "allowed": _MEMORY_ALLOWED}),
]
# The schedule of SD1.5 and SDXL has 1000 timesteps (`objectives.NUM_TIMESTEPS`); diffusers repeats the lowest for more steps.
SamplingSteps = Annotated[int, Field(ge=1, le=1000)]
# Usual scales are 1 to 20.
Guidance = Annotated[float, Field(ge=1, le=100)]
# At 8192 x 8192 pixels, one activation of the VAE at full size (128 channels, fp32) takes 32 GiB.
Side = Annotated[int, Field(ge=8, le=8192)]
ImageSide = Annotated[int, Field(ge=8, le=8192, multiple_of=8)]
# What torch and numpy take for an integer; floats are finite.
Scalar = bool | Annotated[int, Field(ge=-(2**63), lt=2**63)] | float | Annotated[str, AfterValidator(_bounded_text)]


def require_text(texts: Mapping[str, Iterable[str]]) -> None:
    """Raises ValueError for the first text, by dotted key, that could not be a caption (`caption_text.problem`)."""
    for name, group in texts.items():
        for text in group:
            if reason := caption_text.problem(text):
                advice = "shorten it" if len(text) > caption_text.MOST_LETTERS else "remove that character"
                raise ValueError(f"{name} has {text[:60]!r}, which {reason}: {advice}")


def require_few_images(rows: int, columns: int, keys: str) -> None:
    """Raises ValueError if a grid has more images than anyone looks at; `keys` says which settings make them."""
    most = 10_000
    if rows * columns > most:
        raise ValueError(f"{keys} give {rows * columns:,} images, and at most {most:,} are generated: take fewer")


class Section(BaseModel):
    """Base class of every section: frozen, strict types, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)
