"""Provenance: this code's commit and no other's, the libraries, the machine; one entry per start."""

import json
import os
import shutil
import subprocess
from importlib.metadata import version

import pytest

from sushi_research.errors import UserError
from sushi_research.runs import machine, provenance

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def git(folder, *arguments):
    command = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("a = 1\n")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-q", "-m", "one")
    return tmp_path


@needs_git
def test_the_commit_and_whether_files_differ(checkout):
    commit = git(checkout, "rev-parse", "HEAD")
    (checkout / "untracked.txt").write_text("")
    assert provenance.git_state(checkout) == {"commit": commit, "dirty": False}
    (checkout / "code.py").write_text("a = 2\n")
    assert provenance.git_state(checkout) == {"commit": commit, "dirty": True}


@needs_git
def test_asking_for_the_state_does_not_write_to_the_repository(checkout):
    os.utime(checkout / "code.py", (1, 1))  # git status would note this in the index
    index = (checkout / ".git" / "index").read_bytes()
    assert provenance.git_state(checkout)["dirty"] is False
    assert (checkout / ".git" / "index").read_bytes() == index


@needs_git
def test_a_repository_that_only_encloses_the_code_is_not_its_own(checkout):
    inner = checkout / "venv" / "site-packages"
    inner.mkdir(parents=True)
    assert provenance.git_state(inner) == {"commit": None, "dirty": None}


@needs_git
def test_a_hook_of_another_repository_does_not_mislead(checkout, tmp_path_factory, monkeypatch):
    other = tmp_path_factory.mktemp("other")
    git(other, "init", "-q")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / ".git" / "index"))
    state = provenance.git_state(checkout)
    assert state["dirty"] is False and len(state["commit"]) == 40


def test_without_git_or_a_checkout_it_is_unknown(tmp_path, monkeypatch):
    assert provenance.git_state(tmp_path) == {"commit": None, "dirty": None}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git_state() == {"commit": None, "dirty": None}


def test_versions_are_those_installed(monkeypatch):
    assert machine.library_versions()["torch"] == version("torch")
    monkeypatch.setattr(machine, "LIBRARIES", ("torch", "no-such-library"))
    assert machine.library_versions() == {"torch": version("torch"), "no-such-library": None}


def entry(**changed):
    facts = {
        "config": {"train": {"seed": 1}},
        "config_hash": "c",
        "dataset_hash": "d",
        "split": {"source": None},
        "validation_set": None,
        "recipe": "r",
        "base_hashes": {"unet": "u"},
        "precision": "fp32",
        "device": "cpu",
        "world": 2,
    }
    return provenance.collect(**facts) | changed


def test_each_start_adds_an_entry(tmp_path):
    path = tmp_path / "provenance.json"
    assert provenance.entries(path) == []
    for step in (0, 120):
        provenance.add_entry(path, entry(step=step))
    first, second = json.loads(path.read_text())
    assert (first["step"], second["step"]) == (0, 120) and provenance.entries(path) == [first, second]
    assert (first["config"], first["dataset"], first["base"], first["world"]) == ("c", "d", {"unet": "u"}, 2)
    assert (first["recipe"], first["validation_set"], first["precision"]) == ("r", None, "fp32")
    assert first["resolved_config"] == {"train": {"seed": 1}} and "resolved_config" not in provenance.facts(first)
    assert first["device"] and first["code"]["version"] and first["date"].endswith("+00:00")
    assert first["machine"]["cpus"] >= 1 and first["machine"]["threads"] >= 1 and first["machine"]["memory_gib"] > 0
    assert first["machine"]["gpu_memory_gib"] is None


def test_what_changed_between_two_starts_is_said():
    code = {"version": "1", "commit": "a" * 40, "dirty": False}
    before = entry(code=code)
    assert provenance.changes(before, entry(code=code)) == [] == provenance.changes(None, before)
    libraries = before["libraries"] | {"torch": "1.0", "wandb": "0.1"}
    now = entry(code=code | {"commit": "b" * 40, "dirty": True}, libraries=libraries, world=1, device="another")
    code_changed, torch_changed, device, world = provenance.changes(before, now)
    assert code_changed.startswith("the code was aaaaaaaaaa and is bbbbbbbbbb with changes; the result may differ")
    assert f"library versions have changed: torch {before['libraries']['torch']} -> 1.0;" in torch_changed
    assert "the device was" in device and "the number of processes was 2 and is 1" in world
    (dirty,) = provenance.changes(before, entry(code=code | {"dirty": True}))
    assert "differs from its commit aaaaaaaaaa" in dirty


def recorded(**files):
    return {"version": "1", "commit": "a", "dirty": True, "script": "train.py", "hash": str(files), "files": files}


def test_recorded_code_is_compared_by_its_files():
    """The commit and uncommitted changes say nothing then: a comment may be all that changed."""
    before = entry(code=recorded(script="1", **{"losses.py": "2"}))
    same = recorded(script="1", **{"losses.py": "2"}) | {"commit": "b", "script": "mine.py"}
    assert provenance.changes(before, entry(code=same)) == []
    (sentence,) = provenance.changes(before, entry(code=recorded(script="1", **{"losses.py": "3", "more.py": "4"})))
    assert sentence == ("the code has changed in losses.py, more.py; the result may differ from an uninterrupted run's")
    (unknown,) = provenance.changes(entry(code={"version": "0", "commit": "a", "dirty": False}), before)
    assert unknown.startswith("the code was a and is a with changes")


def test_the_launches_that_made_a_run():
    """A launch counts if steps of it are left: not one that saved no checkpoint, nor one whose checkpoints were damaged."""
    for steps, at, kept in [
        ([0, 120], None, [0, 1]),
        ([0, 0, 120], None, [1, 2]),  # began again
        ([0, 120, 120], None, [0, 2]),  # killed before a checkpoint
        ([0, 120, 80], None, [0, 2]),  # went on from an earlier one
        ([0, 120], 120, [0]),
        ([0, 120], 200, [0, 1]),
        ([0], 0, []),
        ([None, None], None, [0, 1]),  # what no training wrote
    ]:
        entries = [{"number": number} | ({} if step is None else {"step": step}) for number, step in enumerate(steps)]
        assert [each["number"] for each in provenance.launches(entries, at)] == kept, (steps, at)


def test_a_damaged_file_is_not_overwritten(tmp_path):
    path = tmp_path / "provenance.json"
    path.write_text("[{")
    with pytest.raises(UserError, match="provenance.json is not valid JSON"):
        provenance.add_entry(path, {})
    assert path.read_text() == "[{"
