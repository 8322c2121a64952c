"""Stage 1: trains the VAE from scratch with two processes.

`python -m demo.make_base` launches it; accelerate starts two processes on a CPU only with --multi_gpu.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL

from demo.drawing import SQUARE
from demo.make_base.pictures import VALIDATION, make_pictures, make_strange
from demo.make_base.stage import Stage, batches, generator, pixels, psnr, write_result

CROPS, WHOLE = 7000, 3600  # steps with 64-pixel crops, then with whole images
CROP, CROP_BATCH, WHOLE_BATCH = 64, 8, 3  # pixels; images per process
STRANGE_SHARE = 0.4
KL = 3e-4
SCALING = {"sdxl": 0.13025, "sd15": 0.18215}


def build() -> AutoencoderKL:
    """The VAE: like the real one it has four levels and attention in the middle block; widths and depth are smaller."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 48, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=128,
    )


def reconstruction_loss(picture: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """L1 plus squared error plus the L1 error of differences between neighbouring pixels, which keeps edges sharp."""
    error = picture - reference
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * edges


def fold_scale(vae: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor, scaling: float) -> None:
    """Changes the two 1x1 convolutions so that each latent channel has mean 0 and, times `scaling`, variance 1.

    The decoder's convolution inverts this, so images change only by rounding. `mean`, `std`: `(4,)`, of the unscaled latents.
    """
    gain = 1 / (std * scaling)
    enter, leave = vae.quant_conv, vae.post_quant_conv
    with torch.no_grad():
        enter.weight[:4] *= gain[:, None, None, None]
        enter.bias[:4] = (enter.bias[:4] - mean) * gain
        enter.bias[4:] += 2 * gain.log()
        leave.bias += leave.weight[:, :, 0, 0] @ mean
        leave.weight /= gain[None, :, None, None]
    vae.register_to_config(scaling_factor=scaling)


def main(folder: Path, seed: int = 0) -> None:
    accelerator = Accelerator()
    assert accelerator.num_processes == 2, "another number of processes would make another VAE"
    with accelerator.main_process_first():
        scenes, strange = make_pictures(folder / "pictures"), make_strange(folder / "pictures")
    lots = {canvas: rows[:-VALIDATION] for canvas, (rows, _) in scenes.items()}
    strange, strange_kept = strange[:-VALIDATION], strange[-VALIDATION:]
    torch.manual_seed(seed)
    vae = build()
    stage = Stage(folder, "vae", {"vae": vae}, steps=CROPS + WHOLE, lr=2e-3, decay=0.999, every=500)
    stage.restore()
    network = accelerator.prepare(_AutoEncoder(vae))

    def batch(step: int) -> torch.Tensor:
        draw = generator(seed, 1, step, accelerator.process_index)
        # The same canvas on all processes, so that none waits for another one's larger images.
        canvas = list(lots)[generator(seed, 2, step).choice(3, p=[0.6, 0.2, 0.2])]
        whole = step >= CROPS
        rows = []
        for _ in range(WHOLE_BATCH if whole else CROP_BATCH):
            source = strange if (canvas == SQUARE or not whole) and draw.random() < STRANGE_SHARE else lots[canvas]
            row = source[draw.integers(len(source))]
            if not whole:
                top, left = draw.integers(row.shape[0] - CROP + 1), draw.integers(row.shape[1] - CROP + 1)
                row = row[top : top + CROP, left : left + CROP]
            rows.append(row[:, ::-1] if draw.random() < 0.5 else row)
        return pixels(np.stack(rows))

    def loss_of(step: int) -> torch.Tensor:
        reference = batch(step)
        torch.manual_seed(int(generator(seed, 3, step, accelerator.process_index).integers(2**62)))
        picture, kl = network(reference)
        return reconstruction_loss(picture.float(), reference) + KL * kl.float()

    stage.run(loss_of, main=accelerator.is_main_process, backward=accelerator.backward)
    if accelerator.is_main_process:
        stage.averaged()
        kept = {"theme": scenes[SQUARE][0][-VALIDATION:], "outside the theme": strange_kept}
        result = {
            f"psnr_db_{name.replace(' ', '_')}": round(_psnr(vae, pixels(rows)), 2) for name, rows in kept.items()
        }
        mean, std = latent_statistics(vae, scenes[SQUARE][0][:1024])
        state = {name: value.clone() for name, value in vae.state_dict().items()}
        for architecture, scaling in SCALING.items():
            vae.load_state_dict(state)
            fold_scale(vae, mean, std, scaling)
            vae.save_pretrained(folder / f"vae_{architecture}")
        result |= {
            "steps": stage.step,
            "seconds": round(stage.seconds),
            "parameters": vae.num_parameters(),
            "log": stage.log,
        }
        write_result(folder, "vae", result)
    accelerator.wait_for_everyone()
    accelerator.end_training()


class _AutoEncoder(torch.nn.Module):
    """Encoder, posterior sample and decoder as one module, so that gradients are averaged over the processes."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        posterior = self.vae.encode(reference).latent_dist
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        return self.vae.decode(posterior.sample()).sample, kl


@torch.no_grad()
def _psnr(vae: AutoencoderKL, reference: torch.Tensor) -> float:
    return psnr(vae.decode(vae.encode(reference).latent_dist.mode()).sample, reference)


@torch.no_grad()
def latent_statistics(vae: AutoencoderKL, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each latent channel, `(4,)` each, over the given images."""
    latents = torch.cat([vae.encode(pixels(rows[part])).latent_dist.mode() for part in batches(len(rows), 32)])
    return latents.mean((0, 2, 3)), latents.std((0, 2, 3))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
