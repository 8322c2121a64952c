"""Labels of adapter files, and the folders that evaluations of them go to."""

import itertools
import json
import unicodedata

import pytest

from sushi_research.adapters.labels import labels_of
from sushi_research.evaluation.adapter_files import folder_names
from sushi_research.fingerprints import content_hash


@pytest.fixture
def file(tmp_path):
    def make(name: str, content: str | None = None) -> str:
        path = tmp_path / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name if content is None else content)
        return str(path)

    return make


def mark(content: str) -> str:
    return content_hash(content.encode())[:8]


def on_any_disk(name: str) -> str:
    """macOS and Windows ignore case, macOS the form of accents, Windows a dot at the end."""
    return unicodedata.normalize("NFD", name).lower().rstrip(".")


@pytest.mark.parametrize(
    "names",
    [
        ("a/final", "b/final"),
        ("runs/a/adapter", "other/a/adapter"),
        ("x/Cat", "y/cat"),
        ("x/caf\u00e9", "y/cafe\u0301"),
        ("x/cat", "y/cat."),
        ("base", "Base", "evaluation.json", "grid.png"),
        (".", ".."),
        ("a", "b/a", f"a-{mark('a')}"),
        ("a-scale-0.5", "a"),
        ("a", "a-scale-0.5"),
    ],
)
def test_no_two_files_share_a_folder(file, names, tmp_path):
    paths = [file(name) for name in names]
    for order in itertools.permutations(paths):
        found = folder_names(order, [1.0, 0.5, 0.50000001])
        assert len({on_any_disk(name) for name in found.values()}) == 3 * len(paths), found
        taken = {"base", "evaluation.json", "evaluation.md", "grid.png", "lora_scales.png", ""}
        assert not taken & {on_any_disk(name) for name in found.values()}
    assert len(set(labels_of([tmp_path / f"{name}.safetensors" for name in names]))) == len(names)


def test_a_folder_of_another_adapter_is_left_alone(file, tmp_path):
    paths, output = [file("a/final"), file("b/final")], tmp_path / "evaluations"
    assert folder_names(paths[:1], [1.0], output) == {(0, 1.0): "final"}
    (output / "final").mkdir(parents=True)
    entry = {"adapter": {"hash": content_hash(b"a/final")}}
    (output / "final" / "provenance.json").write_text(json.dumps([entry]))
    assert folder_names(paths[:1], [1.0], output) == {(0, 1.0): "final"}, "the same file again takes the same folder"
    assert folder_names(paths[1:], [1.0], output) == {(0, 1.0): f"final-{mark('b/final')}"}
    both = {(0, 1.0): f"final-{mark('a/final')}", (1, 1.0): f"final-{mark('b/final')}"}
    assert folder_names(paths, [1.0], output) == both
    # The same bytes twice.
    assert len({*folder_names([paths[0], file("c/final", "a/final")], [1.0], output).values()}) == 2
