"""The hash of a source file's syntax tree, and the imports in it."""

from __future__ import annotations

import ast
import functools
import re
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

from sushi_research.fingerprints import content_hash

# Fields of syntax nodes that do not affect what the code does, or that differ between versions of Python.
WITHOUT_EFFECT = {"ctx", "kind", "type_comment", "type_ignores"}
_FILE = re.compile(r"[^\W\d]\w*\.py")
IMPORTERS = ("import_module", "__import__")  # functions that import the module of a name
_MAY_IMPORT = {ast.Import, ast.ImportFrom, ast.Call, ast.Constant, ast.Assign}


class Import(NamedTuple):
    """An import in a syntax tree: `from <level dots><module> import <names>`. A name may be or contain a *: any module of the
    package, because `__all__` may name it."""

    level: int
    module: str
    names: tuple[str, ...]


@functools.lru_cache(maxsize=1024)
def parsed(source: bytes) -> tuple[str, tuple[Import, ...]]:
    """(hash, imports) of a source file. What is not Python source is hashed byte by byte."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return content_hash(source), ()
    text, importing = _canonical(tree)
    meanings = _Meanings.of(importing)
    return content_hash(text.encode()), tuple(found for node in importing for found in _imports_of(node, meanings))


class _Meanings(NamedTuple):
    """What names stand for in a source file: the functions that import a module, and texts (`NAME = "losses"`)."""

    importers: frozenset[str]
    texts: dict[str, str]

    @classmethod
    def of(cls, nodes: Sequence[ast.AST]) -> _Meanings:
        importers, texts = set(IMPORTERS), {}
        for node in nodes:
            if isinstance(node, ast.ImportFrom):
                importers |= {alias.asname for alias in node.names if alias.asname and alias.name in IMPORTERS}
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                if isinstance(node.value.value, str):
                    texts |= {target.id: node.value.value for target in node.targets if isinstance(target, ast.Name)}
        return cls(frozenset(importers), texts)


def _canonical(tree: ast.AST) -> tuple[str, list[ast.AST]]:
    """(a syntax tree as text, without what has no effect; those of its nodes that may say what is imported, in their order).

    `ast.dump` will not do: its text differs between versions of Python, which add fields. So empty fields are left out.
    """
    parts: list[str] = []
    importing: list[ast.AST] = []
    stack: list[Any] = [tree]
    while stack:
        node = stack.pop()
        kind = type(node)
        if kind is str:
            parts.append(node)
            continue
        if kind in _MAY_IMPORT:
            importing.append(node)
        parts.append(f"({kind.__name__}")
        after: list[Any] = []
        for name in kind._fields:
            value = getattr(node, name, None)
            if value is None or name in WITHOUT_EFFECT:
                continue
            if type(value) is list:
                if value := _effective(value):
                    items = (item if isinstance(item, ast.AST) else _plain(item) for item in value)
                    after += [f" {name}=", "[", *items, "]"]
            else:
                after += [f" {name}=", value if isinstance(value, ast.AST) else _plain(value)]
        after.append(")")
        after.reverse()
        stack += after
    return "".join(parts), importing


def _plain(value: Any) -> str:
    # Decimal digits of huge integers are refused by Python, and `repr` depends on its Unicode version.
    return f"{hex(value) if type(value) is int else ascii(value)},"


def _effective(items: list[Any]) -> list[Any]:
    """The items of a list without statements that do nothing when they run: docstrings, `pass`, imports for type checkers only,
    and the assignment of `__version__`."""
    found = []
    for item in items:
        if isinstance(item, ast.Pass) or (isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant)):
            continue
        if isinstance(item, ast.If) and _name_of(item.test) == "TYPE_CHECKING":
            found += _effective(item.orelse)
        elif not (isinstance(item, ast.Assign) and [_name_of(target) for target in item.targets] == ["__version__"]):
            found.append(item)
    return found


def _imports_of(node: ast.AST, meanings: _Meanings) -> list[Import]:
    if isinstance(node, ast.Import):
        return [Import(0, alias.name, ()) for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [Import(node.level, node.module or "", tuple(alias.name for alias in node.names))]
    if isinstance(node, ast.Call) and _name_of(node.func) in meanings.importers:
        name = _literal(_argument(node, 0, "name"), meanings)
        level = len(name) - len(name.lstrip("."))
        package = _literal(_argument(node, 1, "package"), meanings) if level == 1 else ""
        if package:  # else it is relative to the package of the source file
            return [Import(0, f"{package}{name}", ())]
        return [Import(level, name.lstrip("."), ())] if name else []
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and _FILE.fullmatch(node.value):
        return [Import(1, node.value.removesuffix(".py"), ())]  # a file beside this one, for `runpy` or `exec`
    return []


def _argument(call: ast.Call, place: int, name: str) -> ast.AST | None:
    named = [keyword.value for keyword in call.keywords if keyword.arg == name]
    return (call.args[place : place + 1] or named or [None])[0]


def _literal(node: ast.AST | None, meanings: _Meanings) -> str:
    """A string as it is written in the source. In an f-string `{__name__}` is kept, and any other value is a *; "" if unknown."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.Name):
        return meanings.texts.get(node.id, "")
    if not isinstance(node, ast.JoinedStr):
        return ""
    parts = []
    for part in node.values:
        if isinstance(part, ast.FormattedValue):
            parts.append("__name__" if _name_of(part.value) == "__name__" else "*")
        else:
            parts.append(str(part.value))
    name = "".join(parts)
    return name if "*" not in name.removesuffix(".*") else ""


def _name_of(node: ast.AST) -> str | None:
    """The last part of a name or an attribute: `TYPE_CHECKING` for `typing.TYPE_CHECKING`."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
