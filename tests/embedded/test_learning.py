"""Learning is seen, not supposed: the real scripts train, and the checks are loss, pixels and plain diffusers.

Every run trains SDXL's demo in full, with its own recipe. SD1.5's is trained here for a few steps only, and its loss and
pictures are checked weakly. SD1.5's full training is run by hand (`make acceptance`): demo/learned.json keeps what it
learned, with the SHA-256 of the base, the photos, the configs and the measuring code. A fast test fails when one of these
changed and no new result was recorded; no test trains it in full.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from script_runs import CONFIGS, ROOT, load_script

from demo import acceptance, show
from demo.checker import Checker, score
from demo.concepts import CONCEPTS, known_scenes
from demo.measure import checker_of, loss_on, measure, unseen_pictures
from demo.painter import BASES, load_pipeline, paint
from demo.records import dependencies, differences, read_record
from sushi_research.adapters.loading import load_adapters
from sushi_research.config.command_line import load_config
from sushi_research.runs.run_folder import RunFolder

# Over three seeds of the demo's own training (docs/demo.md), final losses lay within 0.0013 of one another and concept scores
# within 0.04; the loss fell by 0.25 and the score rose by 0.97. What is asked here is many times what seeds explain.
LOSS_MARGIN = 0.15
LEARNED = 0.85
# What is kept of the base's world, as a share of what it knew.
KEPT = 0.90

STAR = CONCEPTS["star"]
FEWER_PROMPTS = {
    "sample.prompts": "[two tuna maki on a star plate, two cucumber nigiri on a star plate, one tuna nigiri on a blue plate]"
}
SHORT = {
    "train.steps": 40,
    "checkpoint.every": 40,
    "sample.every": 40,
    "sample.prompts": "[two tuna maki on a star plate, one tuna nigiri on a blue plate]",
}
# The full training lowers the loss by 0.25. Forty steps must give a fifth of that; a wrong target or noise raises the loss.
SHORT_LOSS_MARGIN = 0.05


def train(architecture: str, folder: Path, changes: dict[str, object]) -> Path:
    """The demo's run with its own recipe but for `changes`, trained in this process by the script's `main`; returns the
    run folder."""
    files = [f"configs/demo_{architecture}.yaml", "configs/demo/star.yaml"]
    words = [word for file in files for word in ("--config", str(ROOT / file))]
    changes = changes | {
        "model.base": BASES / architecture,
        "data.path": ROOT / "demo/photos/star",
        "run.folder": folder / "runs",
        "cache.folder": folder / "cache",
        "run.name": "learned",
        "tracking.wandb": "off",
    }
    words += [word for key, value in changes.items() for word in (f"--{key}", str(value))]
    script = load_script(architecture)
    config = load_config(CONFIGS[architecture], words, script=script.__file__, intro=script.INTRO)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        assert script.main(config) == 0
    return folder / "runs" / "learned"


@pytest.fixture(scope="module")
def full_run(tmp_path_factory) -> Path:
    """SDXL's demo in full; it draws three of the six prompts."""
    return train("sdxl", tmp_path_factory.mktemp("full"), FEWER_PROMPTS)


@pytest.fixture(scope="module")
def short_run(tmp_path_factory) -> Path:
    """SD1.5's demo, cut to a few steps."""
    return train("sd15", tmp_path_factory.mktemp("short"), SHORT)


# Each run's tests stay in one process of pytest-xdist, which then trains it once.
FULL, SHORT_GROUP = pytest.mark.xdist_group("trained_sdxl"), pytest.mark.xdist_group("trained_sd15")


@pytest.fixture(params=[pytest.param("sdxl", marks=FULL), pytest.param("sd15", marks=SHORT_GROUP)])
def demo_run(request) -> tuple[str, Path]:
    """Both runs, each with its architecture."""
    return request.param, request.getfixturevalue("full_run" if request.param == "sdxl" else "short_run")


def test_the_recorded_training_is_of_these_files() -> None:
    changed = differences(read_record(acceptance.RECORD), dependencies(acceptance.inputs()), "inputs")
    assert not changed, f"{', '.join(changed)} changed since: `make acceptance` trains again and records"


def test_the_recorded_training_learned_the_concept_and_kept_the_rest() -> None:
    found = read_record(acceptance.RECORD)["results"]
    loss, (before, after), known = found["loss"], found["concept_right"], found["known_right"]
    assert loss["fall"] > LOSS_MARGIN and loss["fall"] > 5 * loss["standard_error_of_fall"]
    assert before["all"] == 0 and after["all"] >= LEARNED
    assert known[1]["all"] >= KEPT * known[0]["all"]


@pytest.mark.slow
@FULL
def test_the_concept_is_learned_and_the_rest_kept(full_run, monkeypatch) -> None:
    checker = checker_of(STAR)
    # The base draws 0 % of the concept and 100 % of the rest (docs/demo.md), which eight of each show. With the adapter, one
    # of 32 is wrong of either, so sixteen of each are far above the thresholds.
    for name in ("CONCEPT_PROMPTS", "KNOWN_PROMPTS"):
        monkeypatch.setattr(f"demo.measure.{name}", 8)
    before = measure(BASES / "sdxl", None, STAR, checker)
    for name in ("CONCEPT_PROMPTS", "KNOWN_PROMPTS"):
        monkeypatch.setattr(f"demo.measure.{name}", 16)
    after = measure(BASES / "sdxl", RunFolder(full_run, None).adapter, STAR, checker)
    fall, error = after.loss.fall_from(before.loss)
    assert fall > LOSS_MARGIN and fall > 5 * error, "more than chance among the pictures, and among the seeds"
    assert before.concept.share == 0, "the base has never seen it"
    assert after.concept.share >= LEARNED
    assert after.known.share >= KEPT * before.known.share


