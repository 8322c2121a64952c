"""Fixtures of the tests that run the training scripts."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Equality bit for bit, and the recorded losses, are those of a CPU, also on a machine that has a GPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="session")
def caches(tmp_path_factory) -> Path:
    """One cache folder for all runs: what an entry holds does not depend on what was there before it."""
    return tmp_path_factory.mktemp("caches")


@pytest.fixture
def trainer(architecture, bases, photos, caches, tmp_path):
    """Runs the script of each architecture; a test that parametrizes `architecture` chooses its own."""
    from script_runs import Trainer

    return Trainer(architecture, bases[architecture], photos, tmp_path, caches)
