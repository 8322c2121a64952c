"""One sentence for each mistake in a config: what is wrong, where, and what is allowed."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from typing import Any, NamedTuple

from sushi_research.config import other_programs
from sushi_research.config.keys import FLAGS, Keys, allowed, children, is_free, listed, options
from sushi_research.config.renamed_keys import RENAMED
from sushi_research.config.yaml12 import show

COMMAND_LINE = "on the command line"
# Problems that are listed. A file of another program can have thousands of unknown keys, and the nearest key takes a millisecond.
MOST_PROBLEMS = 20


class Setting(NamedTuple):
    """The value of a key, its source ("in configs/x.yaml" or "on the command line"), and the number of its layer: the last wins."""

    value: Any
    source: str
    layer: int = 0


def place(error: Any, keys: Keys) -> str:
    """What a pydantic error is about: the dotted name of a key, or of an entry of a free-form mapping; or a section's own check."""
    parts = [str(part) for part in error["loc"]]
    depth = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in keys.leaves), None)
    if depth is None:
        return error["msg"]
    return ".".join(parts[: depth + is_free(".".join(parts[:depth]), keys)])


def sentence(error: Any, keys: Keys, settings: dict[str, Setting]) -> str:
    """A pydantic error as one sentence: the key, its value, the allowed values, and the source of the value."""
    path = place(error, keys)
    is_check = error["type"] == "value_error"
    if is_check and path not in settings:
        return _with_sources(str(error["ctx"]["error"]), keys, settings)
    leaf = path
    while leaf not in keys.leaves:  # an entry of a free-form mapping, whose name may have dots in an entry of data.sets
        leaf = leaf.rpartition(".")[0]
    schema = keys.leaves[leaf]
    if error["type"] == "missing" and path in settings:  # an entry of a free-form mapping is itself a mapping
        return f"{path} has no {error['loc'][-1]}: add it"
    if error["type"] == "missing":
        section, _, name = path.rpartition(".")
        in_file = f"{name} under {section}: in a file" if section else f"{name} in a file"
        return f"{path} is missing: give --{path} VALUE, or {in_file} ({schema['description']})"
    if path not in settings:  # pydantic replaces halves of surrogate pairs in the name of an entry
        path = next(
            name
            for name in settings
            if name.encode("utf-8", "replace").decode() != name and is_free(name.rpartition(".")[0], keys)
        )
    value, source, _ = settings[path]
    if is_check and f"{path}[" in str(error["ctx"]["error"]):  # each entry of the list says where it is
        return f"{error['ctx']['error']} ({source})"
    source = f" {source}" if source else ""
    if is_check:
        return f"{path} is {show(value)}{source}: {error['ctx']['error']}"
    wants_text = any(option.get("type") == "string" for option in options(schema))
    hint = "; put it in quotes" if wants_text and isinstance(value, int | float) else ""
    return f"{path} is {show(value)}{source}: must be {allowed(schema)}{hint}"


def _with_sources(sentence: str, keys: Keys, settings: dict[str, Setting]) -> str:
    """Inserts the source of each key's value (or "default") after the key's first mention in the sentence."""
    seen: set[str] = set()

    def add_source(match: re.Match[str]) -> str:
        name = match[1]
        if name in seen or (name not in settings and name not in keys.leaves):
            return match[0]
        seen.add(name)
        if name not in settings and sentence.startswith(" is missing", match.end()):
            return match[0]
        return f"{match[0]} ({settings[name].source if name in settings else 'default'})"

    # An entry of a list has the source of the list: data.sets[1].flip.
    return re.sub(r"([a-z]\w*(?:\.\w+)+)((?:\[\d+\](?:\.\w+)*)*)", add_source, sentence)


def unknown(path: str, source: str, keys: Keys, suggest: bool) -> str:
    """The error for an unknown key. Suggests its new name, our name for another program's option, the nearest names,
    or all keys of its section."""
    what = f"{path} {source}".rstrip()
    if not suggest or len(path) > 100:  # comparing takes time with the square of the length
        return f"unknown key {what}: --help lists every key"
    hyphens = "--" if source == COMMAND_LINE else ""
    renamed = RENAMED.get(path.replace("-", "_"))
    if renamed in keys.leaves:
        return f"unknown key {what}: it is now called {hyphens}{renamed}"
    if hint := other_programs.hint(path, keys.leaves, hyphens):
        return f"unknown key {what}: {hint}"
    whole, element, _ = path.partition("[")
    if hyphens and element and whole in keys.leaves:
        return f"unknown key {what}: {whole} is set as a whole, in a config file or as {hyphens}{whole} '[...]'"
    candidates = [*keys.leaves, *keys.sections, *(FLAGS if hyphens else ())]
    candidates = [name for name in candidates if not path.startswith(f"{name}.")]  # not lora for lora.dora
    if near := _nearest(path.replace("-", "_"), candidates, keys):
        return f"unknown key {what}: did you mean {' or '.join(hyphens + name for name in near)}?"
    # In a section of ours: lora.network_dim.
    name = path.rpartition(".")[2]
    in_set = path.startswith("data.sets[")
    if hint := other_programs.hint_in_set(name) if in_set else other_programs.hint(name, keys.leaves, hyphens):
        return f"unknown key {what}: {hint}"
    section = path.partition(".")[0]
    if section in keys.sections:
        return f"unknown key {what}: the keys of {section} are {listed(children(section, keys))}"
    if not keys.sections:
        return f"unknown key {what}: the keys are {listed(name.rpartition('.')[2] for name in keys.leaves)}"
    return f"unknown key {what}: the sections are {listed(keys.sections)} (--help lists every key)"


def _nearest(path: str, candidates: list[str], keys: Keys) -> list[str]:
    """At most three candidates whose last part is most similar to that of `path`; a tie goes to the same section.

    A path without a dot is also compared with whole names (`lora_rank`). If nothing is similar, returns keys whose
    description begins with the words of the path (`learning_rate`).
    """
    section, dot, last = path.rpartition(".")

    def likeness(name: str) -> tuple[float, bool]:
        name_section, _, name_last = name.rpartition(".")
        whole = 0.0 if dot else SequenceMatcher(None, path, name).ratio()
        return max(whole, SequenceMatcher(None, last, name_last).ratio()), section == name_section

    best = max(likeness(name) for name in candidates)
    if best[0] >= 0.7:
        return [name for name in candidates if likeness(name) == best][:3]
    words = last.replace("_", " ")
    return [name for name, leaf in keys.leaves.items() if leaf["description"].lower().startswith(f"{words},")][:3]
