import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from sushi_research.remembered import MOST, Remembered, columns_hash

KEY = "0" * 32
COLUMNS = {
    "hashes": np.array([b"a" * 32, b"b" * 31], "S32"),
    "sides": np.arange(12, dtype=np.int32).reshape(6, 2),
    "flags": np.array([True, False]),
    "none": np.empty((0, 8), np.int64),
    "names": pa.array(["a.png", "\u00e9.png", ""], pa.large_string()),
    "captions": pa.array([["a", "b"], [], None], pa.large_list(pa.large_string())),
}


@pytest.fixture
def remembered(tmp_path: Path) -> Remembered:
    return Remembered(tmp_path / "cache" / "remembered")


def never() -> dict[str, np.ndarray]:
    raise AssertionError("made again")


def same(found: dict, expected: dict) -> bool:
    assert list(found) == list(expected)
    for name, array in expected.items():
        if isinstance(array, np.ndarray):
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)
        else:
            assert found[name].equals(array)
    return True


def test_columns_come_back_as_they_were_and_are_made_once(remembered):
    assert same(remembered.arrays("kind", KEY, lambda: COLUMNS), COLUMNS)
    found = remembered.arrays("kind", KEY, never)
    assert same(found, COLUMNS)
    with pytest.raises(ValueError):
        found["sides"][0] = 1
    assert remembered.find("kind", "1" * 32) is None and remembered.find("other", KEY) is None


@pytest.mark.parametrize("position", [0, 700, -200, -1])
def test_a_damaged_file_is_made_again(remembered, position):
    remembered.put("kind", KEY, COLUMNS)
    [path] = remembered.folder.iterdir()
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    assert remembered.find("kind", KEY) is None
    path.write_bytes(data[: len(data) // 2])
    assert same(remembered.arrays("kind", KEY, lambda: COLUMNS), COLUMNS)
    assert same(remembered.arrays("kind", KEY, never), COLUMNS)


def test_a_file_under_another_name_is_not_read(remembered):
    remembered.put("kind", KEY, COLUMNS)
    [path] = remembered.folder.iterdir()
    path.rename(path.with_name(f"other-{KEY}.arrow"))
    assert remembered.find("other", KEY) is None


def test_the_oldest_files_of_a_kind_go(remembered):
    remembered.put("kind-two", KEY, COLUMNS)
    for number in range(MOST):
        remembered.put("kind", f"{number:032x}", COLUMNS)
        os.utime(remembered.folder / f"kind-{number:032x}.arrow", (number, number))
    remembered.find("kind", f"{0:032x}")
    remembered.put("kind", f"{MOST:032x}", COLUMNS)
    assert remembered.find("kind", f"{0:032x}") and not remembered.find("kind", f"{1:032x}")
    assert remembered.find("kind-two", KEY)


def test_a_command_keeps_what_it_uses_itself(remembered):
    sets = [f"{number:032x}" for number in range(MOST + 3)]
    for key in sets:
        remembered.put("kind", key, COLUMNS)
    assert all(remembered.find("kind", key) for key in sets)


def test_a_folder_that_cannot_be_written_only_loses_the_memory(tmp_path):
    (tmp_path / "file").touch()
    remembered = Remembered(tmp_path / "file" / "remembered")
    assert same(remembered.arrays("kind", KEY, lambda: COLUMNS), COLUMNS)
    assert remembered.find("kind", KEY) is None


def test_only_the_first_process_writes(remembered, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert same(remembered.arrays("kind", KEY, lambda: COLUMNS), COLUMNS)
    assert not remembered.folder.exists()


def test_a_hash_of_columns_tells_values_types_and_places():
    names = pa.array(["x", "a.png", "b.png"], pa.large_string())
    assert columns_hash(names[1:]) == columns_hash(pa.array(["a.png", "b.png"], pa.large_string()))
    assert columns_hash(pa.chunked_array([names[1:2], names[2:]])) == columns_hash(names[1:])
    different = [
        names,
        names[1:],
        names[1:].cast(pa.string()),
        pa.array(["a.pngb.", "png"], pa.large_string()),
        np.arange(4),
        np.arange(4).reshape(2, 2),
        np.arange(4, dtype=np.uint64),
    ]
    hashes = [columns_hash(array) for array in different]
    assert len({*hashes, columns_hash(*different), columns_hash(*different[::-1])}) == len(different) + 2
    assert columns_hash(np.arange(8).reshape(2, 4)[:, ::2]) == columns_hash(np.array([[0, 2], [4, 6]]))
