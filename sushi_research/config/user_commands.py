"""Commands of the user's in a config, such as `checkpoint.command`: words of a shell without a shell, with placeholders."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence


def checked(command: str, places: Sequence[str], example: str) -> str:
    """`command` itself. ValueError unless it can be split into words and has no other placeholders ({word}) than `places`."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"it cannot be split into words ({error}): correct it, as in {example}") from None
    if not words:
        raise ValueError(f"it has no words: give a command, as in {example}")
    if other := next((name for name in re.findall(r"\{\w*\}", command) if name not in places), None):
        known = (
            f"{places[0]} is the only placeholder" if len(places) == 1 else f"the placeholders are {', '.join(places)}"
        )
        raise ValueError(f"{other} is not replaced by anything: {known}, as in {example}")
    return command


def words_of(command: str, values: Mapping[str, str]) -> list[str]:
    """The command as words: `python` is the Python that runs this, and placeholders are replaced by `values` within words."""
    first, *rest = shlex.split(command)
    words = [sys.executable if first == "python" else first, *rest]
    # All in one pass, because a folder's name can be {step}.
    places = re.compile("|".join(map(re.escape, values)))
    return [places.sub(lambda found: values[found[0]], word) for word in words]
