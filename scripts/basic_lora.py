"""Trains a LoRA with nothing but PyTorch, diffusers and peft: the method on one screen, to read and to learn from.

    python scripts/basic_lora.py sdxl BASE IMAGES OUT        # or sd15

BASE is a folder in the diffusers format. IMAGES holds pictures, each with its caption in a .txt file of the same name. OUT is the
folder for `pytorch_lora_weights.safetensors`, which `pipeline.load_lora_weights(OUT)` reads. Everything is computed in float32, on
square pictures, one at a time. What a real training needs beyond that is in train_sd15_lora.py and train_sdxl_lora.py, whose
losses and gradients a test compares with those of this file (tests/scripts/test_basic_lora.py).
"""

import os
import random
import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import load_image
from peft import LoraConfig, get_peft_model_state_dict

RANK, LEARNING_RATE, STEPS = 16, 1e-4, 500


def main(architecture: str, base: str, images: str, out: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline_class = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}[architecture]
    pipeline = pipeline_class.from_pretrained(base).to(device, torch.float32)

    # 1. The VAE makes a small picture with four channels of each picture, and the text encoders a list of vectors of its caption.
    encode = {"sd15": encode_sd15, "sdxl": encode_sdxl}[architecture]
    size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    examples = []
    for file in sorted(file for file in Path(images).iterdir() if file.suffix in (".jpg", ".png", ".webp")):
        pixels = pipeline.image_processor.preprocess(load_image(str(file)), size, size, resize_mode="crop").to(device)
        with torch.no_grad():
            latents = pipeline.vae.encode(pixels).latent_dist.sample() * pipeline.vae.config.scaling_factor
            examples.append((latents, encode(pipeline, file.with_suffix(".txt").read_text().strip(), size)))

    # 2. The UNet is frozen. Next to each attention layer W x there is now a trainable B A x, where B is zero at first.
    unet = add_lora(pipeline.unet)
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)

    # 3. Training: hide a picture under noise, let the UNet guess the noise, and make the guess better.
    for step in range(STEPS):
        latents, text = random.choice(examples)
        timestep = torch.randint(1000, (1,), device=device)
        loss = noise_loss(unet, latents, torch.randn_like(latents), timestep, text)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1} of {STEPS}: loss {loss.item():.4f}")

    # 4. Only A and B are saved.
    pipeline.save_lora_weights(out, unet_lora_layers=get_peft_model_state_dict(unet))


def add_lora(unet):
    """Freezes the UNet and adds a LoRA to its attention layers."""
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    return unet


def noise_loss(unet, latents, noise, timestep, text):
    """The mean squared error of the noise that the UNet sees in noised latents [B, 4, H, W] at the timesteps [B]."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, device=latents.device) ** 2  # Stable Diffusion's schedule
    share = (1 - betas).cumprod(0)[timestep].view(-1, 1, 1, 1)  # of the picture, in the square: from 1 to nearly 0
    noisy = share.sqrt() * latents + (1 - share).sqrt() * noise
    return torch.nn.functional.mse_loss(unet(noisy, timestep, **text).sample, noise)


def encode_sd15(pipeline, caption, size):
    """SD1.5's UNet reads the caption in 77 vectors."""
    hidden, _ = pipeline.encode_prompt(caption, pipeline.device, 1, False)
    return {"encoder_hidden_states": hidden}


def encode_sdxl(pipeline, caption, size):
    """SDXL's UNet reads the caption of two text encoders, one vector of the whole, and the sizes of picture, crop and result."""
    hidden, _, pooled, _ = pipeline.encode_prompt(caption, None, pipeline.device, 1, False)
    sizes = torch.tensor([[size, size, 0.0, 0.0, size, size]], device=pipeline.device)
    return {"encoder_hidden_states": hidden, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}


if __name__ == "__main__":
    if len(sys.argv) != 5 or sys.argv[1] not in ("sd15", "sdxl") or not all(map(os.path.isdir, sys.argv[2:4])):
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    main(*sys.argv[1:])
