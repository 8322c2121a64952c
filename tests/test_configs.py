"""Every key that can be set has an effect: it is read, by its own script or by the package."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from pydantic import BaseModel

from sushi_research import models
from sushi_research.config.data_set import DataSet
from sushi_research.config.sets import SECTIONS

ROOT = Path(__file__).parents[1]
CLASSES: dict[str, type[BaseModel]] = models.config_classes()
PACKAGE = [path for path in sorted((ROOT / "sushi_research").rglob("*.py")) if path.parent.name != "config"]


def keys_of(model: type[BaseModel], prefix: str = "") -> set[str]:
    """The dotted names of all keys of a config class."""
    found: set[str] = set()
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= keys_of(field.annotation, f"{prefix}{name}.")
        else:
            found.add(prefix + name)
    return found


def keys_read(path: Path) -> set[str]:
    """The dotted names of all that a file reads of `config` or `job.config`: `config.lora.rank`, `job.config.dry_run`."""
    found, inner = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names, value = [], node
        while isinstance(value, ast.Attribute):
            names.append(value.attr)
            value = value.value
        path_of = [value.id, *reversed(names)] if isinstance(value, ast.Name) else []
        if path_of[-1:] == ["model_copy"]:  # pydantic's, of a section
            path_of.pop()
        if path_of[:2] == ["job", "config"]:
            path_of = path_of[1:]
        if len(path_of) > 1 and path_of[0] == "config" and id(node) not in inner:
            found.add(".".join(path_of[1:]))
            inner |= {id(part) for part in ast.walk(node)}
    return found


def attributes_in(path: Path) -> set[str]:
    """The names of all attributes in a file, of whatever value."""
    return {
        node.attr for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Attribute)
    }


def keys_read_by(architecture: str) -> set[str]:
    found = set().union(*map(keys_read, [*PACKAGE, ROOT / f"scripts/train_{architecture}_lora.py"]))
    # The settings that decide how a caption is encoded are read by the names that the model module gives.
    model = models.load(architecture)
    found |= {f"model.{name}" for name in model.TEXT_SETTINGS}
    # Those that a set can have are read as those of each set (`sets_of`).
    found |= {f"data.{name}" for name in ("sets", *DataSet.model_fields)}
    # So are those of the sections that a set can have keys of, which are values with other names there.
    of_sets = set().union(*map(attributes_in, PACKAGE))
    found |= {f"{section}.{name}" for section in SECTIONS for name in of_sets}
    # The settings of the adapter's layers are made from the section `lora`, under the same names.
    found |= {f"lora.{name}" for name in attributes_in(ROOT / "sushi_research/adapters/settings.py")}
    # The rule of the buckets is made from the section `data`, or from a set's values under the same names.
    return found | {f"data.{name}" for name in attributes_in(ROOT / "sushi_research/data/fitting.py")}


@pytest.mark.parametrize("architecture", CLASSES)
def test_every_key_is_read(architecture: str) -> None:
    keys = keys_of(CLASSES[architecture])
    assert {"model.base", "train.steps", "optimizer.kwargs", "dry_run"} <= keys and len(keys) > 60
    assert sorted(keys - keys_read_by(architecture)) == []


def test_every_key_that_is_read_is_there() -> None:
    """A key that only one of the architectures has is read in its own script or by the name in its model module."""
    for architecture, config_class in CLASSES.items():
        sections = set(config_class.model_fields)
        script = keys_read(ROOT / f"scripts/train_{architecture}_lora.py")
        read = {key for path in PACKAGE for key in keys_read(path) if key.split(".")[0] in sections} | script
        missing = {
            key
            for key in read
            if not any(known == key or known.startswith(f"{key}.") for known in keys_of(config_class))
        }
        assert sorted(missing) == []


@pytest.mark.parametrize("architecture", CLASSES)
def test_each_script_has_a_recipe(architecture: str) -> None:
    """That every file in configs/ loads in its script's class is tested in unit/test_command_line.py."""
    assert (ROOT / f"configs/{architecture}_lora.yaml").is_file()
