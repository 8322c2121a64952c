"""The command line: YAML layers in their order, then dotted overrides, checked as a whole before anything heavy loads.

    python scripts/train_sdxl_lora.py --config configs/sdxl_lora.yaml --config configs/overlays/8gb.yaml --lora.rank 32

Ours, because argparse and jsonargparse take an abbreviation (`--lora.ran`) for a key and name no nearest key in their
errors; jsonargparse also lets a duplicate YAML key pass and makes a string of `--optimizer.kwargs.eps 1e-8`.

Layers merge key by key; any other value, a list too, replaces the earlier one. In a free-form mapping such as
`optimizer.kwargs` null takes an earlier entry away, and null for the mapping takes them all (as in RFC 7396).
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from sushi_research.errors import UserError

Config = TypeVar("Config", bound=BaseModel)

COMMAND_LINE = "on the command line"
FLAGS = {
    "config": "A YAML file of settings; give it again to lay another file over it",
    "print_config": "Print the resolved settings as YAML, which --config reads back, and stop",
    "help": "Print this and stop (also -h)",
}


class Setting(NamedTuple):
    """A value that a layer gives to a key, and where: "in configs/x.yaml" or "on the command line"."""

    value: Any
    source: str


class Keys(NamedTuple):
    """What a config class has: the JSON schema of each key and the description of each section, by dotted name."""

    leaves: dict[str, dict[str, Any]]
    sections: dict[str, str]


def read_command_line(
    config_class: type[Config], *, script: str, intro: str, argv: Sequence[str] | None = None
) -> Config:
    """The config of the process's command line, as `load_config`; a UserError is printed and ends in status 2.

    A script calls it before it imports anything heavy, so that --help and a mistyped key are answered at once.
    """
    with _plain_errors():
        return load_config(config_class, sys.argv[1:] if argv is None else argv, script=script, intro=intro)


def run_main(main: Callable[[Config], int | None], config: Config) -> None:
    """Call `main(config)` and end the process with the status that it returns, if that is not 0.

    A UserError is printed without a traceback and ends in status 2; Ctrl-C ends in status 130.
    """
    with _plain_errors():
        status = main(config)
    if status:
        raise SystemExit(status)


@contextmanager
def _plain_errors() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def run_script(
    main: Callable[[Config], Any],
    config_class: type[Config],
    *,
    script: str,
    intro: str,
    argv: Sequence[str] | None = None,
) -> None:
    """Call `main` with the config that the command line describes.

    A UserError, from the command line or from `main`, is printed without a traceback and ends in status 2; Ctrl-C ends
    in status 130. `argv` without the program's name; None means the process's own.
    """
    try:
        main(load_config(config_class, sys.argv[1:] if argv is None else argv, script=script, intro=intro))
    except UserError as error:
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
    keys = _keys(config_class.model_json_schema())
    if "-h" in argv or "--help" in argv:
        print(_help(keys, script))
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
    return yaml.dump(config_to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)


# --- YAML ---

# YAML 1.2's core schema in place of PyYAML's 1.1, which reads 1e-4 as text, off and no as false, 1:30 as 90 and
# 2024-01-31 as a date. The dumper shares the table, so that it quotes just what the loader would misread.
_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    "float": (
        r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[Any]] = {}


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, list[Any]] = {}


for _tag, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # PyYAML writes the rarer line breaks (U+0085, U+2028, U+2029) unescaped and reads them back as spaces.
    style = None if text.splitlines() in ([], [text]) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML file; {} for an empty one.

    Raises UserError when the file cannot be read, is not UTF-8 or YAML, gives a key twice, or holds no mapping.
    """
    try:
        text = Path(path).read_bytes().decode()
    except FileNotFoundError:
        raise UserError(f"there is no file {path}: check the path after --config") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: --config takes a YAML file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    layer = _parse_yaml(text, path)
    if layer is None:
        return {}
    if not isinstance(layer, dict):
        raise UserError(f"{path} holds {_show(layer)}: a config file is a mapping such as lora: {{rank: 8}}")
    return layer


