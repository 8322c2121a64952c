"""Stage 3: trains a UNet from scratch together with the text encoders, and writes the finished pipeline in fp16.

python -m demo.make_base.unet sdxl FOLDER     # one thread; both architectures can run at the same time
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from demo.make_base.pictures import VALIDATION, Row, make_pictures, sentence
from demo.make_base.stage import Stage, batches, generator, pixels, write_result
from demo.make_base.text import token_ids

STEPS = {"sdxl": 9000, "sd15": 8000}
BATCH = 16
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
EMPTY, ZEROED = 0.06, 0.06  # shares of captions dropped for guidance: replaced by "" and, for SDXL, by zeros
WEIGHT_LIMIT = 10.0


def build(architecture: str) -> UNet2DConditionModel:
    """The blocks of the real UNet in the same order, with fewer channels, resnets and transformer layers."""
    shared: dict[str, Any] = {"sample_size": 16, "layers_per_block": 1, "norm_num_groups": 8}
    if architecture == "sd15":
        # The class's defaults are SD1.5's: four levels, attention in all but the last.
        return UNet2DConditionModel(
            **shared, block_out_channels=(32, 64, 80, 80), attention_head_dim=2, cross_attention_dim=64
        )
    return UNet2DConditionModel(
        **shared,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 56, 80),
        attention_head_dim=(2, 4, 5),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        cross_attention_dim=128,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=64 + 6 * 16,
    )


class Base:
    """The modules of one architecture, and the forward pass of its UNet."""

    def __init__(self, architecture: str, folder: Path) -> None:
        self.architecture = architecture
        self.vae = AutoencoderKL.from_pretrained(folder / f"vae_{architecture}").eval().requires_grad_(False)
        self.words = [CLIPTokenizer.from_pretrained(folder / "tokenizer1")]
        self.encoders: list[torch.nn.Module] = [CLIPTextModel.from_pretrained(folder / "text_first")]
        if architecture == "sdxl":
            self.words.append(CLIPTokenizer.from_pretrained(folder / "tokenizer2"))
            self.encoders.append(CLIPTextModelWithProjection.from_pretrained(folder / "text_second"))
        self.unet = build(architecture)

    def modules(self) -> dict[str, torch.nn.Module]:
        return {"unet": self.unet} | {f"text{number}": encoder for number, encoder in enumerate(self.encoders, 1)}

    def predict(self, noisy: torch.Tensor, t: torch.Tensor, captions: list[str], kept: torch.Tensor, rows: list[Row]):
        """The predicted noise `(n, 4, h, w)`; `kept` `(n,)` is 0 where SDXL's embeddings are zeroed."""
        ids = [token_ids(words, captions) for words in self.words]
        if self.architecture == "sd15":
            return self.unet(noisy, t, self.encoders[0](ids[0]).last_hidden_state).sample
        first = self.encoders[0](ids[0], output_hidden_states=True)
        second = self.encoders[1](ids[1], output_hidden_states=True)
        context = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1) * kept[:, None, None]
        time_ids = torch.tensor([row.time_ids for row in rows], dtype=torch.float32)
        added = {"text_embeds": second.text_embeds * kept[:, None], "time_ids": time_ids}
        return self.unet(noisy, t, context, added_cond_kwargs=added).sample

    def pipeline(self) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
        parts = {"vae": self.vae, "unet": self.unet, "tokenizer": self.words[0], "text_encoder": self.encoders[0]}
        if self.architecture == "sd15":
            scheduler = PNDMScheduler(**SCHEDULE, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)
            safety = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            return StableDiffusionPipeline(**parts, scheduler=scheduler, **safety)
        parts |= {"tokenizer_2": self.words[1], "text_encoder_2": self.encoders[1]}
        scheduler = EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading", steps_offset=1)
        return StableDiffusionXLPipeline(**parts, scheduler=scheduler, force_zeros_for_empty_prompt=True)


def main(architecture: str, folder: Path, seed: int = 0) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    base = Base(architecture, folder)
    lots = {canvas: encoded(base.vae, *of_it) for canvas, of_it in make_pictures(folder / "pictures").items()}
    places = {
        canvas: [p for p in range(len(rows) - VALIDATION) if rows[p].plain or architecture == "sdxl"]
        for canvas, (_, rows) in lots.items()
    }
    rates = {name: 1e-3 if name == "unet" else 3e-4 for name in base.modules()}
    stage = Stage(
        folder, f"unet_{architecture}", base.modules(), steps=STEPS[architecture], lr=rates, decay=0.999, every=500
    )
    stage.restore()
    abar = DDPMScheduler(**SCHEDULE).alphas_cumprod
    # Makes the noise error count about as much as the corresponding error of the image, which is (1 - abar) / abar times as
    # large. Without a limit the noisiest timesteps would dominate.
    weight = (1 / abar).clamp(max=WEIGHT_LIMIT)
    weight = weight / weight.mean()

    def loss_of(step: int) -> torch.Tensor:
        draw = generator(seed, 21, step)
        canvas = list(lots)[draw.choice(3, p=[0.6, 0.2, 0.2])]
        latents, rows = lots[canvas]
        chosen = draw.choice(places[canvas], BATCH, replace=False)
        captions = [sentence(rows[place].scene, draw) for place in chosen]
        dropped = draw.random(BATCH)
        captions = ["" if value < EMPTY else caption for value, caption in zip(dropped, captions, strict=True)]
        kept = torch.tensor((dropped < EMPTY) | (dropped >= EMPTY + ZEROED), dtype=torch.float32)
        # Stratified: one timestep from each of BATCH equal parts of the range, for less variance with the same mean.
        t = torch.tensor(((np.arange(BATCH) + draw.random(BATCH)) / BATCH * 1000).astype(np.int64))
        clean = latents[chosen]
        noise = torch.from_numpy(draw.standard_normal(clean.shape, dtype=np.float32))
        signal = abar[t][:, None, None, None]
        noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        predicted = base.predict(noisy, t, captions, kept, [rows[place] for place in chosen])
        return ((predicted - noise).square().mean((1, 2, 3)) * weight[t]).mean()

    stage.run(loss_of)
    stage.averaged()
    target = folder / architecture
    base.pipeline().to(torch.float16).save_pretrained(target)
    size = sum(file.stat().st_size for file in target.rglob("*.safetensors"))
    result = {"steps": stage.step, "seconds": round(stage.seconds), "parameters": base.unet.num_parameters()}
    write_result(folder, stage.name, result | {"bytes": size, "log": stage.log})


@torch.no_grad()
def encoded(vae: AutoencoderKL, shown: np.ndarray, rows: list[Row]) -> tuple[torch.Tensor, list[Row]]:
    """The scaled latents of images, `(n, 4, h/8, w/8)`: the mean of the posterior."""
    parts = [vae.encode(pixels(shown[part])).latent_dist.mode() for part in batches(len(shown), 16)]
    return torch.cat(parts) * vae.config.scaling_factor, rows


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
