import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sushi_research import fingerprints
from sushi_research.fingerprints import HashCache, content_hash, file_hash, file_state, folder_hash


def write(path: Path, data: bytes, age: float = 3600.0) -> Path:
    """A file that was last modified `age` seconds ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    moment = time.time_ns() - int(age * 1e9)
    os.utime(path, ns=(moment, moment))
    return path


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """No file counts as just changed: a test cannot give a file an old change time."""
    monkeypatch.setattr(fingerprints, "RACY_NS", 0)


@pytest.fixture
def hash_cache(tmp_path):
    return HashCache(tmp_path / "cache" / "files.json")


@pytest.fixture
def reads(monkeypatch):
    """The names of the files that were read in order to hash them."""
    names = []
    real = hashlib.file_digest

    def counting(file, digest):
        names.append(Path(file.name).name)
        return real(file, digest)

    monkeypatch.setattr(fingerprints.hashlib, "file_digest", counting)
    return names


def test_content_hash_is_blake2b_with_16_bytes():
    # The test vector comes from `printf abc | b2sum -l 128`.
    assert content_hash(b"abc") == "cf4ab791c62b8d2b2109c90275287816"


def test_file_hash_is_the_content_hash_also_beyond_one_read(tmp_path, hash_cache):
    data = bytes(range(256)) * 5000  # more than hashlib.file_digest's buffer of 256 KiB
    assert file_hash(write(tmp_path / "a", data), hash_cache) == content_hash(data)


def test_an_unchanged_file_is_read_once_in_this_run_and_the_next(tmp_path, hash_cache, reads):
    path = write(tmp_path / "a", b"one")
    first = file_hash(path, hash_cache)
    assert file_hash(path, hash_cache) == first
    hash_cache.save()
    assert file_hash(path, HashCache(hash_cache.path)) == first
    assert reads == ["a"]


def test_the_hash_cache_knows_a_file_by_its_absolute_path(tmp_path, hash_cache, reads, monkeypatch):
    write(tmp_path / "a", b"one")
    file_hash(tmp_path / "a", hash_cache)
    monkeypatch.chdir(tmp_path)
    file_hash(Path("a"), hash_cache)
    assert reads == ["a"]
    write(tmp_path / "sub" / "a", b"two")
    monkeypatch.chdir(tmp_path / "sub")
    assert file_hash(Path("a"), hash_cache) == content_hash(b"two")


def test_another_size_with_the_same_time_is_read_again(tmp_path, hash_cache):
    path = write(tmp_path / "a", b"one")
    file_hash(path, hash_cache)
    before = path.stat()
    path.write_bytes(b"longer")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file_hash(path, hash_cache) == content_hash(b"longer")


def test_another_time_with_the_same_size_is_read_again(tmp_path, hash_cache):
    path = write(tmp_path / "a", b"one")
    file_hash(path, hash_cache)
    before = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert file_hash(path, hash_cache) == content_hash(b"two")


@pytest.mark.parametrize("how", ["in place", "another file", "a link to another file"])
def test_another_file_of_the_same_size_and_date_is_read_again(tmp_path, hash_cache, how):
    """All SDXL VAEs have one size, and `cp -p`, archives and `touch -d` set the date."""
    path = write(tmp_path / "a", b"one")
    assert file_hash(path, hash_cache) == content_hash(b"one")
    date = path.stat().st_mtime_ns
    time.sleep(0.02)  # the change time of a file has a resolution of a few milliseconds
    if how == "in place":
        path.write_bytes(b"two")
    else:
        other = write(tmp_path / "b", b"two")
        os.replace(other, path) if how == "another file" else (path.unlink(), path.symlink_to(other))
    os.utime(path, ns=(date, date))
    assert path.stat().st_mtime_ns == date
    assert file_hash(path, hash_cache) == content_hash(b"two")


def test_a_file_that_was_only_touched_is_hashed_once_more(tmp_path, hash_cache, reads):
    path = write(tmp_path / "a", b"one")
    first = file_hash(path, hash_cache)
    time.sleep(0.02)
    path.chmod(0o600)
    assert [file_hash(path, hash_cache), file_hash(path, hash_cache)] == [first, first] and reads == ["a", "a"]


def test_a_file_hashed_right_after_it_was_changed_is_not_trusted(tmp_path, hash_cache, monkeypatch):
    monkeypatch.undo()  # RACY_NS
    path = write(tmp_path / "a", b"one")  # an old date, and a change time of now
    before = path.stat()
    assert file_hash(path, hash_cache) == content_hash(b"one")
    # The same size, within the granularity of the file system's clock: nothing but the bytes tells.
    path.write_bytes(b"two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file_hash(path, hash_cache) == content_hash(b"two")


@pytest.mark.parametrize("what", ["mtime_ns", "ctime_ns"])
def test_two_seconds_of_age_are_counted_from_before_the_reading(tmp_path, hash_cache, monkeypatch, what):
    monkeypatch.undo()
    path = write(tmp_path / "a", b"one")
    state = file_state(path)
    old = replace(state, **{"mtime_ns": 0, "ctime_ns": 0, what: 1})
    monkeypatch.setattr(fingerprints, "file_state", lambda path: old)
    racy, old_enough = (replace(old, seen_ns=1 + fingerprints.RACY_NS + age) for age in (0, 1))
    hash_cache.put(path, {"hash": "x"}, racy)
    assert hash_cache.get(path) is None
    hash_cache.put(path, {"hash": "x"}, old_enough)
    assert hash_cache.get(path) == {"hash": "x"}
    hash_cache.put(path, {"hash": "y"}, racy)  # what was noted before must not survive either
    assert hash_cache.get(path) is None


def test_a_file_that_changes_while_it_is_read_is_read_again(tmp_path, hash_cache):
    path = write(tmp_path / "a", b"one")
    state = file_state(path)
    write(path, b"two", age=1800)
    hash_cache.put(path, {"hash": content_hash(b"one")}, state)
    assert hash_cache.get(path) is None


def test_facts_of_others_are_kept_and_not_shared(tmp_path, hash_cache):
    path = write(tmp_path / "a", b"one")
    hash_cache.put(path, {"width": 8}, file_state(path))
    file_hash(path, hash_cache)
    assert hash_cache.get(path) == {"width": 8, "hash": content_hash(b"one")}
    hash_cache.get(path)["width"] = 9
    assert hash_cache.get(path)["width"] == 8


def test_a_missing_file_has_no_facts(tmp_path, hash_cache):
    path = write(tmp_path / "a", b"one")
    file_hash(path, hash_cache)
    path.unlink()
    assert hash_cache.get(path) is None
    with pytest.raises(FileNotFoundError):
        file_hash(path, hash_cache)


VERSION = fingerprints.HASH_CACHE_VERSION


@pytest.mark.parametrize(
    "damaged", [b"", b"{", b"[]", b"\xff\xfe", {"version": VERSION, "files": []}, {"version": VERSION, "files": {}}]
)
def test_a_damaged_hash_cache_starts_again(tmp_path, hash_cache, damaged):
    path = write(tmp_path / "a", b"one")
    write(hash_cache.path, damaged if isinstance(damaged, bytes) else json.dumps(damaged).encode())
    fresh = HashCache(hash_cache.path)
    assert file_hash(path, fresh) == content_hash(b"one")
    fresh.save()
    assert HashCache(hash_cache.path).get(path) == {"hash": content_hash(b"one")}


@pytest.mark.parametrize("change", ["a digit of a hash", "the name of a fact", "the version"])
def test_damage_that_is_still_json_is_not_believed(tmp_path, hash_cache, change):
    path, content = write(tmp_path / "a", b"one"), content_hash(b"one").encode()
    file_hash(path, hash_cache)
    hash_cache.save()
    data = hash_cache.path.read_bytes()
    old, new = {
        "a digit of a hash": (content, b"%x" % (15 - int(content[:1], 16)) + content[1:]),
        "the name of a fact": (b'"facts"', b'"fact"'),
        "the version": (b'"version": %d' % VERSION, b'"version": %d' % (VERSION + 1)),
    }[change]
    assert data.count(old) == 1
    hash_cache.path.write_bytes(data.replace(old, new))
    assert HashCache(hash_cache.path).get(path) is None


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    write(tmp_path / "file", b"")
    hash_cache = HashCache(tmp_path / "file" / "files.json")  # a folder cannot be made where a file is
    assert file_hash(write(tmp_path / "a", b"one"), hash_cache) == content_hash(b"one")
    hash_cache.save()


def test_a_failed_save_leaves_the_old_hash_cache_and_nothing_else(tmp_path, hash_cache, monkeypatch):
    path = write(tmp_path / "a", b"one")
    file_hash(path, hash_cache)
    hash_cache.save()
    before = hash_cache.path.read_bytes()

    def refuse(source, target):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", refuse)
    file_hash(write(tmp_path / "b", b"two"), hash_cache)
    hash_cache.save()
    assert hash_cache.path.read_bytes() == before
    assert os.listdir(hash_cache.path.parent) == [hash_cache.path.name]


def test_folder_hash_depends_on_names_and_contents_only(tmp_path, hash_cache):
    def component(root, **files):
        paths = [write(tmp_path / root / name.replace("__", "/"), data) for name, data in files.items()]
        return folder_hash(paths, hash_cache)

    one = component("one", config=b"{}", weights=b"1234", sub__weights=b"5")
    assert component("two/deeper", sub__weights=b"5", weights=b"1234", config=b"{}") == one
    assert component("three", config=b"{}", weights=b"1235", sub__weights=b"5") != one
    assert component("four", config=b"{}", weight=b"1234", sub__weights=b"5") != one
    assert component("five", config=b"1234", weights=b"{}", sub__weights=b"5") != one
    assert component("six", config=b"{}", weights=b"1234") != one


def test_no_module_that_reads_data_imports_torch():
    code = (
        "import sys; from sushi_research import fingerprints; from sushi_research.data import buckets, dataset, images;"
        "print([name for name in ('torch', 'datasets', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_what_another_process_noted_meanwhile_is_taken_up(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"x")
    os.utime(file, (1, 1))
    mine, other = HashCache(tmp_path / "hashes.json"), HashCache(tmp_path / "hashes.json")
    other.put(file, {"hash": "h"}, file_state(file))
    other.save()
    assert mine.get(file) is None
    mine.load()
    assert mine.get(file) == {"hash": "h"}
