"""The page of a run: which checkpoint to take, in words and numbers that follow from the run's files."""

from __future__ import annotations

import re

import numpy as np
import pytest
from fake_runs import FakeValidationSet, base_loss, fake_run
from PIL import Image

from sushi_research.evaluation.results import Results
from sushi_research.reports import run_page
from sushi_research.runs.run_folder import RESULT_FILES, RunFolder

STEPS = (0, 10, 20, 30)
HELD_OUT = FakeValidationSet()
TRAINED = FakeValidationSet(tuple(f"trained{number}" for number in range(12)), hash="trained-hash")
CAPTIONS = FakeValidationSet(("a cat", "a dog", "a tree"), 4, "caption-hash")


def record(folder, name: str, measured: FakeValidationSet, means, spread: float = 0.02) -> None:
    """Results whose mean log ratio at each step is that of `means`, with a deviation of each unit and step."""
    base, rng = base_loss(measured), np.random.default_rng([7, *map(ord, name)])
    for step, mean in zip(STEPS, means, strict=True):
        deviation = spread * rng.standard_normal((len(measured.names), 1)) * (step > 0)
        Results(folder / RESULT_FILES[name]).append(
            measured, step, base * np.exp(mean + deviation - deviation.mean()), base
        )


@pytest.fixture
def run(tmp_path) -> RunFolder:
    """Best at step 20; from there on it only memorises."""
    folder = fake_run(tmp_path / "run", steps=STEPS)
    (folder / RESULT_FILES["validation"]).unlink()
    record(folder, "validation", HELD_OUT, (0, -0.5, -0.9, -0.85))
    record(folder, "trained", TRAINED, (0, -0.5, -1.0, -2.0))
    record(folder, "base_images", CAPTIONS, (0, 0.01, 0.05, 0.8))
    return RunFolder(folder, None)


def text_of(run: RunFolder) -> str:
    return re.sub(r"<style>.*?</style>|<[^>]+>", " ", run.report.read_text(encoding="utf-8"), flags=re.S)


def test_the_page_says_which_step_is_best_and_how_sure_that_is(run):
    best = run_page.write(run, "finished at step 30").best
    assert best.step == 20
    page, text = run.report.read_text(encoding="utf-8"), text_of(run)
    assert "Finished at step 30. Written 20" in text
    assert "Evaluated at 4 steps on 12 held-out images with 8 noise samples each." in text
    assert "Step 20 is the best of 3 evaluated steps" in text and "No other evaluated step is within one" in text
    # learned -0.90 against -0.85 and 0.40 of kept above the limit
    last = re.search(r"Step 20 minus step 30, the last: (\S+) \+- \S+ \(95 % interval (\S+) to (\S+)\)", text)
    assert float(last[1]) == pytest.approx(-0.45, abs=0.002) and float(last[2]) < -0.45 < float(last[3]) < 0
    assert "From step 20 on it only memorises" in text
    header, _ = re.findall(r"<tr><th>(.*?)</th></tr>", page)  # the other is of the launches
    columns = header.split("</th><th>")
    assert columns[:5] == ["step", "learned", "kept", "memorised: AUC", "gap"] and columns[-1] == "MSE"
    [row] = re.findall(r"<tr><td>20 \(best\)</td>(.*?)</tr>", page)
    assert [cell.split()[0] for cell in re.findall(r"<td>(.*?)</td>", row)][:2] == ["-0.900", "+0.050"]
    assert "prior is not measured" in text and "pictures are not measured" in text and "kept is not" not in text
    assert set(re.findall(r'src="([^"]{5})', page)) == {"data:"} and "better picture" not in text.lower()


def test_the_page_names_the_adapter_file_of_the_best_step(run):
    run_page.write(run, "finished at step 30")
    assert "Its adapter file was not kept: that needs evaluation.keep_best, or a checkpoint at that step." in text_of(
        run
    )
    run_page.write(run, "finished at step 20")
    assert "Its adapter file is run.safetensors." in text_of(run)
    run.best_adapter(20).touch()
    run_page.write(run, "stopped at step 30 of 40")
    assert "Its adapter file is run-best-000020.safetensors." in text_of(run)


def test_a_run_of_an_older_version_has_a_page_by_what_it_measured(tmp_path):
    run = RunFolder(fake_run(tmp_path / "old", kept=None), None)
    assert run_page.write(run, "finished at step 20").best.step == 20
    text = text_of(run)
    assert (
        "by learned (lower is better)." in text
        and "kept is not measured" in text
        and "memorised is not measured" in text
    )
    assert "only memorises" not in text


def test_what_is_damaged_is_a_sentence(run):
    (run.path / RESULT_FILES["base_images"]).write_bytes(b"no parquet")
    run.metrics.write_text("no line\n")
    run.thumbnails.write_text('{"dataset": 1}')
    for step in (0, 20):
        (run.path / f"pictures/step-{step:08d}").mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(run.path / f"pictures/step-{step:08d}/00-learned-seed0.png")
    assert run_page.write(run, "finished at step 30").best.step == 20
    text = text_of(run)
    assert "base_images.parquet is damaged" in text and "thumbnails.json does not hold what a run writes" in text
    assert "metrics.jsonl, line 1 is not valid JSON" in text and "Drawn at the evaluations" in text
    run.evaluation.write_bytes(b"")
    assert run_page.write(run, "finished at step 30").best is None
    assert "There are no evaluations that can be read." in text_of(run)


def test_steps_that_cannot_be_told_apart_or_chosen_are_named(tmp_path):
    folder = fake_run(tmp_path / "run", steps=STEPS)
    (folder / RESULT_FILES["validation"]).unlink()
    record(folder, "validation", HELD_OUT, (0, -0.5, np.nan, -0.5001), spread=0.2)
    run = RunFolder(folder, None)
    assert run_page.write(run, "stopped at step 30 of 40").best.step == 10
    text = text_of(run)
    assert "not sure: step 30 is within one standard error of it" in text and "Step 20 cannot be chosen" in text
