"""The import-linter contracts of pyproject.toml are kept, and each of them can be broken; pages name tests that exist."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
CONTRACTS = [contract["name"] for contract in SETTINGS["contracts"]]


def check(folder: Path) -> tuple[int, dict[str, str], str]:
    """Exit status of `lint-imports` on the packages in `folder`, KEPT or BROKEN for each contract, and its whole output."""
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True, no_logo=True))"
    # The packages of `folder`, not those on this process's path; no colours and no wrapped lines in the output.
    environment = {**os.environ, "PYTHONPATH": str(folder), "NO_COLOR": "1", "COLUMNS": "300"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    found = re.findall(r"^(.+) (KEPT|BROKEN)$", done.stdout, re.MULTILINE)
    return done.returncode, dict(found), done.stdout + done.stderr


def test_the_contracts_are_kept() -> None:
    status, found, output = check(ROOT)
    assert (status, found) == (0, dict.fromkeys(CONTRACTS, "KEPT")), output


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The packages' source and their contracts, to be changed."""
    for package in SETTINGS["root_packages"]:
        for path in (ROOT / package).rglob("*.py"):
            target = tmp_path / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_every_contract_breaks_where_an_import_is_wrong(copy: Path) -> None:
    planted = {
        # Upwards, and for type checkers only.
        "sushi_research/runs/run_folder.py": (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import sushi_research.training.sampler\n"
        ),
        "sushi_research/experiments/tables.py": "import testing.process\n",
        # With data.items importing this one, the two are a cycle within a package.
        "sushi_research/data/buckets.py": "def late():\n    import sushi_research.data.items\n",
    }
    for name, text in planted.items():
        with open(copy / name, "a", encoding="utf-8") as file:
            file.write(f"\n{text}")
    status, found, output = check(copy)
    assert (status, found) == (1, dict.fromkeys(CONTRACTS, "BROKEN")), output
    for imports in (
        "sushi_research.runs.run_folder -> sushi_research.training.sampler",
        "sushi_research.experiments.tables -> testing.process",
    ):
        assert imports in output


def test_every_test_that_a_page_names_exists() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    named = {name for page in pages for name in re.findall(r"`(test_\w+)(?:\.py)?`", page.read_text(encoding="utf-8"))}
    files = list((ROOT / "tests").rglob("test_*.py"))
    there = {path.stem for path in files}.union(
        *(re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE) for path in files)
    )
    assert named and sorted(named - there) == []
