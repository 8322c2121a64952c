"""Stage 4: what a finished base draws, scored from the pixels, with its model card and a sheet of its pictures.

python -m demo.make_base.score sdxl FOLDER
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from string import Template
from typing import Any

import torch

from demo.checker import WORDS, Score
from demo.make_base.scores import CANVASES, PROMPTS, as_json, prompts, score_base
from demo.make_base.stage import write_result
from demo.make_base.zero_snr import NAME as ZERO_SNR
from demo.painter import GUIDANCE, STEPS, load_pipeline
from sushi_research.sampling.plots import grid


def main(architecture: str, folder: Path) -> None:
    torch.set_num_threads(1)
    scores, images_of = {}, {}
    pipeline = load_pipeline(folder / architecture)
    for lot in PROMPTS:
        scores[lot], images_of[lot] = score_base(pipeline, lot)
    result = {lot: as_json(of_it) for lot, of_it in scores.items()}
    asked = prompts("held_out")[:16]
    rows = [images_of["held_out"][place : place + 4] for place in range(0, 16, 4)]
    grid(rows, [" / ".join(s.caption for s in asked[place : place + 4]) for place in range(0, 16, 4)], [""] * 4).save(
        folder / architecture / "drawn.png"
    )
    names = (f"unet_{architecture}",) if architecture == ZERO_SNR else ("vae", "text", f"unet_{architecture}")
    stages = {name: json.loads((folder / f"{name}.json").read_text()) for name in names}
    (folder / architecture / "README.md").write_text(card(architecture, stages, scores))
    write_result(folder, f"score_{architecture}", result)


DIFFERS = {
    "sdxl": "Smaller are all widths, the depth (one resnet a block for two, also in the VAE; one and two transformer layers for "
    "two and ten; three layers in each text encoder), the latents (16x16) and the embedding of a size (16 numbers for 256). "
    "Sizes and crops are real: it was told the true ones, small originals look soft and crops move the picture.",
    "sd15": "Smaller are all widths, the depth (one resnet a block for two, also in the VAE; three layers in the text encoder) "
    "and the latents (16x16). Its text encoder started as the tiny SDXL's first one did, and trained on.",
}


def card(architecture: str, stages: dict[str, Any], scores: dict[str, Score]) -> str:
    """The model card: card.md, or zero_snr.md of the third base, with its blanks filled."""
    unet = stages[f"unet_{architecture}"]
    known = {
        "megabytes": f"{unet['bytes'] / 1e6:.2f}",
        "steps": STEPS,
        "guidance": GUIDANCE,
        "rows": "\n".join(_rows(scores)),
        "unet_steps": unet["steps"],
        "unet_seconds": unet["seconds"],
        "unet_parameters": f"{unet['parameters']:,}",
        "unet_loss": f"{unet['log'][-1]['loss']:.4f}",
    }
    if architecture == ZERO_SNR:
        return Template((Path(__file__).parent / "zero_snr.md").read_text()).substitute(known)
    vae, text = stages["vae"], stages["text"]
    known |= {
        "architecture": architecture,
        "name": {"sdxl": "SDXL", "sd15": "SD1.5"}[architecture],
        "pipeline": {"sdxl": "StableDiffusionXLPipeline", "sd15": "StableDiffusionPipeline"}[architecture],
        "theme": vae["psnr_db_theme"],
        "strange": vae["psnr_db_outside_the_theme"],
        "vae_steps": vae["steps"],
        "vae_seconds": vae["seconds"],
        "vae_parameters": f"{vae['parameters']:,}",
        "text_steps": text["steps"],
        "text_seconds": text["seconds"],
        "text_right": text["right"],
        "text_of": text["right_of"],
        "vocabulary": text["vocabulary"],
        "differs": textwrap.fill(DIFFERS[architecture], 128),
    }
    return Template((Path(__file__).parent / "card.md").read_text()).substitute(known)


def _rows(scores: dict[str, Score]) -> list[str]:
    """The rows of the card's table of scores."""
    titles = {"seen": "combinations it trained on", "held_out": "combinations it never saw"}
    titles |= {lot: f"{canvas[0]}x{canvas[1]} pixels" for lot, canvas in CANVASES.items()}
    rows = []
    for lot, of_it in scores.items():
        shares = " | ".join(f"{of_it.words[word] / of_it.total:.0%}" for word in WORDS[:4])
        rows.append(f"| {titles[lot]} | {of_it.total} | **{of_it.share:.0%}** | {shares} | {of_it.none} |")
    return rows


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
