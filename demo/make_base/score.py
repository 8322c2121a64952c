"""Stage 4: what a finished base draws, scored from the pixels, with its model card and a sheet of its pictures.

python -m demo.make_base.score sdxl FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from demo.checker import WORDS, Checker, Score, score
from demo.drawing import SQUARE, TALL, WIDE, Scene, all_scenes, is_held_out
from demo.make_base.stage import write_result
from demo.painter import GUIDANCE, STEPS, load_pipeline, paint
from sushi_research.pictures import grid

PROMPTS = {"seen": 128, "held_out": 64, "wide": 32, "tall": 32}
CANVASES = {"wide": WIDE, "tall": TALL}


def prompts(lot: str) -> list[Scene]:
    """The scenes of a lot: combinations that the base trained on, or such that it never saw; the same ones always."""
    scenes = [scene for scene in all_scenes() if is_held_out(scene) == (lot == "held_out")]
    return [
        scenes[place] for place in np.random.default_rng([3, *lot.encode()]).permutation(len(scenes))[: PROMPTS[lot]]
    ]


def score_base(base: Path, lot: str, **arguments: Any) -> tuple[Score, list]:
    """Draws the lot's prompts with the base in `base` and reads them; the pictures come with the score."""
    canvas, asked = CANVASES.get(lot, SQUARE), prompts(lot)
    drawn = paint(load_pipeline(base), [scene.caption for scene in asked], canvas=canvas, description=lot, **arguments)
    checker = Checker(all_scenes(), canvas)
    return score([checker.read(picture) for picture in drawn], asked), drawn


def main(architecture: str, folder: Path) -> None:
    torch.set_num_threads(1)
    scores, sheets = {}, {}
    for lot in PROMPTS:
        scores[lot], sheets[lot] = score_base(folder / architecture, lot)
    result = {
        lot: {"prompts": of_it.total, "right": of_it.right, "none_of_these": of_it.none} | of_it.words
        for lot, of_it in scores.items()
    }
    asked = prompts("held_out")[:16]
    rows = [sheets["held_out"][place : place + 4] for place in range(0, 16, 4)]
    grid(rows, [" / ".join(s.caption for s in asked[place : place + 4]) for place in range(0, 16, 4)], [""] * 4).save(
        folder / architecture / "drawn.png"
    )
    stages = {
        name: json.loads((folder / f"{name}.json").read_text()) for name in ("vae", "text", f"unet_{architecture}")
    }
    (folder / architecture / "README.md").write_text(card(architecture, stages, scores))
    write_result(folder, f"score_{architecture}", result)


def card(architecture: str, stages: dict[str, Any], scores: dict[str, Score]) -> str:
    """The model card, in Markdown."""
    vae, text, unet = stages["vae"], stages["text"], stages[f"unet_{architecture}"]
    name = {"sdxl": "SDXL", "sd15": "SD1.5"}[architecture]
    kind = {"sdxl": "StableDiffusionXLPipeline", "sd15": "StableDiffusionPipeline"}[architecture]
    title = {"seen": "combinations it trained on", "held_out": "combinations it never saw"}
    title |= {"wide": "160x96 pixels", "tall": "96x160 pixels"}
    rows = "\n".join(
        f"| {title[lot]} | {of_it.total} | **{of_it.share:.0%}** | "
        + " | ".join(f"{of_it.words[word] / of_it.total:.0%}" for word in WORDS[:4])
        + f" | {of_it.none} |"
        for lot, of_it in scores.items()
    )
    first = "UNet, two text encoders" if architecture == "sdxl" else "UNet, text encoder"
    return f"""# A tiny {name} that draws sushi

{
        unet["bytes"]
        / 1e6:.2f} MB of fp16 weights in diffusers' format; `python -m demo.make_base` makes it from nothing. It is the demo's base, and
what the tests of learning train on. Its pictures are its own: no weights or pictures of any other model took part.

```python
import torch
from diffusers import {kind}

# Say the dtype: these files are fp16, and a CPU wants fp32.
pipe = {kind}.from_pretrained("demo/base/{architecture}", torch_dtype=torch.float32)
pipe("one salmon nigiri on a blue plate", width=128, height=128, num_inference_steps={STEPS}, guidance_scale={
        GUIDANCE
    }).images[0]
```

![Combinations that it never saw](drawn.png)

## What it knows

128x128, 160x96 and 96x160 pixels; captions such as "two egg maki on a wooden board": six toppings, four kinds, thirteen
dishes, one or two pieces (`demo/drawing.py`). One combination in eight was kept from training.

## Scores

Read from the pixels by `demo/checker.py`, which counts blurred pictures as wrong; {STEPS} Euler steps, guidance {
        GUIDANCE
    }.

| prompts | number | fully right | {" | ".join(WORDS[:4])} | none of these |
|---|---|---|---|---|---|---|---|
{rows}

VAE, on {64} pictures each: {vae["psnr_db_theme"]} dB on the theme, {
        vae["psnr_db_outside_the_theme"]
    } dB on random shapes, patterns and colours.

## How it was made

| stage | steps | seconds | what came out |
|---|---|---|---|
| VAE, two processes, bf16 | {vae["steps"]} | {vae["seconds"]} | {vae["parameters"]:,} parameters; the dB above |
| text encoders, contrastive | {text["steps"]} | {text["seconds"]} | {text["right"]} of {
        text["right_of"]
    } captions found their picture; {text["vocabulary"]} tokens |
| {first}, one thread | {unet["steps"]} | {unet["seconds"]} | {unet["parameters"]:,} parameters; loss {
        unet["log"][-1]["loss"]:.4f} |

Fixed seeds and steps, so the same machine makes the same bytes. The seconds are those of a machine that did other work besides.

## What differs from the real {name}

The classes, the order of blocks and the schedule are {name}'s. Smaller: widths, one resnet a block for two, {
        "one or two transformer layers for two or ten," if architecture == "sdxl" else ""
    } text encoders of three layers, a vocabulary of {
        text["vocabulary"]
    } tokens, latents of 16x16 for a picture of 128x128. {
        "SDXL's sizes and crops are real here too: small originals look soft, crops move the picture."
        if architecture == "sdxl"
        else "Its text encoder started from the same weights as the tiny SDXL's first one, as with the real ones."
    }

## Limits

It knows this one world. Words outside it tokenise, byte by byte if need be, and mean nothing to it until an adapter teaches them.
"""


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
