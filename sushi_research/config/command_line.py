"""The command line: YAML layers in their order, then dotted overrides, checked as a whole before anything heavy loads.

    python scripts/train_sdxl_lora.py --config configs/sdxl_lora.yaml --config configs/overlays/8gb.yaml --lora.rank 32

Ours, because argparse and jsonargparse take an abbreviation (`--lora.ran`) for a key and name no nearest key in their
errors; jsonargparse also lets a duplicate YAML key pass and makes a string of `--optimizer.kwargs.eps 1e-8`.

Layers merge key by key; any other value, a list too, replaces the earlier one. In a free-form mapping such as
`optimizer.kwargs` null takes an earlier entry away, and null for the mapping takes them all (as in RFC 7396).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import SequenceMatcher
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from sushi_research.config.keys import FLAGS, Keys, allowed, children, help_text, is_free, keys_of, listed, options
from sushi_research.config.renamed_keys import RENAMED
from sushi_research.config.yaml12 import dump_yaml, parse_yaml, read_yaml, show
from sushi_research.errors import UserError, UserErrors

Config = TypeVar("Config", bound=BaseModel)

COMMAND_LINE = "on the command line"


class Setting(NamedTuple):
    """A value that a layer gives to a key, and where: "in configs/x.yaml" or "on the command line"."""

    value: Any
    source: str


def read_command_line(
    config_class: type[Config], *, script: str, intro: str, argv: Sequence[str] | None = None
) -> Config:
    """The config of the process's command line, as `load_config`; a UserError is printed and ends in status 2.

    A script calls it before it imports anything heavy, so that --help and a mistyped key are answered at once.
    """
    # All processes of a launch find the same error here: the first says it for them.
    try:
        with _plain_errors(silent=os.environ.get("RANK", "0") != "0"):
            return load_config(config_class, sys.argv[1:] if argv is None else argv, script=script, intro=intro)
    except BrokenPipeError:
        # `--help | head`: who read the output has seen enough. Python would complain again when it closes the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None


def read_architecture(
    classes: Mapping[str, type[Config]], arguments: Sequence[str], *, script: str, intro: str, example: str
) -> Config:
    """As `read_command_line`, where the first word is the architecture (a key of `classes`); help without one is `example`'s."""
    architecture, rest = (arguments[0], arguments[1:]) if arguments else (example, [])
    if architecture in ("-h", "--help"):
        architecture, rest = example, ["--help"]
    if architecture not in classes:
        print(
            f"error: {architecture} is not an architecture: begin with {' or '.join(classes)}, then the options of that training "
            "script.",
            file=sys.stderr,
        )
        raise SystemExit(2)
    return read_command_line(classes[architecture], script=f"{script} {architecture}", intro=intro, argv=rest)


def run_main(main: Callable[[Config], int | None], config: Config) -> None:
    """Call `main(config)` and end the process with the status that it returns, if that is not 0.

    A UserError is printed without a traceback and ends in status 2; Ctrl-C ends in status 130.
    """
    with _plain_errors():
        status = main(config)
    if status:
        raise SystemExit(status)


@contextmanager
def _plain_errors(silent: bool = False) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        if not silent:
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def load_config(config_class: type[Config], argv: Sequence[str], *, script: str, intro: str) -> Config:
    """The config that `argv` describes: the files after `--config` in their order, then the overrides.

    Without arguments it prints `intro` (five lines that say how to begin); `--help` and `--print_config` print too; all
    three end in SystemExit(0). Raises UserError with every problem found, one line each.
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
    for file in files:
        _lay(_flatten(read_yaml(file), f"in {file}", keys, problems), f"in {file}", keys, settings)
    given: set[str] = set()
    for name, text in overrides:
        nested = _value(name, text, keys)
        for part in reversed(name.split(".")):
            nested = {part: nested}
        leaves = list(_flatten(nested, COMMAND_LINE, keys, problems))
        problems += [f"{key} is given twice {COMMAND_LINE}: keep one" for key, _ in leaves if key in given]
        given.update(key for key, _ in leaves)
        _lay(leaves, COMMAND_LINE, keys, settings)

    config = _validate(config_class, keys, settings, problems)
    if print_config:
        print(config_to_yaml(config), end="")
        raise SystemExit(0)
    return config


def config_to_dict(config: BaseModel) -> dict[str, Any]:
    """The config as nested dicts of plain JSON types, in the order of its sections (for trackers and hashes)."""
    return config.model_dump(mode="json")


def config_to_yaml(config: BaseModel) -> str:
    """The config as YAML that `--config` reads back to an equal config."""
    return dump_yaml(config_to_dict(config))


def _parse(argv: Sequence[str], keys: Keys) -> tuple[list[str], list[tuple[str, str]], bool, list[str]]:
    """`argv` taken apart: config files, (dotted name, text) overrides, whether to print the config, problems."""
    files: list[str] = []
    overrides: list[tuple[str, str]] = []
    problems: list[str] = []
    print_config = False
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, text = word[2:].partition("=")
        if not word.startswith("--") or not name:
            problems.append(f"unexpected word {show(word)} {COMMAND_LINE}: a setting is written --section.key value")
        elif name in ("print_config", "print-config") and not equals:
            print_config = True
        elif name in ("dry_run", "dry-run"):
            overrides.append(("dry_run", text if equals else "true"))
        else:
            # A word that begins with two hyphens is the next setting; as a value it needs the form with `=`.
            has_value = bool(equals or (words and not words[0].startswith("--")))
            value = text if equals or not has_value else words.pop(0)
            is_entry = is_free(name.rpartition(".")[0], keys)
            if not (name == "config" or name in keys.leaves or name in keys.sections or is_entry):
                problems.append(_unknown(name, COMMAND_LINE, keys))
            elif not has_value:
                problems.append(f"--{name} needs a value: --{name}=VALUE")
            elif name == "config":
                files.append(value)
            else:
                overrides.append((name, value))
    return files, overrides, print_config, problems


def _value(name: str, text: str, keys: Keys) -> Any:
    """The value of an override. A key that holds text takes it as it stands; any other is read as YAML."""
    types = options(keys.leaves.get(name, {}))
    if all(option.get("type") in ("string", "null") for option in types):
        return None if text == "null" and {"type": "null"} in types else text
    return parse_yaml(text, f"--{name} {show(text)}")


def _flatten(
    layer: dict[Any, Any], source: str, keys: Keys, problems: list[str], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of each key, and entry of a free-form mapping, in a layer; the rest are problems."""
    for name, value in layer.items():
        path = f"{prefix}{name}"
        is_mapping = path in keys.sections or is_free(path, keys)
        if "." in str(name):
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
        else:
            problems.append(_unknown(path, source, keys))


