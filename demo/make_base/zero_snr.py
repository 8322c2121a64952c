"""Stage 5: the third base. Trains the finished SD1.5 base on, to predict v with zero-terminal SNR (arXiv 2305.08891).

Only the UNet changes. The VAE and the text encoder stay those of the SD1.5 base, byte for byte.

python -m demo.make_base.zero_snr FOLDER     # reads FOLDER/sd15, writes FOLDER/sd15_v; one thread
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel

from demo.make_base.pictures import VALIDATION, make_pictures, sentence
from demo.make_base.stage import Stage, generator, write_result
from demo.make_base.text import token_ids
from demo.make_base.unet import BATCH, EMPTY, SCHEDULE, encoded

NAME = "sd15_v"
STEPS = 3000
# The paper's schedule, and its sampling from the last timestep on.
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def main(folder: Path, seed: int = 0) -> None:
    torch.set_num_threads(1)
    # In fp32: the files are fp16, and transformers would keep that.
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "sd15", torch_dtype=torch.float32, safety_checker=None)
    unet, words, encoder = pipeline.unet, pipeline.tokenizer, pipeline.text_encoder.eval().requires_grad_(False)
    pipeline.vae.eval().requires_grad_(False)
    lots = {canvas: encoded(pipeline.vae, *of_it) for canvas, of_it in make_pictures(folder / "pictures").items()}
    places = {canvas: [p for p in range(len(rows) - VALIDATION) if rows[p].plain] for canvas, (_, rows) in lots.items()}
    stage = Stage(folder, f"unet_{NAME}", {"unet": unet}, steps=STEPS, lr=1e-3, decay=0.999, every=250)
    stage.restore()
    schedule = DDPMScheduler(**SCHEDULE, **ZERO_SNR)

    def loss_of(step: int) -> torch.Tensor:
        draw = generator(seed, 31, step)
        canvas = list(lots)[draw.choice(3, p=[0.6, 0.2, 0.2])]
        latents, rows = lots[canvas]
        chosen = draw.choice(places[canvas], BATCH, replace=False)
        captions = [sentence(rows[place].scene, draw) for place in chosen]
        dropped = draw.random(BATCH) < EMPTY
        captions = ["" if drop else caption for drop, caption in zip(dropped, captions, strict=True)]
        # Stratified, as in stage 3.
        t = torch.tensor(((np.arange(BATCH) + draw.random(BATCH)) / BATCH * 1000).astype(np.int64))
        clean = latents[chosen]
        noise = torch.from_numpy(draw.standard_normal(clean.shape, dtype=np.float32))
        with torch.no_grad():
            hidden = encoder(token_ids(words, captions)).last_hidden_state
        predicted = unet(schedule.add_noise(clean, noise, t), t, hidden).sample
        # The plain error of v weighs the noise error by 1 / abar, which is stage 3's weight without its limit.
        return (predicted - schedule.get_velocity(clean, noise, t)).square().mean()

    stage.run(loss_of)
    stage.averaged()
    target = folder / NAME
    write(unet.to(torch.float16), folder / "sd15", target)
    size = sum(file.stat().st_size for file in target.rglob("*.safetensors"))
    result = {"steps": stage.step, "seconds": round(stage.seconds), "parameters": unet.num_parameters()}
    write_result(folder, stage.name, result | {"bytes": size, "log": stage.log})


def write(unet: UNet2DConditionModel, start: Path, target: Path) -> None:
    """Writes the base `start` with this UNet and the scheduler of v and zero-terminal SNR to `target`."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(start, target, ignore=shutil.ignore_patterns("README.md", "drawn.png", "unet", "scheduler"))
    unet.save_pretrained(target / "unet")
    EulerDiscreteScheduler(**SCHEDULE, **ZERO_SNR, steps_offset=1).save_pretrained(target / "scheduler")
    _changed(target / "unet" / "config.json", lambda config: config.pop("_name_or_path", None))
    _changed(target / "model_index.json", lambda index: index.update(scheduler=["diffusers", "EulerDiscreteScheduler"]))


def _changed(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
