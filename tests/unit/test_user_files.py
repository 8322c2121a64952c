"""Reading users' files: only regular files of a bounded size, JSON of a bounded depth, paths that a system can have."""

import os
import socket
from pathlib import Path

import pytest

from sushi_research.errors import UserError
from sushi_research.user_files import UnreadableFile, expand_path, parse_json, read_regular


def special_files(folder: Path) -> dict[str, Path]:
    """Paths that are no regular file, or one without an end, by what must be said about them."""
    os.mkfifo(folder / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "s"))
    (folder / "loop").symlink_to("loop")
    (folder / "link").symlink_to("fifo")
    found = {
        "a FIFO": folder / "fifo",
        "a FIFO, and": folder / "link",
        "a socket": folder / "s",
        "a folder": folder,
        "a device": Path("/dev/zero"),
        "symbolic links": folder / "loop",
        "does not exist": folder / "nothing",
        "Not a directory": folder / "s" / "x",
        "too long": folder / ("x" * 5000),
        "a zero byte": folder / "a\0b",
    }
    endless = Path("/proc/self/pagemap")  # its size is said to be 0
    return found | ({"a size of 0": endless} if endless.exists() else {})


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    for problem, path in special_files(tmp_path).items():
        try:
            read_regular(path, most=100)
        except UnreadableFile as error:
            assert problem in str(error), path
        else:
            raise AssertionError(f"read: {path!r}")


def test_a_file_of_the_largest_size_is_read_and_one_byte_more_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"x" * 10)
    assert read_regular(file, most=10) == b"x" * 10
    with pytest.raises(UnreadableFile, match=r"a is larger than 9 bytes \(it has 10\)"):
        read_regular(file, most=9)


def test_json_is_read_within_bounds() -> None:
    assert parse_json('{"a": [1, null]}', "x") == {"a": [1, None]}
    assert parse_json(b"[" * 100 + b"]" * 100, "x")
    assert parse_json("[" + "[]," * 500 + "[]]", "x"), "wide is not deep"
    refused = {
        "[" * 100_000: "x is nested more than 100 deep: do",
        "[" * 101 + "]" * 101: "x is nested more than 100 deep: do",
        '{"a":' * 500 + "1" + "}" * 500: "x is nested more than 100 deep: do",
        "1" * 5000: "x is not valid JSON (Exceeds the limit (4300 digits) for integer string conversion",
        b"\xff\xff": "x is not valid JSON (it is not UTF-8 text): do",
        "": "x is not valid JSON (Expecting value: line 1 column 1 (char 0)): do",
    }
    for text, sentence in refused.items():
        with pytest.raises(UserError) as caught:
            parse_json(text, "x", "do")
        assert str(caught.value).startswith(sentence)


def test_a_path_is_expanded_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_path("~/a") == "/home/me/a" and expand_path("~") == "/home/me"
    for path in ("a", "../a b\n", "-", "owner/name", "a/~", "x" * 255, "/".join(["x" * 200] * 20)):
        assert expand_path(path) == path
    refused = {
        "": "--k: it is empty, and a path is needed",
        "a\0b": "--k is a\\x00b: it contains a zero byte, which no path can: remove it",
        "~nobody-here/a": "--k is ~nobody-here/a: it names the home folder of nobody-here, whom this machine does not know",
        "\u5bff" * 86: "it has 86 letters, which is too long for a path",
        "/".join(["x" * 200] * 21): "it has 4,220 letters, which is too long for a path",
    }
    for path, sentence in refused.items():
        with pytest.raises(UserError) as caught:
            expand_path(path, key="--k")
        assert sentence in str(caught.value)
