"""Scores of a run by the user's own judge: scores.json in the run folder, which a command of the user's writes.

    {"concept": {"values": {"a tuna nigiri": 1, "an egg maki": 0}, "better": "higher", "about": "learned"},
     "sharpness": {"a tuna nigiri": 0.3, "an egg maki": 0.4},
     "votes": 17}

The second and third score are short forms: of values alone, and of a single number. docs/experiments.md has the format.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter

from sushi_research.errors import UserError
from sushi_research.runs import records

# Far above what a judge gives: a file, the scores in it, their units.
MOST_BYTES = 16 * 2**20
MOST_SCORES = 100
MOST_UNITS = 100_000
# The fourth powers of such scores and of their differences can be computed with.
LEAST, MOST = 1e-40, 1e70


@dataclass(frozen=True)
class Score:
    """One score of a run: `values` by unit (a prompt, mostly), or of the unit "" for a single number.

    `about` is "learned" or "kept" if it says how well the run learned its images, or kept what the base knew.
    """

    values: dict[str, float]
    higher_is_better: bool = True
    about: str | None = None


def _printable(name: str) -> str:
    if not name.isprintable() or not name.strip():
        raise ValueError("it needs a name that can be printed")
    return name


def _not_empty(unit: str) -> str:
    if not unit:
        raise ValueError("a unit needs a name")
    return unit


def _bounded(value: float) -> float:
    if value and not LEAST < abs(value) < MOST:
        raise ValueError(f"it should be 0, or a number between {LEAST:.0e} and {MOST:.0e} but for its sign")
    return value


Number = Annotated[float, AfterValidator(_bounded)]
Values = Annotated[dict[Annotated[str, AfterValidator(_not_empty)], Number], Field(min_length=1, max_length=MOST_UNITS)]


class _Content(BaseModel):
    """A score in its long form."""

    model_config = ConfigDict(strict=True, extra="forbid")

    values: Values
    better: Literal["higher", "lower"] = "higher"
    about: Literal["learned", "kept"] | None = None


_NAME = Annotated[str, Field(max_length=100), AfterValidator(_printable)]
_NAMES = TypeAdapter(Annotated[dict[_NAME, Any], Field(min_length=1, max_length=MOST_SCORES)])
_VALUES, _NUMBER = (TypeAdapter(kind, config=ConfigDict(strict=True)) for kind in (Values, Number))


def read_scores(path: Path, remedy: str = "correct the command that wrote it") -> dict[str, Score]:
    """The scores in a file, by name. UserError if it is none: what is wrong, with the name of the score, then `remedy`."""
    content = records.read_json(path, remedy, MOST_BYTES)
    problem = records.problem_of(dict.fromkeys(content) if isinstance(content, dict) else content, _NAMES)
    for name, score in {} if problem else content.items():
        if found := records.problem_of(score, _form(score)):
            problem = f"{name}: {found}"
            break
    if problem:
        raise UserError(f"{path} does not hold scores ({problem}): {remedy}")
    return {name: _score(score) for name, score in content.items()}


def scores_of_run(run: Path, finished_at: int | None, remedy: str) -> dict[str, Score]:
    """The scores of a run that finished at a step, or of an evaluated file (None); {} if it has none.

    UserError as `read_scores`, or if the command that made them did not end well or scored another step than the last.
    """
    path, source = run / "scores.json", run / "scores_source.json"
    if os.path.lexists(source):
        made = records.read_as(source, records.ScoresSource, remedy)
        if not made["complete"]:
            raise UserError(f"{run} has no scores, because the command that makes them did not end well: run it again")
        if made["step"] != finished_at:
            raise UserError(f"{path} is of step {made['step']}, which is not the run's last one: make it again")
    return read_scores(path, remedy) if os.path.lexists(path) else {}


def _form(content: Any) -> type[BaseModel] | TypeAdapter:
    """What the content of a score has to fit: the long form, values by unit, or a single number."""
    if not isinstance(content, dict):
        return _NUMBER
    # A unit may be called "values" too, but its value is a number.
    is_short = content and all(isinstance(value, int | float) for value in content.values())
    return _VALUES if is_short else _Content


def _score(content: Any) -> Score:
    form = _form(content)
    if form is _Content:
        checked = _Content.model_validate(content)
        return Score(checked.values, checked.better == "higher", checked.about)
    values = content if form is _VALUES else {"": content}
    return Score({unit: float(value) for unit, value in values.items()})