@pytest.mark.slow
@SHORT_GROUP
def test_a_short_training_lowers_the_loss_and_keeps_the_rest(short_run) -> None:
    base, trained = load_pipeline(BASES / "sd15"), load_pipeline(BASES / "sd15", RunFolder(short_run, None).adapter)
    pictures, asked = unseen_pictures(STAR, 8), known_scenes(8)
    fall, error = loss_on(trained, pictures).fall_from(loss_on(base, pictures))
    assert fall > SHORT_LOSS_MARGIN and fall > 5 * error
    generated = paint(trained, [scene.caption for scene in asked])
    checker = Checker(known_scenes(60))
    # The base draws all of them right; by chance it would be one in 624.
    assert score([checker.read(picture) for picture in generated], asked).right >= 4


@pytest.mark.slow
def test_lora_scale_zero_is_the_base_bit_for_bit(demo_run) -> None:
    architecture, run = demo_run
    prompts = [scene.caption for scene in STAR.unseen_scenes(2)]
    base = paint(load_pipeline(BASES / architecture), prompts, steps=4, output_type="np")
    pipeline = load_pipeline(BASES / architecture)
    [adapter] = load_adapters(pipeline, [RunFolder(run, None).adapter])
    adapter.activate()
    with_adapter = paint(pipeline, prompts, steps=4, output_type="np")
    adapter.activate(0.0)
    at_zero = paint(pipeline, prompts, steps=4, output_type="np")
    assert np.array_equal(np.stack(at_zero), np.stack(base))
    assert not np.array_equal(np.stack(with_adapter), np.stack(base))


PLAIN = """
import json, sys, torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
base, adapter, prompts, folder = sys.argv[1:]
arguments = {"requires_safety_checker": False, "safety_checker": None} if "sd15" in base else {}
pipeline = DiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32, **arguments)
pipeline.scheduler = EulerDiscreteScheduler.from_pretrained(base, subfolder="scheduler")
pipeline.load_lora_weights(adapter)
for number, prompt in enumerate(json.loads(prompts)):
    generator = torch.Generator().manual_seed(0)
    drawn = pipeline(prompt, width=128, height=128, num_inference_steps=20, guidance_scale=2.5, generator=generator)
    drawn.images[0].save(f"{folder}/{number}.png")
assert not [name for name in sys.modules if name.split(".")[0] in ("sushi_research", "demo")]
"""


@pytest.mark.slow
def test_the_file_draws_the_same_in_another_process_without_our_code(demo_run, tmp_path) -> None:
    """What the run drew at its end from the UNet in memory, and what plain diffusers draws from the saved file."""
    architecture, run = demo_run
    samples = sorted(path for path in (run / "samples").iterdir() if path.is_dir())[-1]
    prompts = show.read_config(run)["sample"]["prompts"]
    command = [sys.executable, "-c", PLAIN, str(BASES / architecture), str(RunFolder(run, None).adapter)]
    ended = subprocess.run([*command, json.dumps(prompts), str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    for number in range(len(prompts)):
        generated = np.asarray(Image.open(samples / f"{number:02d}-seed0.png"), int)
        loaded = np.asarray(Image.open(tmp_path / f"{number}.png"), int)
        # The file is rounded to fp16, and 20 steps with guidance carry that on: a level of 255 here and there (0.002 seen).
        assert np.abs(generated - loaded).mean() < 0.05
        assert np.abs(generated - loaded).max() <= 3


@pytest.mark.slow
@FULL
def test_the_demo_ends_with_a_picture_a_table_and_a_report(full_run, monkeypatch, capsys) -> None:
    """All of it but most of the drawing for the scores, which another test has done: four prompts here."""
    run = full_run
    monkeypatch.setattr("demo.measure.CONCEPT_PROMPTS", 4)
    monkeypatch.setattr("demo.measure.KNOWN_PROMPTS", 4)
    show.main(run)
    printed = capsys.readouterr().out
    for line in ("loss on unseen pictures", "the concept, drawn right", "the rest, drawn right", "time ", "files "):
        assert line in printed
    facts = json.loads((run / "demo.json").read_text())
    assert set(facts["seconds"]) >= {"caching", "training", "sampling"} and f"{run.name}.safetensors" in facts["files"]
    page = (run / "report.html").read_text(encoding="utf-8")
    sources = re.findall(r"""src=["']?([^"' >]{5})|(url\()""", page)
    prompts = len([*(run / "samples/step-00000000").glob("*.png")])
    samples = prompts * len([*(run / "samples").glob("step-*.png"), "a real picture"])
    shown = STAR.trained + STAR.prior + 4 + samples
    assert set(sources) == {("data:", "")} and len(sources) == shown + 4, "it needs no other file; four curves"
    assert page.count("<figure") == shown
    with Image.open(run / "demo.png") as picture:
        assert picture.width > 5 * 128 and picture.height > 3 * 128


@pytest.mark.slow
def test_the_loss_on_unseen_pictures_repeats(architecture) -> None:
    """Fixed noise and timesteps: the same number each time, so a difference is the adapter's."""
    pipeline = load_pipeline(BASES / architecture)
    pictures = unseen_pictures(STAR, 2)
    first, second = loss_on(pipeline, pictures), loss_on(pipeline, pictures)
    assert first == second and first.mean > 0 and first.fall_from(second) == (0.0, 0.0)
    with torch.no_grad():
        pipeline.unet.conv_out.weight.mul_(0.5)
    fall, error = loss_on(pipeline, pictures).fall_from(first)
    assert fall < 0 < error