def _lay(leaves: Iterable[tuple[str, Any]], source: str, keys: Keys, settings: dict[str, Setting]) -> None:
    """Lay one layer over `settings`. Null clears a free-form mapping, or an entry of one."""
    for path, value in leaves:
        if value is None and is_free(path, keys):
            for entry in [key for key in settings if key.startswith(f"{path}.")]:
                del settings[entry]
        elif value is None and is_free(path.rpartition(".")[0], keys):
            settings.pop(path, None)
        else:
            settings[path] = Setting(value, source)


def _validate(config_class: type[Config], keys: Keys, settings: dict[str, Setting], problems: list[str]) -> Config:
    """The config; UserError with every problem, those of the layers first."""
    nested: dict[str, Any] = {}
    for section in keys.sections:
        _put(nested, section, {})
    for path, setting in settings.items():
        _put(nested, path, setting.value)
    try:
        config = config_class.model_validate(nested)
    except ValidationError as error:
        # A value that fits none of several types has an error for each: one sentence is enough.
        problems = [*problems, *dict.fromkeys(_sentence(each, keys, settings) for each in error.errors())]
    if len(problems) > 1:
        indented = (f"  {problem}" for problem in problems)
        raise UserErrors([f"{len(problems)} problems in the configuration:", *indented])
    if problems:
        raise UserError(problems[0])
    return config


def _put(nested: dict[str, Any], path: str, value: Any) -> None:
    """Set the value at a dotted name of nested dicts."""
    *parents, name = path.split(".")
    for parent in parents:
        nested = nested.setdefault(parent, {})
    nested[name] = value


def _sentence(error: Any, keys: Keys, settings: dict[str, Setting]) -> str:
    """One pydantic error in our words, with the key, its value, what is allowed, and where the value comes from."""
    if error["type"] == "value_error":
        return _with_sources(str(error["ctx"]["error"]), keys, settings)
    parts = [str(part) for part in error["loc"]]
    depth = next(n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in keys.leaves)
    path = ".".join(parts[:depth])
    schema = keys.leaves[path]
    if error["type"] == "missing":
        section, _, name = path.rpartition(".")
        in_file = f"{name} under {section}: in a file" if section else f"{name} in a file"
        return f"{path} is missing: give --{path} VALUE, or {in_file} ({schema['description']})"
    if is_free(path, keys):
        path = ".".join(parts[: depth + 1])
    value, source = settings[path]
    wants_text = any(option.get("type") == "string" for option in options(schema))
    hint = "; put it in quotes" if wants_text and isinstance(value, int | float) else ""
    return f"{path} is {show(value)} {source}: must be {allowed(schema)}{hint}"


def _with_sources(sentence: str, keys: Keys, settings: dict[str, Setting]) -> str:
    """The sentence with the source of each key's value, or "default", after the key's first mention."""
    seen: set[str] = set()

    def add_source(match: re.Match[str]) -> str:
        name = match[0]
        if name in seen or (name not in settings and name not in keys.leaves):
            return name
        seen.add(name)
        return f"{name} ({settings[name].source if name in settings else 'default'})"

    return re.sub(r"[a-z]\w*(\.\w+)+", add_source, sentence)


def _unknown(path: str, source: str, keys: Keys) -> str:
    """The sentence for a key that does not exist, with its new name, the nearest names, or all that could be meant."""
    hyphens = "--" if source == COMMAND_LINE else ""
    renamed = RENAMED.get(path.replace("-", "_"))
    if renamed in keys.leaves:
        return f"unknown key {path} {source}: it is now called {hyphens}{renamed}"
    candidates = [*keys.leaves, *keys.sections, *(FLAGS if hyphens else ())]
    if near := _nearest(path.replace("-", "_"), candidates, keys):
        return f"unknown key {path} {source}: did you mean {' or '.join(hyphens + name for name in near)}?"
    section = path.partition(".")[0]
    if section in keys.sections:
        return f"unknown key {path} {source}: the keys of {section} are {listed(children(section, keys))}"
    if not keys.sections:
        return f"unknown key {path} {source}: the keys are {listed(keys.leaves)}"
    return f"unknown key {path} {source}: the sections are {listed(keys.sections)} (--help lists every key)"


def _nearest(path: str, candidates: list[str], keys: Keys) -> list[str]:
    """At most three names whose last part is spelt most like `path`'s, of its own section if two are equally near.

    A path without a section may also stand for a whole name (`lora_rank`). Failing both, a key whose description begins
    with its words (`learning_rate`).
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