def _parse_yaml(text: str, place: str) -> Any:
    """The value of a YAML text; `place` names it in the UserError that a syntax error or a duplicate key raises."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        # Before the construction, which writes the entries of merge keys (`<<`) into the nodes.
        duplicates = list(_duplicates(node, "", set()))
        value = None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{place}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if duplicates:
        raise UserError("\n".join(f"{place}, {duplicate}" for duplicate in duplicates))
    return value


def _duplicates(node: yaml.Node | None, prefix: str, seen: set[int]) -> Iterator[str]:
    """A sentence for each key that stands twice in one mapping; `seen` ends the recursion of a YAML alias."""
    if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _duplicates(item, prefix, seen)
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        name, line = f"{prefix}{key.value}", key.start_mark.line + 1
        if name in lines:
            yield f"line {line}: {name} stands already on line {lines[name]}: keep one"
        lines[name] = line
        yield from _duplicates(value, f"{name}.", seen)


# --- keys, layers and the check ---


def _keys(schema: dict[str, Any]) -> Keys:
    """The keys that a config class has, from its JSON schema."""
    keys = Keys({}, {})

    def walk(node: dict[str, Any], prefix: str) -> None:
        for name, value in node["properties"].items():
            if "$ref" in value:
                section = schema["$defs"][value["$ref"].rpartition("/")[2]]
                keys.sections[prefix + name] = section.get("description", "")
                walk(section, f"{prefix}{name}.")
            else:
                keys.leaves[prefix + name] = value

    walk(schema, "")
    return keys


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
            problems.append(f"unexpected word {_show(word)} {COMMAND_LINE}: a setting is written --section.key value")
        elif name in ("print_config", "print-config") and not equals:
            print_config = True
        elif name in ("dry_run", "dry-run"):
            overrides.append(("dry_run", text if equals else "true"))
        else:
            # A word that begins with two hyphens is the next setting; as a value it needs the form with `=`.
            has_value = bool(equals or (words and not words[0].startswith("--")))
            value = text if equals or not has_value else words.pop(0)
            is_entry = _is_free(name.rpartition(".")[0], keys)
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
    options = _options(keys.leaves.get(name, {}))
    if all(option.get("type") in ("string", "null") for option in options):
        return None if text == "null" and {"type": "null"} in options else text
    return _parse_yaml(text, f"--{name} {_show(text)}")


def _flatten(
    layer: dict[Any, Any], source: str, keys: Keys, problems: list[str], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of each key, and entry of a free-form mapping, in a layer; the rest are problems."""
    for name, value in layer.items():
        path = f"{prefix}{name}"
        is_mapping = path in keys.sections or _is_free(path, keys)
        if "." in str(name):
            nested = ": {".join(path.split("."))
            problems.append(f"the key {path} {source} has a dot: nest it, as in {nested}: ...{'}' * path.count('.')}")
        elif is_mapping and isinstance(value, dict):
            yield from _flatten(value, source, keys, problems, f"{path}.")
        elif path in keys.sections:
            # In a file, a section whose keys are all commented out reads as null.
            if value is not None or source == COMMAND_LINE:
                names = _listed(_children(path, keys))
                problems.append(f"{path} is {_show(value)} {source}: it is a section, with the keys {names}")
        elif is_mapping and value is not None:
            entry = _allowed(keys.leaves[path])
            problems.append(f"{path} is {_show(value)} {source}: must be a mapping, each entry {entry}")
        elif path in keys.leaves or _is_free(prefix[:-1], keys):
            yield path, value
        else:
            problems.append(_unknown(path, source, keys))


