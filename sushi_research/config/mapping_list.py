"""A key whose value is a list of mappings, each a small section of its own: `data.sets`, `lora.overrides`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from sushi_research.config.keys import Keys, keys_of
from sushi_research.config.mistakes import MOST_PROBLEMS, Setting, sentence, unknown
from sushi_research.config.section import Section
from sushi_research.errors import UserError


def read_mappings(value: Any, key: str, section: type[Section], required: Mapping[str, str]) -> Any:
    """A validator of the list at `key`: mappings become `section`.

    `required` are the names that each must have, with the advice if one is missing. Raises UserError with one sentence per
    mistake; each names its key.
    """
    if not isinstance(value, list):
        return value
    found, problems = [], []
    for number, entry in enumerate(value):
        if isinstance(entry, section):
            found.append(entry)
            continue
        place = f"{key}[{number}]"
        if not isinstance(entry, dict):
            problems.append(f"{place} must be a mapping with {next(iter(required))} and settings of its own")
            continue
        keys = keys_in(section, place)
        unknown_names = [
            unknown(f"{place}.{name}", "", keys, True) for name in entry if f"{place}.{name}" not in keys.leaves
        ]
        missing = {name: advice for name, advice in required.items() if name not in entry}
        # A name that is written wrongly is one mistake.
        meant = {word.rstrip("?") for each in unknown_names for word in each.partition(": did you mean ")[2].split()}
        problems += unknown_names
        problems += [
            f"{place}.{name} is missing: {advice}" for name, advice in missing.items() if f"{place}.{name}" not in meant
        ]
        known = {name: value for name, value in entry.items() if f"{place}.{name}" in keys.leaves}
        try:
            found.append(section.model_validate(dict.fromkeys(required, "missing") | known))
        except ValidationError as error:
            problems += mistakes_of(error, place, keys, known)
    if problems:
        raise UserError("; ".join(problems[:MOST_PROBLEMS]))
    return found


def keys_in(section: type[Section], place: str) -> Keys:
    """The keys of a section by their names at a place, such as `data.sets[1].flip`."""
    leaves = keys_of(section.model_json_schema()).leaves
    return Keys({f"{place}.{name}": leaf for name, leaf in leaves.items()}, {})


def mistakes_of(error: ValidationError, place: str, keys: Keys, given: dict[str, Any]) -> list[str]:
    """One sentence for each mistake in the values of a mapping at `place`, whose keys are those of `keys_in`."""
    settings = {f"{place}.{name}": Setting(value, "") for name, value in given.items()}
    for name, value in given.items():  # entries of a free-form mapping are settings of their own
        entries = value.items() if isinstance(value, dict) else ()
        settings |= {f"{place}.{name}.{key}": Setting(entry, "") for key, entry in entries}
    section, _, last = place.rpartition(".")
    first: dict[tuple[Any, ...], Any] = {}
    for each in error.errors():
        first.setdefault(each["loc"][:1], {**each, "loc": (section, last, *each["loc"])})
    return [sentence(each, keys, settings) for each in first.values()]
