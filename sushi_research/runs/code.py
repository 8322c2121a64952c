"""The code of a run: a hash of the syntax tree of the training script and of every module of ours or the user's that it imports.

The modules are found by following `import` statements in the syntax trees, those within functions included. So the code depends
neither on the config nor on what the process has imported so far. `import_module` with a name that the same file writes out is
followed, and so is the name of a file beside the script (`runpy.run_path("losses.py")`). A name or path that is put together at run
time is not.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import sysconfig
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

import sushi_research
from sushi_research.errors import some
from sushi_research.fingerprints import content_hash
from sushi_research.runs.syntax_tree import Import, parsed
from sushi_research.user_files import readable

PACKAGE = "sushi_research"
# Libraries whose installed version is recorded, which says what their code is.
LIBRARIES = (
    "torch",
    "accelerate",
    "diffusers",
    "transformers",
    "peft",
    "bitsandbytes",
    "datasets",
    "safetensors",
    "numpy",
    "pillow",
    "wandb",
)
SCRIPT = "script"  # the key of the script, whose file name is not part of its code
_LIBRARY_FOLDERS = {
    Path(found).resolve()
    for key in ("stdlib", "platstdlib", "purelib", "platlib")
    if (found := sysconfig.get_path(key))
}


def code_of(script: str | Path, classes: Iterable[str] = ()) -> dict[str, Any]:
    """The code of a training script, as JSON values.

    `script`: its file name. `files`: the hash of each file, by "script" or by the module's name as a path
    ("sushi_research/files.py"). `hash`: one hash of `files`. Neither the script's name nor any folder's location is part of it.

    `classes` are dotted paths of classes that the config names, such as an optimizer. Their modules are in `named`, unless the
    script imports them too; `hash` does not cover them, so that it does not depend on the config.

    Raises UserError if a file cannot be read.
    """
    path = Path(script).resolve()
    importlib.invalidate_caches()
    digest, imports = parsed(_bytes(path))
    # With `python -m` a script may import from the folders above its own: `from ..losses import mse`.
    folders = path.parents[: max([each.level for each in imports], default=0) or 1]
    files = {SCRIPT: digest} | _Modules(folders).closure(_names(imports, "", True))
    found: dict[str, str] = {}
    for module in (name.rpartition(".")[0] for name in classes):
        installed = {module.partition(".")[0]} - set(LIBRARIES)
        found |= _Modules(folders, installed).closure([module])
    return {
        "script": path.name,
        "hash": content_hash(json.dumps(files, sort_keys=True).encode()),
        "files": dict(sorted(files.items())),
        "named": {name: found[name] for name in sorted(found.keys() - files.keys())},
    }


def is_recorded(code: Mapping[str, Any]) -> bool:
    """Whether the code of a provenance entry has hashes. Versions from before they were recorded have only the commit."""
    tables = (code.get("files"), code.get("named", {}))
    return isinstance(code.get("hash"), str) and all(isinstance(table, dict) for table in tables)


def full_hash(code: Mapping[str, Any]) -> str | None:
    """One hash of all files of a code, those of named classes included; None if it is not recorded."""
    if not is_recorded(code):
        return None
    named = _named(code)
    return content_hash(json.dumps([code["hash"], named], sort_keys=True).encode()) if named else code["hash"]


def changed_files(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The files that differ between two recorded codes: added, missing or with another syntax tree. The script is first."""
    differing = [name for name in one["files"].keys() | other["files"].keys() if _differ(one, other, "files", name)]
    named = [name for name in _named(one).keys() & _named(other).keys() if _differ(one, other, "named", name)]
    scripts = " / ".join(dict.fromkeys(str(code.get("script")) for code in (one, other)))
    return [scripts for name in differing if name == SCRIPT] + sorted({*differing, *named} - {SCRIPT})


