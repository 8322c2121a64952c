"""How W&B's panels are arranged: what the client is told, and what it makes of it, by a real offline run."""

import json
from types import SimpleNamespace

import pytest
from PIL import Image

from sushi_research.runs import tracking, wandb_run
from sushi_research.runs.metrics_file import MetricsFile

MINIMA = ("training/loss", *(f"loss_by_timestep/{number}" for number in range(4)), "evaluation/loss")


@pytest.fixture
def offline(tmp_path):
    run = wandb_run.WandbRun("tests", "offline", {"dir": str(tmp_path), "id": "0123abcd"})
    yield run
    run.run.finish()


def test_axes_minima_and_sections(offline, tmp_path):
    run = SimpleNamespace(is_main_process=True, trackers=[offline])
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
        values = {"loss": loss, "loss_by_timestep/0": loss, "lr": 0.1, "evaluation/loss_over_base": -loss}
        tracking.log(run, metrics, values, step)
    summary = offline.run.summary
    for name in ("training/loss", "loss_by_timestep/0"):
        assert (summary[name]["min"], summary[name]["last"]) == (1.0, 2.0)
    assert (summary["training/lr"], summary["evaluation/loss_over_base"]) == (0.1, -2.0), "a sweep reads a number"
    assert run.trackers == [offline]


def test_samples_come_as_pictures_and_as_a_table(offline, tmp_path, caplog):
    paths = [tmp_path / f"{name}.png" for name in ("a", "b")]
    for number, path in enumerate(paths):
        Image.new("RGB", (8 - 4 * number, 4), (number, 0, 0)).save(path)
    run = SimpleNamespace(is_main_process=True, trackers=[offline])
    tracking.log_images(run, "samples", paths, ["a cat", "a <dog>"], 250)
    assert run.trackers == [offline]
    media = tmp_path / "wandb" / next(path.name for path in (tmp_path / "wandb").glob("offline-run-*")) / "files/media"
    pictures = sorted((media / "images/samples").glob("samples*.png"))
    assert [Image.open(path).size for path in pictures] == [(8, 4), (8, 4)], "W&B shows all in the size of the first"
    assert caplog.records == []
    [table] = (media / "table/samples").glob("table*.table.json")
    found = json.loads(table.read_text())
    assert found["columns"] == ["step", "caption", "image"]
    # This is W&B's preview; the images are in the table's artifact.
    assert found["data"] == [[250, "a cat", "Image"], [250, "a <dog>", "Image"]]


def test_the_client_is_told_the_axis_of_every_metric(monkeypatch):
    import wandb

    calls = []
    fake = SimpleNamespace(define_metric=lambda name, **options: calls.append((name, options)))
    monkeypatch.setattr(wandb, "init", lambda **_: fake)
    wandb_run.WandbRun("tests", "offline", {})
    assert calls == [
        ("step", {}),
        ("*", {"step_metric": "step"}),
        *((name, {"step_metric": "step", "summary": "min,last"}) for name in MINIMA),
    ]
