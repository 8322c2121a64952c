"""Real photographs, in the formats and shapes that people have, through the whole path to pictures with the adapter."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from script_runs import Trainer

ORIENTATION, QUARTER_TURN = 0x0112, 6  # EXIF: to be turned clockwise by 90 degrees


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    # scikit-image carries these in its package; nothing is downloaded.
    data = pytest.importorskip("skimage.data", exc_type=ImportError)
    folder = tmp_path / "pictures"
    folder.mkdir()

    def save(name: str, pixels: np.ndarray, caption: str, **options: Any) -> None:
        path = folder / name
        Image.fromarray(pixels).save(path, **options)
        path.with_suffix(".txt").write_text(caption)

    save("astronaut.jpg", data.astronaut(), "an astronaut in front of a flag", quality=95)
    save("cat.png", data.chelsea(), "a tabby cat looking up")
    save("coffee.webp", data.coffee(), "a cup of coffee on a wooden table", quality=90)
    # As a phone writes an upright picture: lying on its side, with a note which way is up.
    exif = Image.Exif()
    exif[ORIENTATION] = QUARTER_TURN
    save("rocket.jpg", np.rot90(data.rocket()), "a rocket lifting off", quality=95, exif=exif)
    save("cameraman.png", data.camera(), "a man with a camera, black and white")
    galaxies = data.hubble_deep_field()
    opaque = np.full((*galaxies.shape[:2], 1), 255, np.uint8)
    opaque[:100] = 0
    save("galaxies.png", np.concatenate([galaxies, opaque], axis=2), "distant galaxies")
    save("coins.jpg", data.coins(), "old coins in rows", quality=90)
    save("moon.png", data.moon().astype(np.uint16) * 257, "craters of the moon")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sdxl"])
def test_from_photographs_to_pictures(trainer: Trainer, bases, photos, tmp_path, with_curves):
    changes = {
        "lora.targets": "attention",
        "data.path": str(photos),
        "data.resolution": 128,
        "data.flip": 0.5,
        "cache.folder": str(tmp_path / "cache"),
        "train.steps": None,
        "train.epochs": 2,
        "optimizer.name": "adamw8bit",
        "optimizer.lr": 1e-2,
        "sample.enabled": True,
        "sample.steps": 2,
        "sample.prompts": ["a tabby cat on the moon"],
    }
    assert trainer.train("photos", changes) == 0

    plan = trainer.plan("photos")
    # Worked out by hand: coins are 384x303, nearer to a square than to 160x96; the rocket is upright at 640x427.
    assert plan["buckets"] == {"160x96": 3, "128x128": 5}
    assert (plan["images"], plan["skipped"], plan["captions_cut"], plan["steps"]) == (8, [], {}, 4)
    report = json.loads((trainer.folder("photos") / "data_report.json").read_text())
    assert report["used"] == sorted(path.name for path in photos.iterdir() if path.suffix != ".txt")

    lines = trainer.metrics("photos")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(0 < line["loss"] < math.inf and 0 < line["grad_norm"] < math.inf for line in lines)
    assert lines[-1]["samples_seen"] == 16 and lines[-1]["epoch"] == 2.0
    for name in ("samples/progress.png", "samples/step-00000000.png", "samples/step-00000004.png", "loss.png"):
        with Image.open(trainer.folder("photos") / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 0, name

    base, untouched, generated = predictions(bases["sdxl"], trainer.folder("photos") / "photos.safetensors")
    assert torch.equal(untouched, base), "at strength 0 it is the base, bit for bit"
    assert generated.isfinite().all() and not torch.allclose(generated, base, atol=1e-3), (
        "at strength 1 it is something else"
    )


def predictions(base: Path, adapter: Path) -> tuple[torch.Tensor, ...]:
    """Latents of one prompt by diffusers' pipeline: without the adapter, and with it at strengths 0 and 1."""
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    # Loading an adapter freezes the UNet, and torch takes other kernels for weights that want a gradient.
    pipeline.unet.requires_grad_(False)

    def generate() -> torch.Tensor:
        return pipeline(
            "a tabby cat",
            generator=torch.Generator().manual_seed(0),
            num_inference_steps=2,
            height=64,
            width=64,
            output_type="latent",
        ).images

    found = [generate()]
    pipeline.load_lora_weights(adapter, adapter_name="trained")
    for lora_scale in (0.0, 1.0):
        pipeline.set_adapters(["trained"], [lora_scale])
        found.append(generate())
    return tuple(found)
