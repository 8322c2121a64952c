"""What the finished bases can do, measured from their pictures, and the record of it in demo/base/scores.json.

python -m demo.make_base.scores    # measure the bases and record (`make scores`)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from demo.checker import Checker, Score, score, sharpness
from demo.concepts import known_scenes
from demo.drawing import SQUARE, TABLE, TALL, WIDE, Jitter, Scene, all_scenes, draw, is_held_out
from demo.make_base.pictures import strange_picture
from demo.make_base.stage import pixels, psnr
from demo.painter import BASES, load_pipeline, paint
from demo.records import dependencies, write_record

RECORD = BASES / "scores.json"
PROMPTS = {"seen": 128, "held_out": 78, "wide": 32, "tall": 32}
CANVASES = {"wide": WIDE, "tall": TALL}
VAE_PICTURES = 32
RECONSTRUCTED = 16
CODE = (
    "checker.py",
    "concepts.py",
    "drawing.py",
    "painter.py",
    "make_base/pictures.py",
    "make_base/scores.py",
    "make_base/stage.py",
)


def inputs() -> list[Path]:
    """All that the scores depend on: the bases' weights, configs and tokenizers, and the code that draws and reads pictures."""
    files = [path for path in BASES.glob("*/*/*") if path.suffix in (".json", ".safetensors", ".txt")]
    return [*files, *BASES.glob("*/model_index.json"), *(BASES.parent / name for name in CODE)]


def prompts(lot: str) -> list[Scene]:
    """The scenes of a lot: combinations that the base trained on, or such that it never saw; the same ones always."""
    scenes = [scene for scene in all_scenes() if is_held_out(scene) == (lot == "held_out")]
    return [
        scenes[place] for place in np.random.default_rng([3, *lot.encode()]).permutation(len(scenes))[: PROMPTS[lot]]
    ]


def score_base(pipeline: Any, lot: str) -> tuple[Score, list[Image.Image]]:
    """Draws the lot's prompts with a base's pipeline and reads them; the pictures come with the score."""
    canvas, asked = CANVASES.get(lot, SQUARE), prompts(lot)
    drawn = paint(pipeline, [scene.caption for scene in asked], canvas=canvas, description=lot)
    checker = Checker(all_scenes(), canvas)
    return score([checker.read(picture) for picture in drawn], asked), drawn


def as_json(of_it: Score) -> dict[str, Any]:
    """A score as counts of prompts; `confusions` lists (word, asked, read, count)."""
    counts = {"prompts": of_it.total, "right": of_it.right, "none_of_these": of_it.none} | of_it.words
    return counts | {"confusions": [[*key, n] for key, n in sorted(of_it.confusions.items()) if key[1] != key[2]]}


def sharp(picture: Image.Image) -> float:
    """How sharp a picture is, as the checker measures it."""
    return sharpness(np.asarray(picture, dtype=np.float32) / 255)


@torch.no_grad()
def measure_vae(vae: Any) -> dict[str, float]:
    """PSNR in dB on new pictures of the theme and on shapes, patterns and colours outside it, and how many of
    `RECONSTRUCTED` pictures of the theme are still read right after the VAE."""
    generator = np.random.default_rng(99)
    scenes = all_scenes()
    theme = [
        np.asarray(draw(scenes[generator.integers(len(scenes))], jitter=Jitter.random(generator)))
        for _ in range(VAE_PICTURES)
    ]
    strange = [strange_picture(generator) for _ in range(VAE_PICTURES)]
    asked = known_scenes(RECONSTRUCTED)
    found = {}
    for name, rows in (("theme_db", theme), ("strange_db", strange)):
        reference = pixels(np.stack(rows))
        found[name] = round(psnr(vae.decode(vae.encode(reference).latent_dist.mode()).sample, reference), 2)
    reference = pixels(np.stack([np.asarray(draw(scene)) for scene in asked]))
    decoded = vae.decode(vae.encode(reference).latent_dist.mode()).sample
    rows = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    checker = Checker(known_scenes(100))
    right = [checker.read(Image.fromarray(row)).scene == scene for row, scene in zip(rows, asked, strict=True)]
    return found | {"reconstructions_right": sum(right)}


def measure_sizes(pipeline: Any) -> dict[str, Any]:
    """What SDXL's sizes and crops do to eight pictures.

    `sharpness` of each picture by the original size told; `cut` counts, by what was told, the pictures whose dish is cut at
    the left, right, top and bottom edge.
    """
    asked = [scene.caption for scene in known_scenes(8)]
    plain = paint(pipeline, asked)
    sharpness_by_size = {"128x128": [sharp(picture) for picture in plain]}
    for side in (32, 1024):
        drawn = paint(pipeline, asked, original_size=(side, side))
        sharpness_by_size[f"{side}x{side}"] = [sharp(picture) for picture in drawn]
    cut = {"nothing": _cut(plain)}
    for name, size, end in (("wide", (128, 192), (0, 64)), ("tall", (192, 128), (64, 0))):
        for place, corner in (("start", (0, 0)), ("end", end)):
            cut[f"{name}, {place}"] = _cut(paint(pipeline, asked, original_size=size, crops_coords_top_left=corner))
    rounded = {size: [round(value, 6) for value in values] for size, values in sharpness_by_size.items()}
    return {"sharpness": rounded, "cut": cut}


def _cut(drawn: list[Image.Image]) -> list[int]:
    """How many of the pictures have their dish cut at the left, right, top and bottom edge."""
    covered = [np.abs(np.asarray(picture, int) - TABLE).sum(-1) > 90 for picture in drawn]
    edges = [[it[:, :3].mean(), it[:, -3:].mean(), it[:3].mean(), it[-3:].mean()] for it in covered]
    return (np.array(edges) > 0.1).sum(0).tolist()


def measure_base(architecture: str) -> dict[str, Any]:
    """All measures of an embedded base, as JSON."""
    pipeline = load_pipeline(BASES / architecture)
    found: dict[str, Any] = {lot: as_json(score_base(pipeline, lot)[0]) for lot in PROMPTS}
    found["vae"] = measure_vae(pipeline.vae)
    if architecture == "sdxl":
        found["sizes"] = measure_sizes(pipeline)
    return found


def main() -> None:
    torch.set_num_threads(1)
    depends = dependencies(inputs())
    write_record(
        RECORD, depends, {architecture: measure_base(architecture) for architecture in ("sd15", "sd15_v", "sdxl")}
    )


if __name__ == "__main__":
    main()
