"""YAML 1.2 scalars for config files: 1e-4 is a number, duplicate keys are errors, and every error gives its position."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from sushi_research.errors import UserError, UserErrors

# YAML 1.2's core schema. PyYAML implements 1.1, which reads 1e-4 as text, off and no as false, 1:30 as 90 and
# 2024-01-31 as a date. The dumper uses the same table, so it quotes exactly the strings that the loader would misread.
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
    """The mapping in a YAML file; {} for an empty file.

    Raises UserError if the file cannot be read, is not UTF-8 or YAML, has a duplicate key, or is not a mapping.
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
    layer = parse_yaml(text, path)
    if layer is None:
        return {}
    if not isinstance(layer, dict):
        raise UserError(f"{path} holds {show(layer)}: a config file is a mapping such as lora: {{rank: 8}}")
    return layer


def parse_yaml(text: str, place: str) -> Any:
    """Parses YAML text. A syntax error or a duplicate key raises UserError, in which `place` names the text."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        # Must run before construct_document, which copies the entries of merge keys (`<<`) into the nodes.
        duplicates = list(_duplicates(node, "", set()))
        value = None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{place}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if duplicates:
        raise UserErrors(f"{place}, {duplicate}" for duplicate in duplicates)
    return value


def _duplicates(node: yaml.Node | None, prefix: str, seen: set[int]) -> Iterator[str]:
    """Yields a sentence for each duplicate key of a mapping. `seen` stops the recursion at YAML aliases."""
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
            yield f"line {line}: {name} is already on line {lines[name]}: keep one"
        lines[name] = line
        yield from _duplicates(value, f"{name}.", seen)


def dump_yaml(content: Any) -> str:
    """`content` as YAML in its own key order. `read_yaml` reads it back as an equal value."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)


def show(value: Any) -> str:
    """A value on one line in YAML syntax, at most 80 characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except ValueError:
        # A YAML alias inside its own anchor creates a list that contains itself.
        text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
