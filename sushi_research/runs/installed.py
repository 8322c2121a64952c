"""The installed libraries against the ranges of pyproject.toml and the tested versions of constraints.txt."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement


@dataclass(frozen=True)
class Installed:
    """How many libraries are needed; which are missing or outside their range; and which are not of the tested version."""

    needed: int
    wrong: tuple[str, ...]
    untested: tuple[str, ...]


def compare(root: Path) -> Installed:
    """Compares with the files of the checkout at `root`."""
    needed = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    pins = [line for line in (root / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    tested = {pin.name: pin.specifier for pin in map(Requirement, pins)}
    wrong, untested = [], []
    for requirement in map(Requirement, needed):
        name = requirement.name
        try:
            found = version(name)
        except PackageNotFoundError:
            wrong.append(f"{name} is not installed (needed: {requirement.specifier})")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{name} is {found} (needed: {requirement.specifier})")
        elif name in tested and not tested[name].contains(found, prereleases=True):
            untested.append(f"{name} {found} (tested: {str(tested[name]).lstrip('=')})")
    return Installed(len(needed), tuple(wrong), tuple(untested))
