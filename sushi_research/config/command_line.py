"""The command line: YAML files, applied in order, then dotted overrides. All of it is validated before any heavy import.

    python scripts/train_sdxl_lora.py --config configs/sdxl_lora.yaml --config configs/overlays/8gb.yaml --lora.rank 32

We parse it ourselves because argparse and jsonargparse accept abbreviated keys (`--lora.ran`) and do not suggest the
nearest key in their errors. jsonargparse also accepts duplicate YAML keys and reads `--optimizer.kwargs.eps 1e-8` as a
string.

Mappings are merged key by key. Any other value, including a list, replaces the earlier one, and a key replaces an
earlier one that says the same thing in another way (train.epochs for train.steps). In a free-form mapping such
as `optimizer.kwargs`, null removes an earlier entry, and null for the whole mapping removes all entries (as in RFC 7396).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from sushi_research.config import effects, other_programs
from sushi_research.config.keys import (
    SCALARS,
    Keys,
    allowed,
    children,
    default_values,
    help_text,
    is_free,
    keys_of,
    listed,
    options,
)
from sushi_research.config.mistakes import COMMAND_LINE, MOST_PROBLEMS, Setting, place, sentence, unknown
from sushi_research.config.yaml12 import dump_yaml, parse_yaml, read_yaml, show
from sushi_research.errors import UserError, UserErrors

Config = TypeVar("Config", bound=BaseModel)

# Pairs of keys that say the same thing in two ways.
_PAIRS = (("train.steps", "train.epochs"), ("sample.prompts", "sample.prompts_file"), ("data.path", "data.sets"))
INSTEAD = {one: other for pair in _PAIRS for one, other in (pair, pair[::-1])}


def load_config(config_class: type[Config], argv: Sequence[str], *, script: str, intro: str) -> Config:
    """The config that `argv` describes: the files after `--config`, in order, then the overrides.

    Prints `intro` (five lines on how to begin) if there are no arguments. This, `--help` and `--print_config` end in
    SystemExit(0). Raises UserError with every problem found, one per line.
    """
    assert len(intro.strip().splitlines()) == 5, "the introduction has five lines"
    if not argv:
        print(intro.strip())
        raise SystemExit(0)
    keys = keys_of(config_class.model_json_schema())
    if "-h" in argv or "--help" in argv:
        print(help_text(keys, script), flush=True)
        raise SystemExit(0)
    files, overrides, print_config, problems = _parse(argv, keys)

    settings: dict[str, Setting] = {}
    recorded = {layer for layer, file in enumerate(files) if _is_of_a_run(file)}
    read = getattr(config_class, "read_file", read_yaml)  # a class may read files of other forms too
    for layer, file in enumerate(files):
        leaves = list(_flatten(read(file), f"in {file}", keys, problems))
        problems += _commands(file, leaves) if layer in recorded else []
        _lay(leaves, (f"in {file}", layer), keys, settings)
    given: set[str] = set()
    for name, text in overrides:
        nested = _value(name, text, keys)
        for part in reversed(name.split(".")):
            nested = {part: nested}
        leaves = list(_flatten(nested, COMMAND_LINE, keys, problems))
        problems += [f"{key} is given twice {COMMAND_LINE}: keep one" for key, _ in leaves if key in given]
        given.update(key for key, _ in leaves)
        _lay(leaves, (COMMAND_LINE, len(files)), keys, settings)

    effects.drop_earlier(getattr(config_class, "rules", ()), settings, default_values(config_class), recorded)
    config = _validate(config_class, keys, settings, problems)
    if print_config:
        print(config_to_yaml(config), end="")
        raise SystemExit(0)
    return config


# The keys that no config.yaml of a run has, and what they would be.
NEVER_STORED = {"checkpoint.command": "no command", "run.push_to_hub": "no upload"}


def config_to_dict(config: BaseModel) -> dict[str, Any]:
    """The config as nested dicts of JSON types, in section order (for trackers and hashes)."""
    return config.model_dump(mode="json")


def config_to_yaml(config: BaseModel) -> str:
    """The config as YAML. `--config` reads it back as an equal config."""
    return dump_yaml(config_to_dict(config))


def _is_of_a_run(file: str) -> bool:
    """Whether a config file is in a run folder."""
    return os.path.lexists(os.path.join(os.path.dirname(file), "run.json"))


def _commands(file: str, leaves: Iterable[tuple[str, Any]]) -> list[str]:
    """A problem if the config of a run folder, which may be a stranger's, has a key of NEVER_STORED."""
    return [
        f"{key} is set in {file}, which is in a run folder, and {NEVER_STORED[key]} is taken from there: give it as --{key}"
        for key, value in leaves
        if key in NEVER_STORED and value is not None
    ]


