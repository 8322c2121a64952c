"""Checkpoints under kill -9, damage, a full disk and a storm of signals; one run folder under two processes."""

import errno
import os
import random
import select
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from cases import case

from sushi_research.errors import UserError
from sushi_research.runs.checkpoint import latest_checkpoint, read_checkpoint, save_checkpoint
from sushi_research.runs.run_folder import open_run_folder

FACTS = {"samples_seen": 0, "epoch": 0, "world": 1, "identity": {}}
POSIX = pytest.mark.skipif(os.name == "nt", reason="POSIX signals, fork and locks")


def save(folder, step, keep=10):
    return save_checkpoint(folder, step, {"value": torch.full((1000,), float(step))}, FACTS, keep)


def start(script, *arguments):
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def flip_bit(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


@POSIX
@pytest.mark.slow
def test_killed_at_any_moment_the_newest_checkpoint_is_whole(tmp_path):
    """Twenty writers in a row, each going on where the last was killed; forked, so that torch is loaded once."""
    script = """
        import os, random, select, signal, sys, time
        from pathlib import Path
        import torch
        from sushi_research.runs.checkpoint import latest_checkpoint, read_checkpoint, save_checkpoint

        folder, facts = Path(sys.argv[1]), {"identity": {}}
        random.seed(0)

        def train(report):
            last = latest_checkpoint(folder)
            step = last.step if last else 0
            while True:
                step += 1
                save_checkpoint(folder, step, {"value": torch.full((300_000,), float(step))}, facts, keep=2)
                os.write(report, step.to_bytes(4, "big"))

        done = 0
        for trial in range(20):
            read_end, write_end = os.pipe()
            child = os.fork()
            if child == 0:
                train(write_end)
            os.close(write_end)
            select.select([read_end], [], [])       # the first save is done, or the child is dead
            time.sleep(random.random() * 0.03)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            reported = os.read(read_end, 1 << 16)
            os.close(read_end)
            assert reported, "the writer died by itself"
            finished = int.from_bytes(reported[-4:], "big")
            assert finished > done, (finished, done)
            for path in folder.glob("step-*"):
                read_checkpoint(path)                # whatever has the name is whole
            found = latest_checkpoint(folder)
            assert found.step in (finished, finished + 1), (found.step, finished)
            assert torch.equal(found.load()["value"], torch.full((300_000,), float(found.step)))
            assert not list(folder.glob(".*"))
            done = finished
        print("twenty kills")
    """
    process = start(script, tmp_path)
    output, errors = process.communicate()
    assert (process.returncode, output.strip()) == (0, "twenty kills"), errors


def truncate(path):
    os.truncate(path / "state.pt", (path / "state.pt").stat().st_size - 1)


def lose_state(path):
    (path / "state.pt").unlink()


def lose_manifest(path):
    (path / "manifest.json").unlink()


def cut_manifest(path):
    os.truncate(path / "manifest.json", 40)


def empty_folder(path):
    lose_state(path)
    lose_manifest(path)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, caplog):
    for damage in (truncate, lose_state, lose_manifest, cut_manifest, empty_folder):
        with case(damage.__name__):
            caplog.clear()
            folder = tmp_path / damage.__name__
            save(folder, 10)
            damage(save(folder, 20))
            found = latest_checkpoint(folder)
            assert found.step == 10 and torch.equal(found.load()["value"], torch.full((1000,), 10.0))
            (record,) = caplog.records
            message = record.getMessage()
            assert "step-00000020 is damaged" in message and "using step-00000010 instead" in message


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    save(tmp_path, 10)
    checkpoint = save(tmp_path, 20)
    for name in ("state.pt", "manifest.json"):
        path = checkpoint / name
        intact = path.read_bytes()
        for position in random.Random(0).sample(range(len(intact)), 50):
            flip_bit(path, position)
            assert latest_checkpoint(tmp_path).step == 10, (name, position)
            path.write_bytes(intact)
    assert latest_checkpoint(tmp_path).step == 20


