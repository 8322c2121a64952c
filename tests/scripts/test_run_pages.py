"""The page of a run while it trains, at a stop and at its end; nothing that happens to the page stops the training."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from script_runs import Trainer
from test_resume import at_micro_batch, stop

from sushi_research.errors import UserError
from sushi_research.reports import run_page
from sushi_research.sampling import sample_grids
from sushi_research.training import page_output

pytestmark = pytest.mark.parametrize("architecture", ["sd15"])
SETTINGS = {"sample.enabled": True, "sample.every": 1, "sample.prompts": ["a <cat>"], "train.steps": 3}


@pytest.fixture
def drawn(monkeypatch):
    """Samples without the UNet."""
    monkeypatch.setattr(sample_grids, "generate_images", lambda *_, **__: [Image.new("RGB", (64, 64))])


def test_the_page_is_written_again_as_the_run_goes_on(trainer: Trainer, drawn, monkeypatch, capsys):
    """A run without evaluations, in two pieces. Its training images are on the page, with their captions."""
    states, folder = [], trainer.folder("paged")
    write = run_page.write

    def watched(run, state):
        states.append((state, run.curves.exists()))
        return write(run, state)

    monkeypatch.setattr(run_page, "write", watched)
    monkeypatch.setattr(run_page.training_curves, "write", lambda drawn, path, title: path.touch())
    with at_micro_batch(trainer, 2, 0, stop):
        trainer.train("paged", SETTINGS)
    assert states == [("at step 0 of 3", False), ("at step 1 of 3", False), ("stopped at step 2 of 3", True)]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Stopped at step 2 of 3." in page and "a &lt;cat&gt;" in page and "Training images" in page
    thumbnails = json.loads((folder / "thumbnails.json").read_text())
    assert thumbnails["count"] == trainer.plan("paged")["images"] == len(thumbnails["images"])
    assert page.count("data:image/jpeg;base64,/9j/") == thumbnails["count"]
    # No samples are due at step 2, but the page no longer says that the run is stopped.
    assert trainer.train("paged", SETTINGS | {"sample.every": 5}) == 0
    assert [state for state, _ in states[3:]] == ["at step 2 of 3", "finished at step 3"]
    assert f"page      {folder / 'report.html'}" in capsys.readouterr().out
    assert json.loads((folder / "stage_timings.json").read_text())["training"] >= 0


def test_a_page_that_fails_stops_nothing(trainer: Trainer, drawn, monkeypatch, caplog):
    def fail(*_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(run_page, "write", fail)
    assert trainer.train("pageless", SETTINGS | {"train.steps": 1}) == 0
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "the page cannot be made (ZeroDivisionError: a bug): the run goes on without a page of step 0",
        "the page cannot be made (ZeroDivisionError: a bug): the run is without its page or its curves, and the same command again "
        "makes them",
    ]
    # A run folder that is another one now still ends the run.
    with pytest.raises(UserError, match="another one"), page_output.optional("nothing"):
        raise UserError("the folder is another one now")
