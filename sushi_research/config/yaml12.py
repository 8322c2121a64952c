"""YAML 1.2 scalars for config files: 1e-4 is a number, duplicate keys are errors, and every error gives its position."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from sushi_research.errors import UserError, UserErrors, first_line
from sushi_research.user_files import MOST_NESTED, expand_path, read_regular

# A config with a thousand prompts has about 200 kB and 2000 values. PyYAML reads 20,000 values in a second or two.
_MOST_BYTES = 2**20
_MOST_VALUES = 20_000

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
    """PyYAML's loader for YAML 1.2's scalars, with bounds on the number of values and the depth of their nesting."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}
    most_values = _MOST_VALUES
    _values = _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """As in the base class, which calls it again for each level of nesting."""
        self._values += 1
        self._depth += 1
        if self._values > self.most_values or self._depth > MOST_NESTED:
            reason = (
                _too_many(self.most_values)
                if self._values > self.most_values
                else f"it is nested more than {MOST_NESTED} deep"
            )
            raise yaml.MarkedYAMLError(problem=reason, problem_mark=self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """As in the base class, whose functions raise nearly any exception for a text that does not fit its tag."""
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int):
                str(value)  # with a tag, hexadecimal digits are read too, and Python's limit counts only decimal ones
            return value
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
            what = show(node.value) if isinstance(node, yaml.ScalarNode) else "it"
            reason = f"{what} cannot be read as {node.tag.rpartition(':')[2]}"
            raise yaml.MarkedYAMLError(problem=reason, problem_mark=node.start_mark) from None


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
    file = Path(expand_path(path, key="--config"))
    if file.is_dir():
        raise UserError(f"{path} is a folder: --config takes a YAML file")
    if file.suffix.lower() == ".toml":
        raise UserError(
            f"{path} is TOML, and a config file here is YAML: write the settings anew under our names (docs/guides/from_kohya.md)"
        )
    try:
        text = read_regular(file, _MOST_BYTES).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    layer = parse_yaml(text, path)
    if layer is None:
        return {}
    if not isinstance(layer, dict):
        raise UserError(f"{path} holds {show(layer)}: a config file is a mapping such as lora: {{rank: 8}}")
    return layer


def parse_yaml(text: str, place: str, *, unique_keys: bool = True, most_values: int = _MOST_VALUES) -> Any:
    """Parses YAML text.

    Raises UserError, in which `place` names the text, for a syntax error, too many values, too much nesting, or with `unique_keys`
    for a duplicate key. Without it the last of them counts.
    """
    try:
        loader = _Loader(text)
        loader.most_values = most_values
        node = loader.get_single_node()
        if node is not None and _extent(node, {})[0] > most_values:
            raise yaml.MarkedYAMLError(problem=_too_many(most_values))
        # Must run before construct_document, which copies the entries of merge keys (`<<`) into the nodes.
        duplicates = list(_duplicates(node, "", set())) if unique_keys else []
        value = None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(
            f"{place}{line}: not valid YAML: {getattr(error, 'problem', None) or first_line(error)}"
        ) from None
    if duplicates:
        raise UserErrors(f"{place}, {duplicate}" for duplicate in duplicates)
    return value


def _too_many(most_values: int) -> str:
    return f"it has more than {most_values:,} values, its aliases counted in full"


def _extent(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """(number of values, depth) of a node whose aliases are replaced by what they stand for. `known` has those of other nodes.

    Raises YAMLError if that is nested more than MOST_NESTED deep, or has no end because an alias is inside its own anchor.
    """
    if id(node) not in known:
        known[id(node)] = (0, MOST_NESTED)  # until it is known: what contains itself has no end
        parts = (
            [node.value]
            if isinstance(node, yaml.SequenceNode)
            else node.value
            if isinstance(node, yaml.MappingNode)
            else []
        )
        found = [_extent(child, known) for part in parts for child in part]
        known[id(node)] = 1 + sum(values for values, _ in found), 1 + max((depth for _, depth in found), default=0)
        if known[id(node)][1] > MOST_NESTED:
            reason = f"with its aliases it is nested more than {MOST_NESTED} deep"
            raise yaml.MarkedYAMLError(problem=reason, problem_mark=node.start_mark)
    return known[id(node)]


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
        if not isinstance(key, yaml.ScalarNode):
            continue  # it cannot be constructed
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
