"""A full disk while pictures are written: no step, result or page is lost, and the pictures are made later."""

import errno
import os
from pathlib import Path

import pytest
from fake_runs import FakeValidationSet, base_loss, fake_run, losses
from PIL import Image
from script_runs import script

from sushi_research.errors import UserError
from sushi_research.evaluation import adapter_files
from sushi_research.evaluation.measured_sets import MeasuredSets
from sushi_research.evaluation.results import Results

ONE = pytest.mark.parametrize("architecture", ["sd15"])
PICTURES = {"train.steps": 2, "sample.enabled": True, "sample.prompts": ["a cat"], "sample.steps": 1}


@pytest.fixture
def full(monkeypatch):
    """A set of endings of file names: those files cannot be written, because the disk is full."""
    endings, replace = set(), os.replace

    def refuse(source, target):
        if str(target).endswith(tuple(endings)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    return endings


def hidden(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.name != ".lock"]


@ONE
@pytest.mark.slow
def test_a_run_goes_on_without_its_pictures_and_makes_them_later(
    trainer, full, with_curves, caplog, capsys, monkeypatch
):
    full.add(".png")
    assert trainer.train("full", PICTURES) == 0
    folder = trainer.folder("full")
    assert (folder / "full.safetensors").exists() and not list(folder.rglob("*.png")) and not hidden(folder)
    without = "No space left on device: the run goes on without the samples of step"
    assert [record.getMessage().removeprefix(f"cannot write {folder}/") for record in caplog.records] == [
        f"samples/step-00000000/00-seed0.png: {without} 0",
        f"samples/step-00000002/00-seed0.png: {without} 2",
        "loss.png: No space left on device: the run is without its page or its curves, and the same command again makes them",
    ]
    full.clear()
    adapter = trainer.adapter("full")
    assert trainer.train("full", PICTURES) == 0
    written = {str(path.relative_to(folder)) for path in folder.rglob("*.png")}
    samples = [f"samples/step-{step:08d}{ending}" for step in (0, 2) for ending in (".png", "/00-seed0.png")]
    assert written == {"loss.png", "samples/progress.png", *samples}
    assert all((trainer.adapter("full")[name] == adapter[name]).all() for name in adapter)

    # Only the grids do not fit: they are made of the images, without a model.
    full |= {"progress.png", "step-00000000.png", "step-00000002.png", "loss.png"}
    assert trainer.train("grids", PICTURES) == 0
    other = trainer.folder("grids")
    assert [path.name for path in other.rglob("*.png")] == ["00-seed0.png"] * 2
    full.clear()
    capsys.readouterr()
    monkeypatch.setattr("sushi_research.models.loading.load_unet", None)
    assert trainer.train("grids", PICTURES) == 0 and "there is nothing to do" in capsys.readouterr().out
    for name in written - {"loss.png"}:  # its title is the run's name
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    assert (other / "loss.png").exists()


def test_the_page_comes_without_the_plots(full, tmp_path, capsys):
    full.add(".png")
    runs = [fake_run(tmp_path / "runs" / name, gain) for name, gain in (("a", 0.05), ("b", 0.02))]
    compare = script("compare_runs")
    words = [*map(str, runs), "--wandb", "off", "--output", str(tmp_path / "page")]
    assert compare.main(compare.parse(words)) == 0
    page = (tmp_path / "page/comparison.md").read_text()
    reason = f"cannot write {tmp_path}/page/curves.png: No space left on device: the page is without it"
    assert reason in page and f"warning: {reason}" in capsys.readouterr().err
    full.add("comparison.html")
    with pytest.raises(UserError, match="cannot write .*comparison.html: No space left on device; free some space"):
        compare.main(compare.parse(words))
    assert "b is worse than a" in capsys.readouterr().out and not hidden(tmp_path / "page")


def test_images_that_fit_are_kept(full, tmp_path):
    sample = script("sample")
    singles = sample.make_folders(tmp_path / "grid.png")
    (singles / "07-07.png").touch()
    full.add("00-00.png")
    images = {
        path: Image.new("RGB", (8, 8)) for path in (singles / "00-00.png", singles / "00-01.png", tmp_path / "grid.png")
    }
    with pytest.raises(UserError, match=r"cannot write .*00-00.png: No space left.*2 of 3 images are written"):
        sample.write_all(images, singles)
    assert [path.name for path in singles.iterdir()] == ["00-01.png"] and (tmp_path / "grid.png").exists()


def test_an_evaluation_keeps_its_results_without_its_pictures(full, tmp_path, caplog, monkeypatch):
    full.add(".png")
    val_set, image = FakeValidationSet(), Image.new("RGB", (8, 8))
    monkeypatch.setattr(FakeValidationSet, "describe", lambda _: {}, raising=False)
    found = [
        adapter_files.Result(
            name,
            scale,
            {"validation": (losses(val_set, gain, 0), base_loss(val_set))},
            [("00-seed0.png", "a cat")],
            [image],
        )
        for name, scale, gain in (("base", 0.0, 0.0), ("one", 0.5, 0.1), ("two", 1.0, 0.2))
    ]
    for result in found:
        adapter_files.write(tmp_path, result, MeasuredSets(val_set), {"adapter": None})
    adapter_files.finish(tmp_path, found, val_set)
    assert [Results(tmp_path / name / "evaluation.parquet").steps() for name in ("base", "one", "two")] == [[0]] * 3
    assert (tmp_path / "evaluation.md").read_text() == adapter_files.table(found, val_set) + "\n"
    assert len(caplog.records) == 5 and "grid.png: No space left on device: the evaluation" in caplog.text
    assert not list(tmp_path.rglob("*.png")) and not hidden(tmp_path)