def test_all_damaged_is_the_users_decision(tmp_path):
    for path in [save(tmp_path, 10), save(tmp_path, 20)]:
        truncate(path)
    with pytest.raises(UserError, match=f"no whole checkpoint is left .* delete {tmp_path} to start this run afresh"):
        latest_checkpoint(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000020"]


def test_a_disk_that_refuses_leaves_the_earlier_checkpoints(tmp_path, monkeypatch):
    save(tmp_path, 10, keep=1)
    for where in ("torch.save", "os.fsync", "os.rename"):
        for code, advice in ((errno.ENOSPC, "free some space"), (errno.EACCES, "make the folder writable")):

            def refuse(*arguments, code=code, **named):
                raise OSError(code, os.strerror(code))

            told = f"cannot save the checkpoint .*step-00000020: {os.strerror(code)}; {advice}"
            with case(f"{where}, {os.strerror(code)}"):
                with monkeypatch.context() as patch:
                    patch.setattr(where, refuse)
                    with pytest.raises(UserError, match=told):
                        save(tmp_path, 20, keep=1)
                assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]
                assert latest_checkpoint(tmp_path).step == 10
    save(tmp_path, 20, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000020"]


@POSIX
@pytest.mark.slow
def test_a_write_that_really_stops_in_the_middle(tmp_path):
    """A limit on the size of files: the kernel takes half of the state and refuses the rest."""
    script = """
        import resource, sys
        from pathlib import Path
        import torch
        from sushi_research.runs.checkpoint import save_checkpoint
        from sushi_research.errors import UserError

        folder = Path(sys.argv[1])
        save_checkpoint(folder, 1, {"value": torch.zeros(1000)}, {"identity": {}}, keep=1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        try:
            save_checkpoint(folder, 2, {"value": torch.zeros(100_000)}, {"identity": {}}, keep=1)
        except UserError as error:
            print(error)
    """
    process = start(script, tmp_path)
    output, errors = process.communicate()
    assert "cannot save the checkpoint" in output and "File too large" in output, errors
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert latest_checkpoint(tmp_path).step == 1


@POSIX
@pytest.mark.slow
def test_a_storm_of_signals_does_not_disturb_a_save(tmp_path):
    script = """
        import sys
        from pathlib import Path
        import torch
        from sushi_research.runs.checkpoint import save_checkpoint
        from sushi_research.stopping import StopRequest

        with StopRequest() as stop:
            print("training", flush=True)
            step = 0
            while not stop.poll():
                step += 1
            print("saving", flush=True)
            while stop.signals < 30 or step % 10:
                state = {"value": torch.zeros(500_000)}
                path = save_checkpoint(Path(sys.argv[1]), step, state, {"identity": {}}, keep=1)
                step += 1
            print(path.name, stop.reason, flush=True)
            sys.stdin.readline()
    """
    process = start(script, tmp_path)
    assert process.stdout.readline() == "training\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "saving\n"
    number = 0
    while not select.select([process.stdout], [], [], 0.001)[0]:  # until it tells the name, or has died
        number += 1
        process.send_signal((signal.SIGINT, signal.SIGTERM)[number % 2])
    output, errors = process.communicate("\n")
    name, reason = output.split()
    assert (process.returncode, reason) == (0, "SIGTERM"), errors
    assert errors.count("stopping at the next step boundary") == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]
    read_checkpoint(tmp_path / name)


@POSIX
def test_one_run_folder_takes_one_process(tmp_path):
    script = """
        import sys
        from pathlib import Path
        from sushi_research.runs.run_folder import open_run_folder

        run = open_run_folder(Path(sys.argv[1]), "trial")
        print("open", flush=True)
        sys.stdin.read()
    """
    process = start(script, tmp_path)
    assert process.stdout.readline() == "open\n"
    try:
        with pytest.raises(UserError, match=f"in use by process {process.pid} on .*: wait for it or stop it"):
            open_run_folder(tmp_path, "trial")
        open_run_folder(tmp_path, "trial", writer=False).close()
        open_run_folder(tmp_path, "another").close()
    finally:
        process.kill()
        process.communicate()
    with open_run_folder(tmp_path, "trial") as run:  # the lock went with the process
        assert run.path == tmp_path / "trial"
