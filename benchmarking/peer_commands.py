"""The images and command lines with which two programs do equal work, for `benchmarking.peer`."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

from benchmarking.measured_code import ROOT
from sushi_research.errors import UserError

RATE, RANK, SEED = 1e-4, 16, 0
# The work of a comparison where no option says otherwise.
DEFAULTS = {
    "diffusers": {"resolution": 128, "steps": 100, "batch_size": 8, "rounds": 2},
    "kohya": {"resolution": 64, "steps": 20, "batch_size": 1, "rounds": 1},
}


def architecture_of(script: Path) -> str:
    """The architecture that a peer's script trains, by its file name. UserError for a script that is not supported."""
    if script.name not in COMMANDS:
        raise UserError(f"{script.name} is not supported: give --peer one of {', '.join(COMMANDS)}.")
    return "sdxl" if "sdxl" in script.name else "sd15"


def base_for(work: Path, script: Path, given: str | None) -> tuple[Path, str]:
    """The base of both sides, and its name in the result: `given`, or the demo's, or for sd-scripts one that is made in `work`.

    sd-scripts builds a UNet of the published size (library/original_unet.py, BLOCK_OUT_CHANNELS), not that of the base's config.
    """
    architecture = architecture_of(script)
    if given or program_of(script) == "diffusers":
        name = given or f"demo/base/{architecture}"
        return (Path(given) if given else ROOT / name).resolve(), name
    from testing.full_base import save_full_base

    print(f"making a {architecture} base of the published size with random weights", flush=True)
    return save_full_base(work / "base", architecture), "published size, random weights"


def make_images(source: Path, to: Path, side: int, batch_size: int) -> int:
    """The middle squares of the images of `source`, with captions, in the layouts that both sides read. Returns their number.

    A square of more than `side` pixels stays as large: both sides then resize it, and neither crops anything. Their number is a
    multiple of the batch size, because a peer's last batch of an epoch would be smaller, and ours is not.
    """
    from PIL import Image, ImageOps

    if not source.is_dir():
        raise UserError(f"--images {source} is not a folder: give one with images and captions.")
    to.mkdir()
    lines, kohya = [], to.parent / "kohya" / "1_images"
    kohya.mkdir(parents=True)
    found = sorted(
        path for path in source.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp", ".avif")
    )
    captioned = [path for path in found if path.with_suffix(".txt").is_file()]
    for path in captioned[: len(captioned) // batch_size * batch_size]:
        text = path.with_suffix(".txt")
        name = f"{path.stem}.png"
        with Image.open(path) as image:
            size = max(side, min(image.size))
            ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS).save(to / name)
        caption = text.read_text().strip()
        lines.append(json.dumps({"file_name": name, "text": caption}))
        shutil.copy(to / name, kohya / name)
        (kohya / f"{path.stem}.txt").write_text(caption)
    if not lines:
        raise UserError(
            f"{source} has {len(captioned)} images with a caption in a .txt file, fewer than a batch: give another --images."
        )
    (to / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return len(lines)


def our_command(work: Path, script: Path, base: Path, arguments: argparse.Namespace, name: str) -> list[str]:
    """Our script with the settings that both sides have, and no samples, which the peers do not make either."""
    architecture = architecture_of(script)
    words = {
        "model.base": base,
        "data.path": work / "images",
        "data.resolution": arguments.resolution,
        "cache.folder": work / "our_cache",
        "run.folder": work / "our_runs",
        "run.name": name,
        # Of a UNet, sd-scripts' networks.lora adapts every linear layer and 1x1 convolution of the transformers.
        "lora.targets": "kohya" if program_of(script) == "kohya" else "attention",
        "lora.rank": RANK,
        "lora.alpha": float(RANK),
        "lora.init": "gaussian",
        "train.steps": arguments.steps,
        "train.batch_size": arguments.batch_size,
        "train.precision": arguments.precision,
        "train.seed": SEED,
        # diffusers' SD1.5 script clips nothing: its iterator of parameters is used up when the optimizer was made.
        "train.max_grad_norm": "null" if architecture == "sd15" else 1.0,
        "optimizer.name": "adamw",
        "optimizer.lr": RATE,
        "schedule.name": "constant",
        "schedule.warmup": 0,
        "sample.enabled": "false",
        "tracking.wandb": "off",
    }
    script = str(ROOT / f"scripts/train_{architecture}_lora.py")
    return [script, *(word for key, value in words.items() for word in (f"--{key}", str(value)))]


def _diffusers_command(work: Path, script: Path, base: Path, arguments: argparse.Namespace, name: str) -> list[str]:
    words = {
        "pretrained_model_name_or_path": base,
        "train_data_dir": work / "images",
        "caption_column": "text",
        "image_column": "image",
        "cache_dir": work / "peer_cache",
        "output_dir": work / "peer_runs" / name,
        "resolution": arguments.resolution,
        "train_batch_size": arguments.batch_size,
        "max_train_steps": arguments.steps,
        "checkpointing_steps": arguments.steps,  # at the end, as ours
        "learning_rate": RATE,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "rank": RANK,
        "seed": SEED,
        "max_grad_norm": 1.0,
        "mixed_precision": _mixed(arguments.precision),
        "dataloader_num_workers": 8 if device() != "cpu" and (os.cpu_count() or 1) > 8 else 0,
    }
    return [str(script), "--center_crop", *(word for key, value in words.items() for word in (f"--{key}", str(value)))]


def _kohya_command(work: Path, script: Path, base: Path, arguments: argparse.Namespace, name: str) -> list[str]:
    # sd-scripts takes no tokenizer from the base: it looks for these two in this folder before it asks the hub.
    tokenizers = work / "kohya_tokenizers"
    for component, identity in (
        ("tokenizer", "openai_clip-vit-large-patch14"),
        ("tokenizer_2", "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k"),
    ):
        if (base / component).is_dir():
            shutil.copytree(base / component, tokenizers / identity, dirs_exist_ok=True)
    words = {
        "pretrained_model_name_or_path": base,
        "tokenizer_cache_dir": tokenizers,
        "train_data_dir": work / "kohya",
        "caption_extension": ".txt",
        "output_dir": work / "peer_runs" / name,
        "output_name": name,
        "resolution": f"{arguments.resolution},{arguments.resolution}",
        "train_batch_size": arguments.batch_size,
        "max_train_steps": arguments.steps,
        "learning_rate": RATE,
        "lr_scheduler": "constant",
        "optimizer_type": "AdamW",
        "network_module": "networks.lora",
        "network_dim": RANK,
        "network_alpha": RANK,
        "seed": SEED,
        "max_grad_norm": 0 if "sdxl" not in script.name else 1.0,  # as ours
        "mixed_precision": _mixed(arguments.precision),
        "save_model_as": "safetensors",
        "max_data_loader_n_workers": 0,
    }
    switches = ["--network_train_unet_only", "--cache_latents", "--cache_latents_to_disk", "--sdpa"]
    if "sdxl" in script.name:
        switches += ["--cache_text_encoder_outputs", "--cache_text_encoder_outputs_to_disk"]
    return [str(script), *switches, *(word for key, value in words.items() for word in (f"--{key}", str(value)))]


COMMANDS = {
    "train_text_to_image_lora.py": _diffusers_command,
    "train_text_to_image_lora_sdxl.py": _diffusers_command,
    "train_network.py": _kohya_command,
    "sdxl_train_network.py": _kohya_command,
}


def program_of(script: Path) -> str:
    return "diffusers" if script.name.startswith("train_text_to_image") else "kohya"


def _mixed(precision: str) -> str:
    return "no" if precision == "fp32" else precision


def device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
