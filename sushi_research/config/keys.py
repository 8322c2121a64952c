"""The keys of a config class by dotted name, and their descriptions for `--help` and error messages."""

from __future__ import annotations

import functools
import shutil
import textwrap
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from pydantic import BaseModel

from sushi_research.config.yaml12 import show

FLAGS = {
    "config": "YAML file with settings; repeat it to override with further files",
    "print_config": "Print the resolved settings as YAML (--config can read it) and exit",
    "help": "Print this text and exit (also -h)",
}
_TYPES = {
    "null": "null",
    "boolean": "true or false",
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
}
SCALARS = ("string", "integer", "number", "boolean", "null")
_LIMITS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
    "multipleOf": "a multiple of",
}


class Keys(NamedTuple):
    """The JSON schema of each key and the description of each section, by dotted name."""

    leaves: dict[str, dict[str, Any]]
    sections: dict[str, str]


def keys_of(schema: dict[str, Any]) -> Keys:
    """The keys of a config class, from its JSON schema."""
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


@functools.cache
def default_values(config_class: type[BaseModel]) -> Mapping[str, Any]:
    """The default of each key of a config class, as JSON values by dotted name. Required keys have none."""
    leaves = keys_of(config_class.model_json_schema()).leaves
    return MappingProxyType({name: leaf["default"] for name, leaf in leaves.items() if "default" in leaf})


def help_text(keys: Keys, script: str) -> str:
    """The text of `--help`: all keys by section, with allowed values and defaults, wrapped to the terminal width."""
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
        for name in children(section, keys):
            path = f"{section}.{name}" if section else name
            schema = keys.leaves[path]
            default = f"default: {show(schema['default'])}" if "default" in schema else "required"
            entry(f"--{path}", f"{allowed(schema)}; {default}", schema["description"])
    return "\n".join(lines)


def allowed(schema: dict[str, Any]) -> str:
    """The allowed values of a key as text, from its JSON schema."""
    if "allowed" in schema:
        return schema["allowed"]
    if "anyOf" in schema:
        choices = [
            choice
            for option in schema["anyOf"]
            for choice in (option["enum"] if "enum" in option and "allowed" not in option else [allowed(option)])
        ]
        return f"{', '.join(choices[:-1])} or {choices[-1]}"
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return f"{', '.join(schema['enum'][:-1])} or {schema['enum'][-1]}"
    if schema["type"] == "array":
        form = "[a, b]" if any(option.get("type") == "string" for option in options(schema["items"])) else "[1, 2]"
        not_empty = ", not empty" if "minItems" in schema else ""
        return f"a list such as {form}{not_empty}, whose entries are {allowed(schema['items'])}"
    limits = [f"{text} {schema[key]}" for key, text in _LIMITS.items() if key in schema]
    if "minLength" in schema:
        limits.append("not empty")
    return _TYPES[schema["type"]] + (f" ({', '.join(limits)})" if limits else "")


def options(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The allowed types of a key, as JSON schemas."""
    return schema.get("anyOf", [schema])


def is_free(path: str, keys: Keys) -> bool:
    """Whether the key holds a free-form mapping."""
    return keys.leaves.get(path, {}).get("type") == "object"


def children(section: str, keys: Keys) -> list[str]:
    """The names of a section's keys, without the section name; "" means the top-level keys."""
    return [name.rpartition(".")[2] for name in keys.leaves if name.rpartition(".")[0] == section]


def listed(names: Iterable[str]) -> str:
    return ", ".join(names)
