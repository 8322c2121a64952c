"""strace's log is read, and the calls that shall fail are spread over it."""

from pathlib import Path

import pytest

from testing import io_faults, system_calls
from testing.system_calls import Call, Fault, choose, fault_options, read_log

LOG = """\
7 mkdir("/w/runs/run", 0777) = 0
7 openat(AT_FDCWD</home>, "/w/runs/run/a", O_RDONLY|O_CLOEXEC) = -1 ENOENT (No such file or directory)
7 openat(AT_FDCWD</home>, "/w/runs/run/a", O_WRONLY|O_CREAT, 0666) = 9</w/runs/run/a>
7 write(9</w/runs/run/a>, ""..., 4) = 4
7 write(2</w/run.log>, ""..., 4) = 4
8 write(9</w/runs/run/a>, ""..., 4) = 4
7 write(9</w/runs/run/a>, ""..., 4) = 4
7 write(9</w/runs/running/a>, ""..., 4) = 4
7 rename("/w/runs/run/.a.00000001.tmp", "/w/runs/run/a") = 0
7 unlinkat(9</w/runs/run/.step-00000002.00000002.tmp>, "state.pt", 0) = 0
7 fsync(9</w/runs/run>) = 0
7 exit_group(0) = ?
"""


def test_calls_are_those_below_the_parts_counted_as_strace_counts_them():
    assert read_log(LOG, Path("/w"), ("runs/run", "cache")) == [
        Call("mkdir", "runs/run", 1),
        # strace counts the first open of this path too, which only reads.
        Call("openat", "runs/run/a", 2),
        Call("write", "runs/run/a", 1),
        Call("write", "runs/run/a", 1),  # of another thread
        Call("write", "runs/run/a", 2),
        Call("rename", "runs/run/.a.00000001.tmp", 1),
        Call("unlinkat", "runs/run/.step-00000002.00000002.tmp", 1),
        Call("fsync", "runs/run", 1),
    ]


def test_other_kinds_are_chosen_first_and_spread_evenly():
    calls = [Call("write", f"step-{number}/{name}", when) for when in (1, 2) for number in range(9) for name in "ab"]
    calls.append(Call("unlink", "a", 1))
    assert choose(calls, 5) == [
        Fault("write", "ENOSPC", "step-0/a", 1),
        Fault("write", "EIO", "step-0/a", 1),
        Fault("write", "ENOSPC", "step-0/b", 1),
        Fault("write", "EIO", "step-0/b", 1),
        Fault("unlink", "EIO", "a", 1),
    ]
    assert len(choose(calls, 20)) == 20 and len(set(choose(calls, 1000))) == 2 * 36 + 1
    some, others = choose(calls, 2), choose(calls, 2, share=0.5)
    assert len(some) == len(others) == 2 and not set(some) & set(others)


def test_the_options_name_one_call():
    options = fault_options(Fault("fsync", "EIO", "cache", 3), Path("/w"))
    assert options == ["-P", "/w/cache", "-e", "trace=fsync", "-e", "inject=fsync:error=EIO:when=3"]


def test_without_strace_nothing_is_tested(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(system_calls.shutil, "which", lambda name: None)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- io faults -->\nold\n<!-- end io faults -->\nafter\n")
    assert (
        io_faults.main(io_faults.parse(["--tests", "2", "--keep", str(tmp_path / "kept"), "--write", str(page)])) == 0
    )
    assert page.read_text().splitlines()[2] == "old", "the results of another machine stay"
    assert "Skipped: strace is not installed. " in capsys.readouterr().out


def test_a_page_without_marks_is_refused_before_the_work(tmp_path):
    with pytest.raises(Exception, match="has no marks <!-- io faults --> and <!-- end io faults --> for the table"):
        io_faults.main(io_faults.parse(["--write", str(tmp_path / "page.md")]))
