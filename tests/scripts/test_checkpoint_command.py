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


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("no-such-program {step}", "was not run: there is no program no-such-program"),
        (
            f"{sys.executable} -c 'print(1); print(\"last words\"); exit(3)'",
            "(exit status 3); the last that it said: last words",
        ),
        (
            f"{sys.executable} -c 'import os; os.kill(os.getpid(), 9)'",
            "failed (signal 9); the last that it said: nothing",
        ),
    ],
)
def test_its_failure_is_a_warning(trainer, caplog, command, words):
    changes = {"train.steps": 2, "checkpoint.every": 1, "checkpoint.command": command}
    assert trainer.train("run", changes) == 0
    warned = [message for message in caplog.messages if "the run goes on" in message]
    assert len(warned) == 2 and all(words in message for message in warned)


def test_a_stop_waits_for_it_and_a_second_one_ends_it(trainer, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("sushi_research.stopping.ONE_REQUEST", 0.05)
    ask = f"import os, time; os.kill({os.getpid()}, 15); time.sleep(0.3); {{}}"
    once = ask.format(f"open('{tmp_path / 'done'}', 'w')")
    changes = {"train.steps": 3, "checkpoint.every": 1}
    assert trainer.train("once", changes | {"checkpoint.command": f'python -c "{once}"'}) == 128 + signal.SIGTERM
    assert (tmp_path / "done").exists() and trainer.checkpoint("once").step == 2
    twice = ask.format(f"os.kill({os.getpid()}, 15); time.sleep(60)")
    begun = time.monotonic()
    assert trainer.train("twice", changes | {"checkpoint.command": f'python -c "{twice}"'}) == 128 + signal.SIGTERM
    assert "failed (signal 15)" in caplog.text and time.monotonic() - begun < 50


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
