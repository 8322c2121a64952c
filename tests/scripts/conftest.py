"""Fixtures of the tests that run the training scripts."""

from pathlib import Path

import pytest
from PIL import Image

from sushi_research.files import write_image


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Equality bit for bit, and the recorded losses, are those of a CPU, also on a machine that has a GPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(autouse=True)
def without_curves(request, monkeypatch):
    """matplotlib takes as long as the rest of a small run; a test that looks at the curves asks for `with_curves`."""
    if "with_curves" not in request.fixturenames:
        monkeypatch.setattr("sushi_research.reports.training_curves.panel", lambda *_: b"")
        monkeypatch.setattr("sushi_research.reports.run_plots.panel", lambda *_: b"")
        monkeypatch.setattr("sushi_research.reports.training_curves.write", _write_point)


def _write_point(drawn, path, title):
    write_image(path, Image.new("RGB", (1, 1)))


@pytest.fixture
def with_curves():
    """The runs of this test plot their curves."""


@pytest.fixture
def forked(tmp_path):
    """Starts scripts in forked processes: `forked(script, *words, **environment)`; what still runs at the end is killed."""
    from testing.forked_scripts import ForkedScript

    started = []

    def start(script: str, *words: object, **environment: str) -> ForkedScript:
        place = tmp_path / f"forked-{len(started)}"
        started.append(ForkedScript(script, words, place, {"ACCELERATE_USE_CPU": "true", **environment}))
        return started[-1]

    yield start
    for script in started:
        script.kill()


@pytest.fixture
def kept(monkeypatch):
    """The text encoders of the runs of a test (`TextEncoders`)."""
    from sushi_research.training import text_encoders

    found, real = [], text_encoders.prepare

    def prepare(*arguments):
        found.append(real(*arguments))
        return found[-1]

    monkeypatch.setattr(text_encoders, "prepare", prepare)
    return found


@pytest.fixture(scope="session")
def caches(tmp_path_factory) -> Path:
    """One cache folder for all runs: what an entry holds does not depend on what was there before it."""
    return tmp_path_factory.mktemp("caches")


@pytest.fixture
def trainer(architecture, bases, photos, caches, tmp_path):
    """Runs the script of each architecture; a test that parametrizes `architecture` chooses its own."""
    from script_runs import Trainer

    return Trainer(architecture, bases[architecture], photos, tmp_path, caches)
