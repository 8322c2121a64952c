"""Provenance: this code's commit and no other's, the libraries, the machine; one entry per start."""

import json
import shutil
import subprocess
from importlib.metadata import version

import pytest

from sushi_research import provenance
from sushi_research.errors import UserError

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
    assert provenance.library_versions()["torch"] == version("torch")
    monkeypatch.setattr(provenance, "LIBRARIES", ("torch", "no-such-library"))
    assert provenance.library_versions() == {"torch": version("torch"), "no-such-library": None}


def test_each_start_adds_an_entry(tmp_path):
    path = tmp_path / "provenance.json"
    for step in (0, 120):
        entry = provenance.collect(
            config_hash="c", dataset_hash="d", base_hashes={"unet": "u"}, device="cpu", world=2, step=step
        )
        provenance.add_entry(path, entry)
    first, second = json.loads(path.read_text())
    assert (first["step"], second["step"]) == (0, 120)
    assert (first["config"], first["dataset"], first["base"], first["world"]) == ("c", "d", {"unet": "u"}, 2)
    assert first["device"] and first["code"]["version"] and first["date"].endswith("+00:00")


def test_a_damaged_file_is_not_overwritten(tmp_path):
    path = tmp_path / "provenance.json"
    path.write_text("[{")
    with pytest.raises(UserError, match="provenance.json is not JSON"):
        provenance.add_entry(path, {})
    assert path.read_text() == "[{"
