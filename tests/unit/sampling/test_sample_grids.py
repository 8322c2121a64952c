"""The pictures of a run: drawn at a step, shown side by side, and taken back with the steps that are done again."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sushi_research.config import SD15Training, SDXLTraining
from sushi_research.config.prompts import as_prompts
from sushi_research.models import loading, sd15, sdxl
from sushi_research.runs.job import Job
from sushi_research.runs.run_folder import RunFolder
from sushi_research.sampling import pipeline, plots, sample_grids

MODELS = {"sd15": (sd15, SD15Training), "sdxl": (sdxl, SDXLTraining)}
CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path, None)


class Texts:
    """Captions, encoded when they are asked for."""

    vae_dtype = torch.float32

    def __init__(self, model, base) -> None:
        self.model, self.encoders, self.asked = model, model.load_text(base, CPU), []

    def text(self, caption: str) -> dict[str, torch.Tensor]:
        self.asked.append(caption)
        return self.model.encode_caption(self.encoders, caption)[0]


@pytest.fixture
def generate(architecture, base_folder, run, monkeypatch):
    """Draws pictures of 32 x 48 in two steps; gives the pictures that the sampling made, in their order."""
    model, config_class = MODELS[architecture]
    base = loading.resolve_base(str(base_folder))
    unet, caches, made = loading.load_unet(base, torch.float32, CPU), Texts(model, base), []
    decode = pipeline.decode
    monkeypatch.setattr(pipeline, "decode", lambda *arguments: made.append(decode(*arguments)) or made[-1])

    def run_generate(step, prompts, is_main_process=True, **sample):
        if sample.get("enabled", True):
            sample = {"steps": 2, "width": 32, "height": 48, **sample}
        config = config_class(
            model={"base": str(base_folder)}, data={"path": "x", "resolution": 64}, train={"steps": 1}, sample=sample
        )
        accelerator = SimpleNamespace(
            is_main_process=is_main_process, device=CPU, trackers=[], wait_for_everyone=lambda: None
        )
        inputs = SimpleNamespace(base=base, caches=caches, prompts=as_prompts(prompts), prompt_text=caches.text)
        sample_grids.generate(Job(config, model, accelerator, "fp32", run), inputs, unet, step)
        return made[-1] if made else []

    run_generate.asked = caches.asked
    return run_generate


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
def test_each_prompt_and_seed_has_its_picture(generate, run):
    generated = generate(5, ["a cat", "\u9ba8 nigiri"], seeds=[3, 8])
    singles = ["00-seed3.png", "00-seed8.png", "01-seed3.png", "01-seed8.png"]
    assert names(run.samples) == ["progress.png", "step-00000005.png", *(f"step-00000005/{name}" for name in singles)]
    labels = ["a cat (seed 3)", "a cat (seed 8)", "\u9ba8 nigiri (seed 3)", "\u9ba8 nigiri (seed 8)"]
    for name, picture, label in zip(singles, generated, labels, strict=True):
        with Image.open(run.samples / "step-00000005" / name) as saved:
            assert saved.size == (32, 48)
            assert np.array_equal(np.asarray(saved), np.asarray(picture))
            assert saved.info["prompt"] == label
    with Image.open(run.samples / "step-00000005.png") as image:
        expected = plots.grid([[picture] for picture in generated], labels, ["step 5"])
        assert np.array_equal(np.asarray(image), np.asarray(expected))


@pytest.mark.slow
def test_the_negative_is_what_the_base_wants(generate, architecture, monkeypatch):
    """Without a negative prompt SDXL steers away from zeros, SD1.5 from the empty caption; with one, from that."""
    seen = []
    real = pipeline.generate_each

    def watch(model, base, unet, requests):
        seen.extend(request.negative for request in requests)
        return real(model, base, unet, requests)

    monkeypatch.setattr(pipeline, "generate_each", watch)
    generate(1, ["a cat"])
    generate(2, ["a cat"], negative_prompt="blurry")
    assert generate.asked == ["", "a cat", "blurry", "a cat"]
    assert [bool(negative["hidden"].any()) for negative in seen] == [architecture == "sd15", True]


def test_no_pictures_where_none_are_wanted(generate, run):
    generate(1, ["a cat"], enabled=False)
    generate(1, ["a cat"], is_main_process=False)
    assert not run.samples.exists()


def save_picture(folder: Path, step: int, name: str, label: str, grey: int) -> None:
    path = folder / f"step-{step:08d}" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    info = sample_grids.PngInfo()
    info.add_text(sample_grids.LABEL, label)
    Image.new("RGB", (200, 100), (grey, grey, 0)).save(path, pnginfo=info)


def columns(image: Image.Image) -> list[int]:
    """The greys of the pictures of the first row of a grid, from left to right."""
    row = np.asarray(image)[plots.MARGIN + 60]
    greys = [int(red) for red, green, blue in row if red == green and blue == 0 and red > 0]
    return list(dict.fromkeys(greys))


def test_progress_shows_the_steps_in_their_order(tmp_path):
    for step in (100, 0, 50):
        save_picture(tmp_path, step, "00-seed0.png", "a cat", 10 + step)
    assert columns(sample_grids.progress_grid(tmp_path, [("00-seed0.png", "a cat")])) == [10, 60, 110]


def test_progress_shows_at_most_eight_steps_the_ends_among_them(tmp_path):
    for step in range(30):
        save_picture(tmp_path, step, "00-seed0.png", "a cat", 10 + step)
    shown = columns(sample_grids.progress_grid(tmp_path, [("00-seed0.png", "a cat")]))
    assert len(shown) == 8 and (shown[0], shown[-1]) == (10, 39) and shown == sorted(shown)


def test_progress_leaves_out_steps_that_drew_something_else(tmp_path):
    save_picture(tmp_path, 0, "00-seed0.png", "a cat", 10)
    save_picture(tmp_path, 1, "00-seed0.png", "a dog", 20)
    save_picture(tmp_path, 2, "00-seed0.png", "a dog", 30)
    assert columns(sample_grids.progress_grid(tmp_path, [("00-seed0.png", "a dog")])) == [20, 30]
    save_picture(tmp_path, 2, "01-seed0.png", "a fish", 40)
    assert columns(sample_grids.progress_grid(tmp_path, [("00-seed0.png", "a dog"), ("01-seed0.png", "a fish")])) == [
        30
    ]


def test_pictures_of_steps_that_are_done_again_go(tmp_path):
    for step in (0, 10, 20):
        save_picture(tmp_path, step, "00-seed0.png", "a cat", 10)
        (tmp_path / f"step-{step:08d}.png").write_bytes(b"grid")
    (tmp_path / "step-00000099 my favourite").mkdir()
    sample_grids.cut_back(tmp_path, 10)
    kept = ["step-00000000.png", "step-00000000/00-seed0.png", "step-00000010.png", "step-00000010/00-seed0.png"]
    assert names(tmp_path) == kept
    assert (tmp_path / "step-00000099 my favourite").is_dir()
    sample_grids.cut_back(tmp_path, -1)
    assert names(tmp_path) == []
    sample_grids.cut_back(tmp_path / "missing", 0)


def test_zeros_for_an_empty_prompt_as_the_index_says(bases, tmp_path):
    assert loading.resolve_base(str(bases["sdxl"])).force_zeros is True
    assert loading.resolve_base(str(bases["sd15"])).force_zeros is False
    copy = shutil.copytree(bases["sdxl"], tmp_path / "base")
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": False}))
    assert loading.resolve_base(str(copy)).force_zeros is False