def _parse(argv: Sequence[str], keys: Keys) -> tuple[list[str], list[tuple[str, str]], bool, list[str]]:
    """Splits `argv` into config files, (dotted name, text) overrides, whether to print the config, and problems."""
    files: list[str] = []
    overrides: list[tuple[str, str]] = []
    problems: list[str] = []
    print_config = False
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, text = word[2:].partition("=")
        if not word.startswith("--") or not name:
            quotes = ", and a value of several words in quotes" if not word.startswith("-") else ""
            problems.append(
                f"unexpected word {show(word)} {COMMAND_LINE}: a setting is written --section.key value{quotes}"
            )
            continue
        # A word that begins with two hyphens is the next setting. To use one as a value, write --key=--value.
        has_value = bool(equals or (words and not words[0].startswith("--")))
        value = text if equals or not has_value else words.pop(0)
        if name.replace("-", "_") in ("print_config", "help"):
            if has_value:
                problems.append(f"--{name} takes no value, and {show(value)} follows it {COMMAND_LINE}: remove that")
            print_config = True
        elif name in ("dry_run", "dry-run") or (name == "status" and name in keys.leaves):
            overrides.append((name.replace("-", "_"), value if has_value else "true"))
        else:
            is_entry = is_free(name.rpartition(".")[0], keys)
            if not (name == "config" or name in keys.leaves or name in keys.sections or is_entry):
                problems.append(unknown(name, COMMAND_LINE, keys, len(problems) < MOST_PROBLEMS))
            elif not has_value:
                problems.append(f"--{name} needs a value: --{name}=VALUE")
            elif name == "config":
                files.append(value)
            else:
                overrides.append((name, value))
    return files, overrides, print_config, problems


def _value(name: str, text: str, keys: Keys) -> Any:
    """The value of an override: the text itself for a key of type string, otherwise the text parsed as YAML.

    For a key that takes a list, a text that is none is a list of one: a text as it stands (`mrwhiskers, 1cat`), or a number.
    """
    types = options(keys.leaves.get(name, {}))
    if all(option.get("type") in ("string", "null") for option in types):
        return None if text == "null" and {"type": "null"} in types else text
    if all(option.get("type") in ("array", "null") for option in types):
        return _list(text, f"--{name} {show(text)}", types)
    value = parse_yaml(text, f"--{name} {show(text)}")
    # YAML reads an empty text as null. From an unset variable of a shell it must not switch something off.
    return text if value is None and text not in ("null", "~") else value


def _list(text: str, place: str, types: list[dict[str, Any]]) -> Any:
    """The list that an override gives, None if it is null, or the text itself if it can be neither."""
    entries = [each for option in types if "items" in option for each in options(option["items"])]
    is_of_texts = any(entry.get("type") == "string" for entry in entries)
    start = text.lstrip()[:1]
    if start == "[" or (start == "{" and any(entry.get("type") not in SCALARS for entry in entries)):
        try:
            value = parse_yaml(text, place)
        except UserError as error:
            quoted = (
                f"; a text that begins with {start} goes into a list, in quotes: '[\"...\"]'" if is_of_texts else ""
            )
            raise UserError(f"{error}{quoted}") from None
    elif text == "null":
        return None
    elif is_of_texts:
        value = text
    else:
        value = parse_yaml(text, place)
        value = text if value is None else value
    return [value] if isinstance(value, dict | int | float) or (is_of_texts and value and value is text) else value