def shared_files_changed(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The modules that two different scripts both import and that differ between the two codes."""
    return sorted(
        name for name in one["files"].keys() & other["files"].keys() - {SCRIPT} if _differ(one, other, "files", name)
    )


def listed(files: Sequence[str]) -> str:
    """The names of files for a message: all, or the first six."""
    return some(files, 6)


def _named(code: Mapping[str, Any]) -> dict[str, str]:
    return code.get("named", {})


def _differ(one: Mapping[str, Any], other: Mapping[str, Any], part: str, name: str) -> bool:
    return one[part].get(name) != other[part].get(name)


class _Modules:
    """Finds the source of modules as Python would if it ran a script of the first of `folders`, without importing anything.

    `installed` are installed packages whose source counts all the same, because their versions are not recorded.
    """

    def __init__(self, folders: Sequence[Path], installed: Collection[str] = ()) -> None:
        main = getattr(sys.modules.get("__main__"), "__file__", None)
        own = os.path.dirname(os.path.abspath(main)) if main else None
        # Python puts the folder of the running script first. It does not count for another script.
        self._path = [*map(str, folders), *(entry for entry in sys.path if os.path.abspath(entry) != own)]
        self._specs: dict[str, ModuleSpec | None] = {PACKAGE: sushi_research.__spec__}
        self._installed = installed

    def closure(self, names: Iterable[str]) -> dict[str, str]:
        """The hash of every source file that importing `names` runs and by its key."""
        found, seen, waiting = {}, {""}, list(names)
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            waiting.append(name.rpartition(".")[0])
            if name.endswith(".*"):
                waiting += [f"{name[:-1]}{module}" for module in self._submodules(name[:-2])]
                continue
            spec = self._spec(name)
            if spec is None or not spec.origin or not os.path.isfile(spec.origin):
                continue
            is_package = spec.submodule_search_locations is not None
            digest, imports = parsed(_bytes(Path(spec.origin)))
            ending = "/__init__" if is_package else ""
            found[name.replace(".", "/") + ending + Path(spec.origin).suffix] = digest
            waiting += _names(imports, name, is_package)
        return found

    def _submodules(self, package: str) -> list[str]:
        spec = self._spec(package)
        folders = (spec and spec.submodule_search_locations) or []
        return sorted(path.stem for folder in folders for path in Path(folder).glob("*.py") if path.stem != "__init__")

    def _spec(self, name: str) -> ModuleSpec | None:
        """The spec of a module of ours or of the user; None for libraries, and for names that are no module."""
        if name not in self._specs:
            parent, _, _ = name.rpartition(".")
            if not parent:
                self._specs[name] = self._top_level(name)
            else:
                locations = (spec := self._spec(parent)) and spec.submodule_search_locations
                self._specs[name] = PathFinder.find_spec(name, list(locations)) if locations else None
        return self._specs[name]

    def _top_level(self, name: str) -> ModuleSpec | None:
        if name in sys.builtin_module_names:
            return None
        spec = PathFinder.find_spec(name, self._path)
        others = [finder for finder in sys.meta_path if hasattr(finder, "find_spec") and finder is not PathFinder]
        while spec is None and others:  # such as those of packages that were installed with `pip install --editable`
            spec = others.pop().find_spec(name, None)
        if spec is None or (name not in self._installed and _is_library(spec)):
            return None
        return spec


def _is_library(spec: ModuleSpec) -> bool:
    """Whether a module is of the standard library or installed: its version says which code it is."""
    places = [spec.origin] if spec.has_location and spec.origin else list(spec.submodule_search_locations or [])
    folders = {parent for place in places for parent in Path(place).resolve().parents}
    return not places or bool(
        folders & _LIBRARY_FOLDERS or {folder.name for folder in folders} & {"site-packages", "dist-packages"}
    )


def _names(imports: Sequence[Import], module: str, is_package: bool) -> Iterator[str]:
    """The absolute names of all modules that `imports` in `module` may mean. Some of them name a class, not a module."""
    package = module if is_package else module.rpartition(".")[0]
    for found in imports:
        above = package.split(".")[: -(found.level - 1) or None] if found.level else []
        base = ".".join([*filter(None, above), *filter(None, [found.module.replace("__name__", module)])])
        yield base
        yield from (f"{base}.{name}".lstrip(".") for name in found.names)


def _bytes(path: Path) -> bytes:
    with readable():
        return path.read_bytes()
