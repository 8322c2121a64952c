"""A tensor's name in a file -> its component, module and part, by the tables of all naming schemes."""

from __future__ import annotations

from sushi_research.adapters.formats import Place, ai_toolkit, diffusers, kohya, lycoris, onetrainer

_NAMINGS = (kohya.NAMING, diffusers.NAMING, lycoris.NAMING, onetrainer.NAMING, ai_toolkit.NAMING)
# How a module's name begins -> the component of the pipeline that it belongs to.
COMPONENTS = {prefix: component for naming in _NAMINGS for prefix, component in naming.prefixes.items()}
_ENDINGS = {ending: part for naming in _NAMINGS for ending, part in naming.endings.items()}
_BARE = frozenset(first for naming in _NAMINGS for first in naming.bare)


def place_of(key: str) -> Place | None:
    """The module and part of a tensor's name; None if it does not end like a part of an adapter."""
    key = diffusers.spelled_now(key)
    # The longest ending of the table: it has one to three dots.
    at = len(key)
    found = None
    for _ in range(3):
        at = key.rfind(".", 0, at)
        if at <= 0:
            break
        if key[at:] in _ENDINGS:
            found = Place(key[:at], _ENDINGS[key[at:]])
    return found


def split(name: str) -> tuple[str, str, str] | None:
    """(component, prefix, the rest) of a module's name in a file; None if it begins like no other."""
    for prefix, component in COMPONENTS.items():
        if name.startswith(prefix):
            return component, prefix, name.removeprefix(prefix)
    return ("unet", "", name) if name.partition(".")[0] in _BARE else None


def component_of(name: str) -> str | None:
    """The component of the pipeline that a module's name in a file belongs to; None if the name begins like no other."""
    found = split(name)
    return found[0] if found else None
