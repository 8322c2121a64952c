"""Learning is seen, not supposed: the real scripts train, and loss, pixels and plain diffusers judge."""

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

from demo import show
from demo.concepts import CONCEPTS
from demo.measure import checker_of, loss_on, measure, unseen_pictures
from demo.painter import BASES, load_pipeline, paint
from sushi_research.config.command_line import load_config

pytestmark = pytest.mark.slow

# Over three seeds of the demo's own training (docs/demo.md), final losses lay within 0.0013 of one another and concept scores
# within 0.04; the loss fell by 0.25 and the score rose by 0.97. What is asked here is many times what seeds explain.
LOSS_MARGIN = 0.15
LEARNED = 0.85
# What is kept of the base's world, as a share of what it knew.
KEPT = 0.90


# Each architecture's tests stay in one process of pytest-xdist, which then trains it once.
TRAINED = [pytest.param(name, marks=pytest.mark.xdist_group(f"trained_{name}")) for name in ("sdxl", "sd15")]


@pytest.fixture(scope="module", params=TRAINED)
def demo_run(request, tmp_path_factory) -> tuple[str, Path]:
    """The demo's run with its own recipe, trained in this process by the script's `main`."""
    architecture, folder = request.param, tmp_path_factory.mktemp("demo")
    files = [f"configs/demo_{architecture}.yaml", "configs/demo/star.yaml"]
    words = [word for file in files for word in ("--config", str(ROOT / file))]
    changes = {
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
    return architecture, folder / "runs" / "learned"


def test_the_concept_is_learned_and_the_rest_kept(demo_run) -> None:
    architecture, run = demo_run
    concept = CONCEPTS["star"]
    checker = checker_of(concept)
    before = measure(BASES / architecture, None, concept, checker)
    after = measure(BASES / architecture, run / "adapter.safetensors", concept, checker)
    fall, error = after.loss.fall_from(before.loss)
    assert fall > LOSS_MARGIN and fall > 5 * error, "more than chance among the pictures, and among the seeds"
    assert before.concept.share == 0, "the base has never seen it"
    assert after.concept.share >= LEARNED
    assert after.known.share >= KEPT * before.known.share


def test_strength_zero_is_the_base_bit_for_bit(demo_run) -> None:
    architecture, run = demo_run
    prompts = [scene.caption for scene in CONCEPTS["star"].unseen_scenes(2)]
    base = paint(load_pipeline(BASES / architecture), prompts, steps=4, output_type="np")
    pipeline = load_pipeline(BASES / architecture, run / "adapter.safetensors")
    with_adapter = paint(pipeline, prompts, steps=4, output_type="np")
    [name] = pipeline.get_list_adapters()["unet"]
    pipeline.set_adapters([name], [0.0])
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


def test_the_file_draws_the_same_in_another_process_without_our_code(demo_run, tmp_path) -> None:
    """What the run drew at its end from the UNet in memory, and what plain diffusers draws from the saved file."""
    architecture, run = demo_run
    samples = sorted(path for path in (run / "samples").iterdir() if path.is_dir())[-1]
    prompts = show.read_config(run)["sample"]["prompts"]
    command = [sys.executable, "-c", PLAIN, str(BASES / architecture), str(run / "adapter.safetensors")]
    ended = subprocess.run([*command, json.dumps(prompts), str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    for number in range(len(prompts)):
        drawn = np.asarray(Image.open(samples / f"{number:02d}-seed0.png"), int)
        loaded = np.asarray(Image.open(tmp_path / f"{number}.png"), int)
        # The file is rounded to fp16, and 20 steps with guidance carry that on: a level of 255 here and there (0.002 seen).
        assert np.abs(drawn - loaded).mean() < 0.05
        assert np.abs(drawn - loaded).max() <= 3


def test_the_demo_ends_with_a_picture_a_table_and_a_report(demo_run, monkeypatch, capsys) -> None:
    """All of it but the drawing for the scores, which the first test has done: four prompts here."""
    _, run = demo_run
    monkeypatch.setattr("demo.measure.CONCEPT_PROMPTS", 4)
    monkeypatch.setattr("demo.measure.KNOWN_PROMPTS", 4)
    show.main(run)
    printed = capsys.readouterr().out
    for line in ("loss on unseen pictures", "the concept, drawn right", "the rest, drawn right", "time ", "files "):
        assert line in printed
    facts = json.loads((run / "demo.json").read_text())
    assert set(facts["seconds"]) >= {"caching", "training", "drawing"} and "adapter.safetensors" in facts["files"]
    page = (run / "report.html").read_text(encoding="utf-8")
    sources = re.findall(r"""(?:src|href)=["']?([^"' >]{5})|(url\()""", page)
    shown = CONCEPTS["star"].trained + CONCEPTS["star"].prior + 4
    assert set(sources) == {("data:", "")} and len(sources) == shown + 2, "it needs no other file"
    assert page.count("<figure") == shown
    with Image.open(run / "demo.png") as picture:
        assert picture.width > 5 * 128 and picture.height > 6 * 128


def test_the_loss_on_unseen_pictures_repeats(architecture) -> None:
    """Fixed noise and timesteps: the same number each time, so a difference is the adapter's."""
    pipeline = load_pipeline(BASES / architecture)
    pictures = unseen_pictures(CONCEPTS["star"], 2)
    first, second = loss_on(pipeline, pictures), loss_on(pipeline, pictures)
    assert first == second and first.mean > 0 and first.fall_from(second) == (0.0, 0.0)
    with torch.no_grad():
        pipeline.unet.conv_out.weight.mul_(0.5)
    fall, error = loss_on(pipeline, pictures).fall_from(first)
    assert fall < 0 < error
