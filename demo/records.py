"""Recorded results: numbers measured once, stored in a JSON file with the hashes of their inputs.

A record contains the SHA-256 of every input and the versions of the libraries used. So a test reads the numbers in
milliseconds and detects when they must be measured again.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
LIBRARIES = ("diffusers", "torch", "transformers")


def input_hash(path: Path) -> str:
    """SHA-256 of a file's meaning.

    For Python it covers the code without comments, docstrings and formatting; for YAML the parsed content; for other files the
    bytes. So rewording a comment does not invalidate a record.
    """
    content = path.read_bytes()
    if path.suffix == ".py":
        content = json.dumps(_code(ast.parse(content))).encode()
    elif path.suffix == ".yaml":
        content = json.dumps(yaml.safe_load(content), sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


def _code(node: Any) -> Any:
    """A syntax tree as lists and strings, without positions, docstrings and empty fields, so that Python versions agree."""
    if isinstance(node, list):
        return [_code(each) for each in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
        fields["body"] = node.body[1:]
    kept = {name: value for name, value in fields.items() if not (value is None or value == [])}
    return [type(node).__name__, {name: _code(value) for name, value in kept.items()}]


def dependencies(inputs: Iterable[Path], root: Path = ROOT) -> dict[str, dict[str, str]]:
    """ "inputs": paths below `root` -> SHA-256; "versions": libraries -> version without the build suffix ("+cpu")."""
    return {
        "inputs": {path.relative_to(root).as_posix(): input_hash(path) for path in sorted(inputs)},
        "versions": {name: version(name).partition("+")[0] for name in LIBRARIES},
    }


def differences(recorded: dict[str, dict[str, str]], today: dict[str, dict[str, str]], part: str) -> list[str]:
    """The names in `part` ("inputs" or "versions") whose values differ or that only one of the two has."""
    before, after = recorded[part], today[part]
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def write_record(path: Path, depends: dict[str, dict[str, str]], results: dict[str, Any]) -> None:
    """Writes a record as JSON."""
    path.write_text(json.dumps(depends | {"results": results}, indent=2, sort_keys=True) + "\n")
    print(f"written: {path}")


def read_record(path: Path) -> dict[str, Any]:
    """Reads a record with the keys "inputs", "versions" and "results"."""
    return json.loads(path.read_text())
