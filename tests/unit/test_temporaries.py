"""Temporary files of killed writers are removed, and nothing else is."""

import errno
import fcntl
import multiprocessing
import os
import time

import pytest

from sushi_research import temporaries
from sushi_research.files import write_atomic
from sushi_research.runs.run_folder import open_run_folder

OTHERS = (
    "notes.txt",
    ".config.yaml.tmp",
    ".config.yaml.0123ABCD.tmp",
    "config.yaml.0123abcd.tmp",
    ".config.yaml.0123abcde.tmp",
)


def leave(folder, *names, hours=0):
    for name in names:
        (folder / name).write_bytes(b"half")
        os.utime(folder / name, times=(time.time() - hours * 3600,) * 2)


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_a_run_begins_without_what_a_killed_process_left(tmp_path):
    run = tmp_path / "trial"
    for folder in (run, run / "samples", run / "samples/step-00000005"):
        folder.mkdir(parents=True)
        leave(folder, ".adapter.safetensors.0123abcd.tmp", ".\n.89abcdef.tmp", *OTHERS)
    (run / ".folder.0123abcd.tmp").mkdir()
    open_run_folder(tmp_path, "trial").close()
    for folder in (run, run / "samples", run / "samples/step-00000005"):
        assert names(folder) - {"samples", "step-00000005", ".lock", ".folder.0123abcd.tmp"} == set(OTHERS)
    assert (run / ".folder.0123abcd.tmp").is_dir()


def test_writing_a_file_removes_what_killed_writers_of_that_file_left(tmp_path):
    leave(tmp_path, ".files.json.0123abcd.tmp", ".other.json.0123abcd.tmp", *OTHERS)
    write_atomic(tmp_path / "files.json", b"new")
    assert names(tmp_path) == {"files.json", ".other.json.0123abcd.tmp", *OTHERS}


def hold(folder, begun, go_on):
    with temporaries.temporary_file(folder / "a.json") as (file, temporary):
        file.write(b"slow")
        begun.set()
        go_on.wait()
        os.replace(temporary, folder / "a.json")


def test_a_file_that_another_process_is_writing_stays(tmp_path):
    context = multiprocessing.get_context("fork")
    begun, go_on = context.Event(), context.Event()
    writer = context.Process(target=hold, args=(tmp_path, begun, go_on))
    writer.start()
    begun.wait()
    write_atomic(tmp_path / "a.json", b"fast")
    go_on.set()
    writer.join()
    assert writer.exitcode == 0 and (tmp_path / "a.json").read_bytes() == b"slow" and names(tmp_path) == {"a.json"}


def test_a_file_that_was_taken_for_a_leftover_before_its_lock_is_made_again(tmp_path, monkeypatch):
    lock, taken = fcntl.flock, []

    def late(file, operation):
        if not taken:
            taken.append(next(tmp_path.iterdir()))
            taken[0].unlink()
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    write_atomic(tmp_path / "a.json", b"new")
    assert taken and (tmp_path / "a.json").read_bytes() == b"new" and names(tmp_path) == {"a.json"}


def test_without_locks_only_old_files_go(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    leave(tmp_path, ".a.json.00000005.tmp", hours=5)
    leave(tmp_path, ".a.json.00000007.tmp", hours=7)
    write_atomic(tmp_path / "a.json", b"new")
    assert names(tmp_path) == {"a.json", ".a.json.00000005.tmp"}


def test_a_leftover_that_cannot_be_removed_is_reported(tmp_path, monkeypatch, caplog):
    leave(tmp_path, ".a.json.0123abcd.tmp")
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", lambda path: (_ for _ in ()).throw(OSError(errno.EIO, os.strerror(errno.EIO))))
        write_atomic(tmp_path / "a.json", b"new")
    assert "cannot remove" in caplog.text and (tmp_path / "a.json").read_bytes() == b"new"


def test_a_file_of_another_user_stays_without_a_word(tmp_path, monkeypatch, caplog):
    leave(tmp_path, ".a.json.0123abcd.tmp")
    real = os.open

    def refuse(path, flags, *mode):
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, flags, *mode)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        write_atomic(tmp_path / "a.json", b"new")
    assert names(tmp_path) == {"a.json", ".a.json.0123abcd.tmp"} and not caplog.records


@pytest.mark.parametrize("where", ["os.fsync", "os.replace"])
def test_an_interrupted_write_leaves_no_temporary_file(tmp_path, monkeypatch, where):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "a.json", b"new")
    assert names(tmp_path) == set()