def _flatten(
    layer: dict[Any, Any], source: str, keys: Keys, problems: list[str], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) of each key and free-form entry in a layer. Appends anything else to `problems`."""
    for name, value in layer.items():
        path = f"{prefix}{name}"
        is_mapping = path in keys.sections or is_free(path, keys)
        if "." in str(name) and is_free(prefix[:-1], keys):
            problems.append(
                f"{prefix[:-1]} has the entry {show(str(name))} {source}, and no entry can have a dot: remove it"
            )
        elif "." in str(name):
            nested = ": {".join(path.split("."))
            problems.append(f"the key {path} {source} has a dot: nest it, as in {nested}: ...{'}' * path.count('.')}")
        elif is_mapping and isinstance(value, dict):
            yield from _flatten(value, source, keys, problems, f"{path}.")
        elif path in keys.sections:
            # In a file, a section whose keys are all commented out reads as null.
            if value is not None or source == COMMAND_LINE:
                names = listed(children(path, keys))
                problems.append(f"{path} is {show(value)} {source}: it is a section, with the keys {names}")
        elif is_mapping and value is not None:
            entry = allowed(keys.leaves[path])
            problems.append(f"{path} is {show(value)} {source}: must be a mapping, each entry {entry}")
        elif path in keys.leaves or is_free(prefix[:-1], keys):
            yield path, value
        elif isinstance(value, dict) and other_programs.has_parts(path):
            yield from _flatten(value, source, keys, problems, f"{path}.")
        else:
            problems.append(unknown(path, source, keys, len(problems) < MOST_PROBLEMS))


def _lay(leaves: Iterable[tuple[str, Any]], layer: tuple[str, int], keys: Keys, settings: dict[str, Setting]) -> None:
    """Merges one layer, given as its source and its number, into `settings`. Null removes a free-form mapping, or an entry of one.

    Of two keys that say the same thing in different ways (`INSTEAD`), the later layer's replaces the other one.
    """
    for path, value in leaves:
        other = settings.get(INSTEAD.get(path, ""))
        if value is not None and other is not None and other.layer < layer[1]:
            del settings[INSTEAD[path]]
        if value is None and is_free(path, keys):
            for entry in [key for key in settings if key.startswith(f"{path}.")]:
                del settings[entry]
        elif value is None and is_free(path.rpartition(".")[0], keys):
            settings.pop(path, None)
        else:
            settings[path] = Setting(value, *layer)


def _validate(config_class: type[Config], keys: Keys, settings: dict[str, Setting], problems: list[str]) -> Config:
    """Validates the settings. Raises UserError with all problems: first those in `problems`, then those of the values."""
    nested: dict[str, Any] = {}
    for section in keys.sections:
        _put(nested, section, {})
    for path, setting in settings.items():
        _put(nested, path, setting.value)
    try:
        config = config_class.model_validate(nested)
    except ValidationError as error:
        # pydantic reports one error per type that a value may have, and one per entry of a list. We need one sentence per value.
        errors: dict[str, Any] = {}
        for each in error.errors():
            errors.setdefault(place(each, keys), each)
        problems = [*problems, *(sentence(each, keys, settings) for each in errors.values())]
    if len(problems) > 1:
        indented = [f"  {problem}" for problem in problems[:MOST_PROBLEMS]]
        more = len(problems) - len(indented)
        raise UserErrors(
            [f"{len(problems)} problems in the configuration:", *indented, *([f"  and {more} more"] if more else [])]
        )
    if problems:
        raise UserError(problems[0])
    return config


def _put(nested: dict[str, Any], path: str, value: Any) -> None:
    """Sets the value at a dotted name in nested dicts."""
    *parents, name = path.split(".")
    for parent in parents:
        nested = nested.setdefault(parent, {})
    nested[name] = value
