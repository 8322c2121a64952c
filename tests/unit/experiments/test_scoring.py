"""Scoring finished runs with the command of an experiment file: what is a command, when it is run, and what counts."""

from __future__ import annotations

import json
import sys

import numpy
import pytest
from fake_runs import fake_run
from safetensors.numpy import save_file

from sushi_research.errors import UserError
from sushi_research.experiments.scoring import checked, is_scored, score, words_of
from sushi_research.runs.run_folder import RunFolder

COMMAND = "python judge.py '{run}'"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("python judge.py", "does not say which run is scored: put {run} in it"),
        ("python judge.py {run} {seed}", "{seed} is not replaced by anything"),
        ("python judge.py {}", "{} is not replaced by anything"),
        ("python 'judge.py {run}", "cannot be split into words .No closing quotation"),
        ("", "it has no words"),
    ],
)
def test_what_is_no_command_is_refused(command, words):
    with pytest.raises(ValueError, match=words):
        checked(command)


def test_the_words_of_a_command(tmp_path):
    run = tmp_path / "a run; with $HOME"
    assert words_of("python -m judge --in={run}/samples '{\"a\": 1}'", run) == [
        sys.executable,
        "-m",
        "judge",
        f"--in={run}/samples",
        '{"a": 1}',
    ]
    assert words_of("{run}/judge python", run) == [f"{run}/judge", "python"]


@pytest.fixture
def folder(tmp_path):
    """A finished run with an adapter file."""
    run = RunFolder(fake_run(tmp_path / "run"), None)
    write_adapter(run)
    return run


def write_adapter(run, hash="a", written="1"):
    metadata = {"sshs_model_hash": hash, "ss_training_finished_at": written}
    save_file({"a.lora_up.weight": numpy.ones(1, numpy.float32)}, run.adapter, metadata=metadata)


def judge(run, text='{"votes": 3}', status=0):
    """Stands for the process of a command that writes `text`."""

    def call(words):
        assert words[1:] == ["judge.py", str(run.path)]
        if text is not None:
            run.scores.write_text(text)
        return status, "ValueError: no picture"

    return call


def test_a_run_is_scored_once_by_a_command_and_again_if_it_or_the_adapter_changes(folder):
    assert not is_scored(folder, COMMAND)
    score(folder, COMMAND, judge(folder))
    assert is_scored(folder, COMMAND) and not is_scored(folder, COMMAND + " --twice")
    write_adapter(folder, written="2")  # a lost file is written again: the same tensors at another time
    assert is_scored(folder, COMMAND)
    write_adapter(folder, hash="b")
    assert not is_scored(folder, COMMAND)
    score(folder, COMMAND, judge(folder))
    record = json.loads(folder.run.read_text())
    folder.run.write_text(json.dumps(record | {"finished_at": 40}))
    assert not is_scored(folder, COMMAND)
    folder.run.write_text(json.dumps(record | {"finished_at": None}))
    assert not is_scored(folder, COMMAND)
    folder.run.write_text(json.dumps(record))
    assert is_scored(folder, COMMAND)
    folder.scores.write_text("{")
    assert not is_scored(folder, COMMAND)


@pytest.mark.parametrize(
    ("text", "status", "words"),
    [
        ('{"votes": 3}', 2, "failed .exit status 2.; the last that it said: ValueError: no picture"),
        ('{"votes": 3}', -9, "failed .signal 9.; the last that it said: ValueError: no picture"),
        (None, 0, "scores.json is missing: .*; the last that it said: ValueError: no picture"),
        ('{"votes": "many"}', 0, "scores.json does not hold scores .votes: .*the last that it said: ValueError"),
    ],
)
def test_without_new_scores_a_run_has_none(folder, text, status, words):
    """Also if it had some, of an earlier adapter."""
    score(folder, COMMAND, judge(folder))
    write_adapter(folder, hash="b")
    with pytest.raises(UserError, match=f"^run has no scores: .*{words}") as caught:
        score(folder, COMMAND, judge(folder, text, status))
    assert "\n" not in str(caught.value)
    assert not is_scored(folder, COMMAND) and not json.loads(folder.scores_source.read_text())["complete"]


def test_an_adapter_that_cannot_be_read_is_one_sentence(folder):
    folder.adapter.write_bytes(b"")
    with pytest.raises(UserError, match="^run has no scores: .*run.safetensors"):
        score(folder, COMMAND, judge(folder))


def test_scores_by_hand_are_kept_under_another_name(folder):
    folder.scores.write_text('{"votes": 17}')
    score(folder, COMMAND, judge(folder))
    assert (folder.path / "scores.earlier.json").read_text() == '{"votes": 17}'
    write_adapter(folder, hash="b")
    score(folder, COMMAND, judge(folder))
    assert (folder.path / "scores.earlier.json").read_text() == '{"votes": 17}'