def _lay(leaves: Iterable[tuple[str, Any]], source: str, keys: Keys, settings: dict[str, Setting]) -> None:
    """Lay one layer over `settings`. Null clears a free-form mapping, or an entry of one."""
    for path, value in leaves:
        if value is None and _is_free(path, keys):
            for entry in [key for key in settings if key.startswith(f"{path}.")]:
                del settings[entry]
        elif value is None and _is_free(path.rpartition(".")[0], keys):
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
        raise UserError("\n  ".join([f"{len(problems)} problems in the configuration:", *problems]))
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
    if _is_free(path, keys):
        path = ".".join(parts[: depth + 1])
    value, source = settings[path]
    wants_text = any(option.get("type") == "string" for option in _options(schema))
    hint = "; put it in quotes" if wants_text and isinstance(value, int | float) else ""
    return f"{path} is {_show(value)} {source}: must be {_allowed(schema)}{hint}"


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
    """The sentence for a key that does not exist, with the nearest names or, failing those, all that could be meant."""
    hyphens = "--" if source == COMMAND_LINE else ""
    candidates = [*keys.leaves, *keys.sections, *(FLAGS if hyphens else ())]
    if near := _nearest(path.replace("-", "_"), candidates, keys):
        return f"unknown key {path} {source}: did you mean {' or '.join(hyphens + name for name in near)}?"
    section = path.partition(".")[0]
    if section in keys.sections:
        return f"unknown key {path} {source}: the keys of {section} are {_listed(_children(section, keys))}"
    return f"unknown key {path} {source}: the sections are {_listed(keys.sections)} (--help lists every key)"


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


# --- wording ---

_TYPES = {
    "null": "null",
    "boolean": "true or false",
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
}
_LIMITS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
    "multipleOf": "a multiple of",
}


def _help(keys: Keys, script: str) -> str:
    """The text of `--help`: every key by section, with what it takes and its default, as wide as the terminal."""
    width = min(max(shutil.get_terminal_size((100, 24)).columns, 50), 120)
    lines = textwrap.wrap(
        f"usage: {script} --config FILE [--config FILE ...] [--section.key VALUE ...]", width, subsequent_indent="  "
    )

    def entry(name: str, takes: str, text: str) -> None:
        lines.extend(textwrap.wrap(f"{name}  {takes}", width, initial_indent="  ", subsequent_indent=" " * 8))
        lines.extend(textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6))

    for name, text in FLAGS.items():
        entry(f"--{name}", "FILE" if name == "config" else "", text)
    for section, heading in {"": "", **keys.sections}.items():
        lines += ["", *textwrap.wrap(f"{section}: {heading}", width)] if section else []
        for name in _children(section, keys):
            path = f"{section}.{name}" if section else name
            schema = keys.leaves[path]
            default = f"default: {_show(schema['default'])}" if "default" in schema else "required"
            entry(f"--{path}", f"{_allowed(schema)}; {default}", schema["description"])
    return "\n".join(lines)


def _allowed(schema: dict[str, Any]) -> str:
    """What a key takes, in words, from its JSON schema."""
    if "allowed" in schema:
        return schema["allowed"]
    if "anyOf" in schema:
        return " or ".join(_allowed(option) for option in schema["anyOf"])
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return f"{', '.join(schema['enum'][:-1])} or {schema['enum'][-1]}"
    if schema["type"] == "array":
        return f"a list{', not empty,' if 'minItems' in schema else ''} whose entries are {_allowed(schema['items'])}"
    limits = [f"{text} {schema[key]}" for key, text in _LIMITS.items() if key in schema]
    if "minLength" in schema:
        limits.append("not empty")
    return _TYPES[schema["type"]] + (f" ({', '.join(limits)})" if limits else "")


def _options(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The types that a key may have, as JSON schemas."""
    return schema.get("anyOf", [schema])


def _is_free(path: str, keys: Keys) -> bool:
    """Whether the key holds a free-form mapping."""
    return keys.leaves.get(path, {}).get("type") == "object"


def _children(section: str, keys: Keys) -> list[str]:
    """The names of a section's keys, without the section; "" stands for the keys outside sections."""
    return [name.rpartition(".")[2] for name in keys.leaves if name.rpartition(".")[0] == section]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def _show(value: Any) -> str:
    """A value on one line, as YAML would have it."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except ValueError:
        # A YAML alias inside its own anchor makes a list that holds itself.
        text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
