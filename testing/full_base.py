"""Bases of the published sizes with random weights, for measurements that need no trained model and no download.

    python -m testing.full_base sd15 FOLDER         # 2 GB in fp16
    python -m testing.full_base sdxl FOLDER cuda    # 7 GB, made on the GPU

Every matrix has normal values of variance 1 / inputs, so that activations stay finite in 16 bits; norms are the identity. The
tokenizer has as many tokens as the published one: bytes, and pairs of bytes.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from testing.real_configs import SD15_TEXT, SD15_UNET, SD15_VAE, SDXL_TEXT_1, SDXL_TEXT_2, SDXL_UNET, SDXL_VAE
from testing.tiny_base import SCHEDULE

COMPONENTS: dict[str, dict[str, Mapping[str, Any]]] = {
    "sd15": {"unet": SD15_UNET, "vae": SD15_VAE, "text_encoder": SD15_TEXT},
    "sdxl": {"unet": SDXL_UNET, "vae": SDXL_VAE, "text_encoder": SDXL_TEXT_1, "text_encoder_2": SDXL_TEXT_2},
}
_PIPELINES = {
    "sd15": {"_class_name": "StableDiffusionPipeline", "safety_checker": [None, None]},
    "sdxl": {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True},
}
_SCHEDULERS = {
    "sd15": ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False}),
    "sdxl": ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
}
# What pads a caption of each tokenizer.
_PADS = {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}


def save_unet(folder: Path, config: Mapping[str, Any], *, device: str = "cpu", seed: int = 0) -> Path:
    """Writes a UNet alone, in diffusers format in fp16, to `folder/unet`; returns the folder."""
    _save_component(folder, "unet", config, device, seed)
    return folder


def save_full_base(folder: Path, architecture: str, *, device: str = "cpu", seed: int = 0) -> Path:
    """Writes a base of the published size in diffusers format, in fp16, unless the folder has one; returns the folder."""
    from sushi_research.models.components import CLASSES

    if (folder / "model_index.json").is_file():
        return folder
    index: dict[str, Any] = dict(_PIPELINES[architecture])
    for number, (name, config) in enumerate(COMPONENTS[architecture].items()):
        library = "transformers" if name.startswith("text_encoder") else "diffusers"
        index[name] = [library, CLASSES[name]]
        _save_component(folder, name, config, device, seed + number)
    for name in (name for name in _PADS if name.replace("tokenizer", "text_encoder") in index):
        _save_tokenizer(folder / name, _PADS[name])
        index[name] = ["transformers", "CLIPTokenizer"]
    kind, options = _SCHEDULERS[architecture]
    (folder / "scheduler").mkdir(exist_ok=True)
    _write(folder / "scheduler/scheduler_config.json", {"_class_name": kind, **SCHEDULE, **options})
    index["scheduler"] = ["diffusers", kind]
    _write(folder / "model_index.json", index)  # last: without it the folder is no base
    return folder


def _save_component(folder: Path, name: str, config: Mapping[str, Any], device: str, seed: int) -> None:
    from sushi_research.models.components import CLASSES
    from sushi_research.models.diffusers_folder import stem

    (folder / name).mkdir(parents=True, exist_ok=True)
    if name.startswith("text_encoder"):
        named: dict[str, Any] = {"architectures": [CLASSES[name]], "model_type": "clip_text_model"}
    else:
        named = {"_class_name": CLASSES[name]}
    _write(folder / name / "config.json", {**named, **config})
    _save_weights(folder / name / f"{stem(name)}.safetensors", name, config, device, seed)


def _save_weights(file: Path, name: str, config: Mapping[str, Any], device: str, seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    from sushi_research.models.components import build_empty

    generator, tensors = torch.Generator(device).manual_seed(seed), {}
    for key, parameter in build_empty(name, config).named_parameters():
        value = torch.empty(parameter.shape, dtype=torch.float16, device=device)
        if value.dim() > 1:
            inputs = value[0].numel() if "embedding" not in key or "time" in key else value.shape[1]
            value.normal_(0, 1 / math.sqrt(inputs), generator=generator)
        else:  # a bias, or the scale of a norm
            value.fill_(float(key.endswith("weight")))
        # As in the published files: newer transformers leave the prefix out, older ones need it.
        bare = name == "text_encoder" and not key.startswith("text_model.")
        tensors[f"text_model.{key}" if bare else key] = value.cpu()
    save_file(tensors, file, metadata={"format": "pt"})


def _save_tokenizer(folder: Path, pad: str) -> None:
    from testing.tiny_base import tokenizer

    tokenizer(folder, pad, size=SD15_TEXT["vocab_size"]).save_pretrained(folder)


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2))


def main(arguments: list[str]) -> None:
    """Writes the base that the module's docstring shows."""
    from sushi_research.training.run import quiet_libraries

    architecture, folder, *device = arguments
    quiet_libraries()
    print(save_full_base(Path(folder), architecture, device=device[0] if device else "cpu"))


if __name__ == "__main__":
    main(sys.argv[1:])
