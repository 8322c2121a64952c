"""The training script of an experiment: where it is, and which config class it reads its command line with.

A script is not run to find out: its syntax tree says it.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable
from pathlib import Path

import sushi_research
from sushi_research import models
from sushi_research.config import TrainingConfig
from sushi_research.errors import UserError
from sushi_research.user_files import read_regular

ROOT = Path(sushi_research.__file__).parents[1]
READERS = ("read_command_line", "load_config")  # the functions that take the config class, the first that is called
CONFIG_MODULES = {
    TrainingConfig.__module__.rpartition(".")[0],
    *(k.__module__ for k in models.config_classes().values()),
}


def find_script(given: str) -> Path:
    """The file of a script: a path as for any command, or relative to this checkout. UserError if there is none."""
    for path in (Path(given), ROOT / given):
        if path.is_file():
            return path.absolute()
    known = ", ".join(each.script for each in models.ARCHITECTURES.values())
    raise UserError(f"script is {given}, which is not a file: give the path of a training script, such as {known}.")


def config_class_of(script: Path) -> type[TrainingConfig]:
    """The architecture's config class that a script reads its command line with.

    UserError if the script is not Python, or if its syntax tree does not tell.
    """
    classes = {kind.__name__: kind for kind in models.config_classes().values()}
    source = read_regular(script)
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        where = f"{script}, line {line}" if line else script
        raise UserError(f"{where} is not Python ({getattr(error, 'msg', error)}): correct it.") from None
    meanings = _meanings(tree, classes)
    given = {_resolved(argument, meanings, classes) for argument in _arguments(tree)}
    if not given:
        raise UserError(
            f"{script} does not call read_command_line with a config class, so an experiment cannot tell its settings: "
            f"read its command line with {' or '.join(classes)}, as the scripts of this suite do."
        )
    if len(given) > 1 or not given <= classes.keys():
        named = ", ".join(sorted(given))
        raise UserError(
            f"{script} reads its command line with {named}, and an experiment knows only the settings of "
            f"{' or '.join(classes)}: use one of these."
        )
    return classes[given.pop()]


def _arguments(tree: ast.Module) -> list[ast.expr]:
    """The config class in each call that reads a command line."""
    for reader in READERS:
        found = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == reader:
                found += node.args[:1] or [keyword.value for keyword in node.keywords if keyword.arg == "config_class"]
        if found:
            return found
    return []


def _meanings(tree: ast.Module, classes: Iterable[str]) -> dict[str, str]:
    """The dotted path that each name of a script stands for, by its imports, plain assignments (`Config = SD15Training`) and
    class definitions."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names = classes if alias.name == "*" and node.module in CONFIG_MODULES else [alias.name]
                found |= {alias.asname or name: f"{'.' * node.level}{node.module}.{name}" for name in names}
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Name | ast.Attribute):
            found |= {target.id: ast.unparse(node.value) for target in node.targets if isinstance(target, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            found[node.name] = f"its own class {node.name}"
    return found


def _resolved(node: ast.expr, meanings: dict[str, str], classes: Collection[str]) -> str:
    """The name of a class of the suite that an expression stands for; for anything else, the expression as it is written."""
    written = path = ast.unparse(node)
    for _ in meanings:  # an assignment may lead to another one
        first, dot, rest = path.partition(".")
        path = meanings.get(first, first) + dot + rest
    if path.startswith(f"{sushi_research.__name__}."):
        return path.rpartition(".")[2]
    if path.startswith("its own class"):
        return path
    return f"{written} (not of this suite)" if written in classes else written
