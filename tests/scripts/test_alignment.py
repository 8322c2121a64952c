"""What all training scripts must have in common stands in each of them, word for word, between marks."""

from __future__ import annotations

import ast
import difflib
import re
from pathlib import Path

import pytest
from script_runs import ROOT, SCRIPTS

from sushi_research.models import ARCHITECTURES

BEGIN, END = re.compile(r"\s*# --- shared: (.+) ---"), re.compile(r"\s*# --- end shared ---")


def shared_blocks(text: str) -> dict[str, list[str]]:
    """The lines between the marks, by the name in the opening mark, in their order."""
    blocks: dict[str, list[str]] = {}
    name = None
    for line in text.splitlines():
        if begin := BEGIN.fullmatch(line):
            assert name is None, f"{begin[1]} begins within {name}"
            name = begin[1]
            assert name not in blocks, f"two blocks are called {name}"
            blocks[name] = []
        elif END.fullmatch(line):
            assert name is not None, "a block ends that never began"
            name = None
        else:
            assert not re.match(r"\s*#.*--.*shared", line), f"not quite a mark: {line}"
            if name is not None:
                blocks[name].append(line)
    assert name is None, f"{name} never ends"
    return blocks


def differences(one: Path, other: Path) -> str:
    """A unified diff of the shared blocks of two scripts, their names among the lines; empty where they agree."""
    texts = []
    for path in (one, other):
        blocks = shared_blocks(path.read_text(encoding="utf-8"))
        texts.append([line for name, lines in blocks.items() for line in (f"shared: {name}", *lines)])
    return "\n".join(difflib.unified_diff(*texts, one.name, other.name, lineterm=""))


def test_there_is_a_script_for_each_architecture_and_much_in_common() -> None:
    assert {f"scripts/{path.name}" for path in SCRIPTS} == {each.script for each in ARCHITECTURES.values()}
    blocks = shared_blocks(SCRIPTS[0].read_text(encoding="utf-8"))
    assert {"imports", "main", "the loop", "finish"} <= blocks.keys()
    assert sum(map(len, blocks.values())) > 100


@pytest.mark.parametrize("script", SCRIPTS[1:], ids=lambda path: path.name)
def test_the_shared_blocks_are_the_same(script: Path) -> None:
    difference = differences(SCRIPTS[0], script)
    assert not difference, f"the shared blocks differ:\n{difference}"


SCRIPT = """\
# --- shared: start ---
begin()
# --- end shared ---
own = 1
# --- shared: finish ---
end()
# --- end shared ---
"""


@pytest.mark.parametrize(
    ("old", "new", "shown"),
    [
        ("own = 1", "own = 2", ""),
        ("end()", "end()  # done", "+end()  # done"),
        ("shared: finish", "shared: end", "+shared: end"),
        ("# --- shared: finish ---\nend()\n# --- end shared ---\n", "", "-shared: finish"),
    ],
)
def test_a_difference_is_shown(tmp_path: Path, old: str, new: str, shown: str) -> None:
    one, other = tmp_path / "one.py", tmp_path / "other.py"
    one.write_text(SCRIPT)
    other.write_text(SCRIPT.replace(old, new))
    assert shown in (differences(one, other).splitlines() or [""])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("# --- shared: finish ---\n", "", "never began"),
        (
            "own = 1\n# --- shared: finish ---\nend()\n# --- end shared ---\n",
            "# --- shared: finish ---\n",
            "never ends",
        ),
        ("# --- end shared ---\nown", "own", "begins within start"),
        ("shared: finish", "shared: start", "two blocks"),
        ("# --- end shared ---\nown", "# -- end shared ---\nown", "not quite a mark"),
    ],
)
def test_a_mark_that_is_no_mark_is_noticed(old: str, new: str, message: str) -> None:
    assert old in SCRIPT
    with pytest.raises(AssertionError, match=message):
        shared_blocks(SCRIPT.replace(old, new))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_training_step_is_short_enough_to_be_read_at_once(script: Path) -> None:
    functions = [node for node in ast.parse(script.read_text()).body if isinstance(node, ast.FunctionDef)]
    (step,) = (node for node in functions if node.name == "training_step")
    assert step.end_lineno - step.lineno + 1 < 30


def test_no_script_is_imported() -> None:
    """Scripts are the order of events; what is of use elsewhere belongs in the package."""
    names = {path.stem for path in (ROOT / "scripts").glob("*.py")} | {"scripts"}
    files = [path for folder in ("scripts", "sushi_research", "tests") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 40
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imported = []
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                imported = [node.module or "", *(alias.name for alias in node.names)]
            found = names & {part for name in imported for part in name.split(".")}
            assert not found, f"{path} imports {found}"
