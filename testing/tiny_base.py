"""Tiny bases with random weights: every kind of block, attention and encoder of the real ones, a few channels wide.

With them, the tests and benchmarks train in seconds on any machine, without a download. They differ from the real models in
the widths, the number of layers, the transformer blocks per attention, and a tokenizer that has only bytes.
"""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from pathlib import Path
from typing import Any

# The noise schedule of all Stable Diffusion models.
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def save_tiny_base(
    folder: Path, architecture: str, *, seed: int = 0, sample_size: int = 8, flow_shift: float | None = None
) -> Path:
    """Builds a tiny base of `architecture` and writes it in diffusers format; returns the folder.

    `testing/tiny_<architecture>.py` builds its pipeline. With `flow_shift` the base says that it predicts a rectified flow.
    """
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        builder = importlib.import_module(f"testing.tiny_{architecture}")
        pipeline = builder.pipeline(folder, sample_size)
        if flow_shift is not None:
            pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=flow_shift)
        pipeline.save_pretrained(folder)
    return folder


def vae(sample_size: int, scaling_factor: float) -> Any:
    """A tiny `AutoencoderKL` whose images have 8 x `sample_size` pixels a side."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        layers_per_block=1,
        scaling_factor=scaling_factor,
        sample_size=sample_size * 8,
    )


def text_encoder(width: int, projection: int | None) -> Any:
    """A CLIP text encoder of three layers; with a `projection` it also returns a projected pooled output."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=projection or width,
        # The second encoder's activation differs in the real model too.
        hidden_act="quick_gelu" if projection is None else "gelu",
        # As in the published configs. With 2, transformers pools at the largest id, which is the end token.
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    return (CLIPTextModel if projection is None else CLIPTextModelWithProjection)(config)


def tokenizer(folder: Path, pad: str, size: int = 514) -> Any:
    """A CLIPTokenizer over single bytes: any caption can be tokenised, one token per byte.

    A `size` above 514 adds merges of two bytes each.
    """
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    characters = list(bytes_to_unicode().values())
    words = characters + [character + "</w>" for character in characters]
    merges = list(itertools.islice(itertools.product(characters, words), size - 2 - len(words)))
    words += [first + second for first, second in merges] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    return CLIPTokenizer.from_pretrained(folder, pad_token=pad, model_max_length=77)


def main(arguments: list[str]) -> None:
    """`python -m testing.tiny_base ARCHITECTURE FOLDER`: writes a base to FOLDER unless there is one already."""
    from sushi_research.training.run import quiet_libraries

    architecture, folder = arguments
    quiet_libraries()
    if not (Path(folder) / "model_index.json").is_file():
        print(f"making a tiny {architecture} base with random weights in {folder}")
        save_tiny_base(Path(folder), architecture, sample_size=16)


if __name__ == "__main__":
    main(sys.argv[1:])
