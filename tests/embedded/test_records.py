"""Records of measured results: which changes of an input or a version make them outdated."""

from __future__ import annotations

import json
from importlib.metadata import version

import pytest

from demo import records

CODE = '''"""What the module does."""

LIMIT = 0.5  # of the width


def right(share: float) -> bool:
    """Whether enough is right."""
    return share >= LIMIT
'''
CHANGED = {
    "comment": (CODE.replace("of the width", "of the height"), True),
    "docstring": (CODE.replace("Whether enough is right.", "Says whether it is enough."), True),
    "no docstring": (CODE.replace('    """Whether enough is right."""\n', ""), True),
    "layout": (CODE.replace("share >= LIMIT", "(\n        share >= LIMIT\n    )"), True),
    "number": (CODE.replace("0.5", "0.6"), False),
    "operator": (CODE.replace(">=", ">"), False),
    "text that is no docstring": (CODE + 'PROMPT = "one egg maki"\n', False),
}


@pytest.mark.parametrize("change", CHANGED)
def test_only_a_change_of_the_code_changes_its_hash(change, tmp_path) -> None:
    content, same = CHANGED[change]
    before, after = tmp_path / "before.py", tmp_path / "after.py"
    before.write_text(CODE)
    after.write_text(content)
    assert content != CODE
    assert (records.input_hash(before) == records.input_hash(after)) == same


def test_a_config_s_values_count_and_weights_count_in_every_byte(tmp_path) -> None:
    def hashed(name: str, content: str) -> str:
        (tmp_path / name).write_text(content)
        return records.input_hash(tmp_path / name)

    assert hashed("a.yaml", "train: {steps: 3}  # few\n") == hashed("b.yaml", "train:\n  steps: 3\n")
    assert hashed("a.yaml", "train: {steps: 3}\n") != hashed("b.yaml", "train: {steps: 4}\n")
    assert hashed("a.safetensors", "weights") != hashed("b.safetensors", "weights ")


def test_differences_are_named(tmp_path) -> None:
    for name in ("kept", "edited", "removed"):
        (tmp_path / name).write_text(name)
    recorded = records.dependencies([tmp_path / name for name in ("kept", "edited", "removed")], tmp_path)
    assert recorded["versions"]["torch"] == version("torch").partition("+")[0]
    (tmp_path / "edited").write_text("otherwise")
    (tmp_path / "added").write_text("added")
    today = records.dependencies([tmp_path / name for name in ("kept", "edited", "added")], tmp_path)
    assert records.differences(recorded, recorded, "inputs") == []
    assert records.differences(recorded, today, "inputs") == ["added", "edited", "removed"]
    today["versions"]["torch"] = "1.0"
    assert records.differences(recorded, today, "versions") == ["torch"]


def test_a_record_is_read_back(tmp_path) -> None:
    (tmp_path / "input").write_text("x")
    depends = records.dependencies([tmp_path / "input"], tmp_path)
    records.write_record(tmp_path / "record.json", depends, {"right": 3})
    assert records.read_record(tmp_path / "record.json") == depends | {"results": {"right": 3}}
    assert json.loads((tmp_path / "record.json").read_text())["results"]["right"] == 3
