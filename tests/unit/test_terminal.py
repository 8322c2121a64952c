"""The standard streams outlive their readers, show any text, and never end in a data file."""

import io
import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from sushi_research import terminal
from sushi_research.errors import UserErrors, printable

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX descriptors")
ROOT = Path(__file__).parents[2]


def lasting(descriptor: int) -> io.TextIOWrapper:
    """A stream as `prepare` makes it, over a descriptor of this test."""
    return io.TextIOWrapper(io.BufferedWriter(terminal._Lasting(descriptor, "wb", closefd=False)), encoding="utf-8")


def test_a_reader_that_goes_away_is_no_error():
    reader, writer = os.pipe()
    stream = lasting(writer)
    print("one", file=stream, flush=True)
    assert os.read(reader, 10) == b"one\n"
    os.close(reader)
    for _ in range(3):
        print("two" * 100_000, file=stream, flush=True)
    os.write(writer, b"a library in C")  # the descriptor is the null device now
    assert os.fstat(writer).st_rdev == os.stat(os.devnull).st_rdev
    stream.close()
    os.close(writer)


def test_a_full_disk_loses_only_what_does_not_fit():
    full = os.open("/dev/full", os.O_WRONLY)
    stream = lasting(full)
    print("lost", file=stream, flush=True)
    stream.close()
    assert os.fstat(full).st_rdev == os.stat("/dev/full").st_rdev
    os.close(full)


def test_a_pipe_that_somebody_made_non_blocking_is_waited_for():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    child = os.fork()
    if child == 0:
        os.close(writer)
        total = 0
        while found := os.read(reader, 65536):
            total += len(found)
        os._exit(0 if total == 300_001 else 1)
    os.close(reader)
    stream = lasting(writer)
    print("x" * 300_000, file=stream, flush=True)
    os.close(writer)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_lines_are_escaped_and_their_breaks_stay(capsys):
    terminal.say("plan", "\x1b[31mred\x9b\u202e\nname \x07\r", file=sys.stderr)
    assert capsys.readouterr().err == "plan\n\\x1b[31mred\\x9b\\u202e\\nname \\x07\\r\n"


def test_ordinary_text_is_shown_as_it_is():
    text = "寿司\u3000桜 10\u00a0€ \u202f新\u200c家 👩\u200d🍳 café"
    assert printable(text) == text
    assert printable("\u200e\u2066\u2028\ufeff\x85\ud800") == "\\u200e\\u2066\\u2028\\ufeff\\x85\\ud800"


def test_several_mistakes_are_one_line_each():
    assert str(UserErrors(["2 problems:", "  a\x1b[31m\nb", "  c"])) == "2 problems:\n  a\\x1b[31m\\nb\n  c"


def test_log_records_are_escaped():
    record = logging.LogRecord("sushi_research.x", logging.WARNING, "", 0, "bad %s", ("\x1b]0;title\x07\nname",), None)
    text = terminal._PlainFormatter("%(levelname)s: %(message)s").format(record)
    assert text == "WARNING: bad \\x1b]0;title\\x07\\nname"


@pytest.mark.parametrize(
    ("redirected", "out"),
    [(">&- 2>&- <&-", ""), (">/dev/full 2>&1", ""), ("| head -1", "first\n"), ("", "first\n\\u5bff\\u53f8\n")],
)
def test_a_command_goes_on_without_its_output(tmp_path, redirected, out):
    script = """
        import sys
        from sushi_research.config.process import begin, run_main

        def main(path):
            print("first", flush=True)
            with open(path, "w") as file:
                print("寿司")
                sys.stderr.write("寿司\\n")
                file.write("data")
            import time
            for _ in range(20):
                print("x" * 10000 if "head" in sys.argv[2] else "", end="", flush=True)

        begin()
        run_main(main, sys.argv[1])
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(script), encoding="utf-8")
    command = f'"{sys.executable}" script.py data "{redirected[2:6]}" {redirected}'
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert (tmp_path / "data").read_text() == "data", "nothing that was printed is in a file"
    assert (done.returncode, done.stdout) == (0, out)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert ("standard output cannot be written (Broken pipe)" in done.stderr) == ("head" in redirected)
