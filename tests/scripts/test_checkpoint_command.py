"""`checkpoint.command`: the user's command after each checkpoint."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from test_resume import at_micro_batch, stop

from sushi_research import models
from sushi_research.config.command_line import config_to_yaml, load_config
from sushi_research.errors import UserError
from sushi_research.training import checkpoint_command

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="POSIX signals"),
    pytest.mark.parametrize("architecture", ["sd15"]),
]
WRITE = "import sys; open(sys.argv[1], 'a').write(' '.join(sys.argv[2:]) + chr(10))"


def test_it_runs_after_each_checkpoint_and_is_stored_nowhere(trainer, tmp_path, capsys):
    said = tmp_path / "said of it"
    command = f"python -c \"{WRITE}\" '{said}' {{step}} {{run}} x{{checkpoint}} {{adapter}}"
    changes = {"train.steps": 3, "checkpoint.keep_adapters": None, "checkpoint.command": command}
    with at_micro_batch(trainer, 2, 0, stop):
        assert trainer.train("run", changes) == 128 + signal.SIGTERM
    assert f"command      after each checkpoint: {command}" in capsys.readouterr().out
    assert trainer.train("run", changes) == 0
    run = trainer.folder("run")
    lines = [line.split() for line in said.read_text().splitlines()]
    assert [line[:3] for line in lines] == [[str(n), str(run), f"x{run}/checkpoints/step-{n:08d}"] for n in (1, 2, 3)]
    files = [run / "run-000001.safetensors", run / "run-000002.safetensors", run / "run.safetensors"]
    assert [Path(line[3]) for line in lines] == files and all(file.is_file() for file in files)
    for path in run.rglob("*"):
        assert not path.is_file() or b"said of it" not in path.read_bytes(), path
    assert "command: null" not in config_to_yaml(trainer.config("x", changes))


def test_its_failure_is_a_warning(trainer, caplog):
    command = "no-such-program {step}"
    assert trainer.train("run", {"train.steps": 1, "checkpoint.command": command}) == 0
    expected = f"step 1: the command {command} was not run: there is no program no-such-program; the run goes on"
    assert expected in caplog.messages
    for code, words in (
        ("print(1); print('last words'); exit(3)", "failed (exit status 3); the last that it said: last words"),
        ("import os; os.kill(os.getpid(), 9)", "failed (signal 9); the last that it said: nothing"),
        ("", None),
    ):
        assert checkpoint_command.outcome_of([sys.executable, "-c", code]) == (words, False)


def test_no_room_for_what_it_prints_is_no_error(architecture, monkeypatch):
    def full():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    said, _ = checkpoint_command.outcome_of([sys.executable, "-c", ""])
    assert said.startswith("was not run: there is no place for what it prints")


def test_a_stop_waits_for_it_and_a_second_one_ends_it(trainer, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("sushi_research.stopping.ONE_REQUEST", 0.05)
    ask = f"import os; os.kill({os.getpid()}, 15)"
    code = f"{ask}; import time; time.sleep(0.3); open('{tmp_path / 'waited'}', 'w'); {ask}; time.sleep(60)"
    changes = {"train.steps": 3, "checkpoint.every": 1, "checkpoint.command": f'python -c "{code}"'}
    begun = time.monotonic()
    assert trainer.train("run", changes) == 128 + signal.SIGTERM
    assert (tmp_path / "waited").exists() and trainer.checkpoint("run").step == 2
    assert time.monotonic() - begun < 50
    # The checkpoint of the stop does not wait for it again.
    assert [message for message in caplog.messages if "command" in message] == [
        f"step 1: you ended the command {changes['checkpoint.command']}; it is not run for the checkpoint of this stop"
    ]


def test_a_third_request_kills_what_ignores_the_second(architecture, tmp_path, monkeypatch):
    monkeypatch.setattr("sushi_research.stopping.ONE_REQUEST", 0.05)
    monkeypatch.setattr("sushi_research.stopping.SIGNALS", (signal.SIGUSR1,))
    ask = f"os.kill({os.getpid()}, 10); time.sleep(0.2)"
    code = f"import os, signal, time; signal.signal(15, signal.SIG_IGN); {'; '.join([ask] * 3)}; time.sleep(60)"
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        # Of a shell, what it runs is ended too.
        said = checkpoint_command.outcome_of(["sh", "-c", f'trap "" TERM; {sys.executable} -c "{code}"; true'])
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert said[0].startswith("failed (signal 9)") and said[1]


def test_a_command_that_cannot_be_run_is_refused_before_the_training(architecture):
    def load(command):
        words = ["--model.base", "x", "--data.path", "x", "--train.steps", "1", f"--checkpoint.command={command}"]
        return load_config(models.config_classes()[architecture], words, script="s", intro="1\n2\n3\n4\n5")

    assert load("copy {adapter} {step}").checkpoint.command == "copy {adapter} {step}"
    for command, words in (
        ("copy {file}", "{file} is not replaced by anything: the placeholders are {run}, {step}"),
        ("copy 'x", "it cannot be split into words"),
        ("  ", "it has no words"),
    ):
        with pytest.raises(UserError) as caught:
            load(command)
        assert words in str(caught.value)


def test_the_config_of_a_run_folder_runs_nothing(architecture, tmp_path):
    config = "model: {base: x}\ndata: {path: x}\ntrain: {steps: 1}\ncheckpoint: {command: 'rm {run}'}\n"
    (tmp_path / "config.yaml").write_text(config)
    words = ["--config", str(tmp_path / "config.yaml")]

    def load():
        return load_config(models.config_classes()[architecture], words, script="s", intro="1\n2\n3\n4\n5")

    assert load().checkpoint.command == "rm {run}", "the user's own file"
    (tmp_path / "run.json").touch()
    with pytest.raises(UserError, match="config.yaml, which is in a run folder, and no command is taken from there"):
        load()
