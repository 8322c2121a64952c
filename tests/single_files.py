"""Narrow bases with the structure and the ratios of the published models, and single files in Stability's original layout.

The tiny bases of `testing.tiny_base` choose heads and groups freely. These obey what holds for every published model and
is written in no tensor: 32 groups, 8 heads per attention in SD1.5's UNet, 64 channels per head everywhere else. So a reader
of a single file can rebuild them from the tensors' shapes.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sushi_research.models.original_names import Place, clip_name, open_clip_place, unet_name, vae_name
from testing.tiny_base import save_tiny_base

POSITIONS, VOCABULARY = 77, 514
# The bits of one value of each dtype that safetensors 0.8 knows.
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
# Where the components lie in the file; the UNet's prefix is an argument.
PREFIXES = {
    "sd15": {"vae": "first_stage_model.", "text_encoder": "cond_stage_model.transformer."},
    "sdxl": {
        "vae": "first_stage_model.",
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}


def narrow_base(folder: Path, architecture: str, *, seed: int = 0) -> Path:
    """Writes a narrow base of `architecture` with random weights in diffusers format; returns the folder."""
    # The tokenizers, the scheduler and model_index.json are the tiny base's.
    save_tiny_base(folder, architecture, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for component, module in _components(architecture).items():
            module.save_pretrained(folder / component)
    if architecture == "sd15":
        # The published SD1.5 VAE's config has no such key.
        path = folder / "vae" / "config.json"
        config = json.loads(path.read_text())
        del config["force_upcast"]
        path.write_text(json.dumps(config, indent=2))
    return folder


def write_single_file(
    folder: Path,
    file: Path,
    architecture: str,
    *,
    dtype: torch.dtype = torch.float16,
    unet_prefix: str = "model.diffusion_model.",
    extra: Mapping[str, Tensor] | None = None,
    metadata: dict[str, str] | None = None,
    without: Sequence[str] = (),
    companions: bool = True,
) -> Path:
    """Writes the base in `folder` as one file in the original layout, cast to `dtype`; returns the file.

    `without` leaves out components by diffusers' names, `extra` adds tensors or replaces some, `companions` are the
    tensors that published files carry next to the parameters.
    """
    tensors: dict[str, Tensor] = {}
    for component, prefix in {"unet": unet_prefix, **PREFIXES[architecture]}.items():
        if component not in without:
            tensors |= {prefix + name: value.to(dtype) for name, value in _original(folder / component)}
            if companions:
                tensors |= _companions(component, architecture, prefix)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors | dict(extra or {}), file, metadata)
    return file


def place_of(component: str, config: Mapping[str, Any]) -> Callable[[str], Place]:
    """The function from a component's parameter to its place, for diffusers' name of the component and its config."""
    if component == "unet":
        plain = [index for index, kind in enumerate(config["up_block_types"]) if kind == "UpBlock2D"]
        layers = config["layers_per_block"]
        return lambda path: Place(unet_name(path, layers_per_block=layers, plain_up_blocks=plain))
    if component == "vae":
        return lambda path: Place(vae_name(path, levels=len(config["block_out_channels"])))
    return open_clip_place if component == "text_encoder_2" else lambda path: Place(clip_name(path))


def _original(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """A component's tensors under their original names and in their original shapes."""
    place_at = place_of(folder.name, json.loads((folder / "config.json").read_text()))
    (weights,) = folder.glob("*.safetensors")
    thirds: dict[str, dict[int, Tensor]] = {}
    for path, value in load_file(weights).items():
        place = place_at(path)
        if place.third is not None:
            thirds.setdefault(place.name, {})[place.third] = value
        elif ".mid.attn_1." in place.name and value.ndim == 2:
            yield place.name, value[:, :, None, None]
        else:
            yield place.name, value.T.contiguous() if place.transposed else value
    for name, parts in thirds.items():
        yield name, torch.cat([parts[index] for index in range(3)])


def _companions(component: str, architecture: str, prefix: str) -> dict[str, Tensor]:
    """What published files hold next to a component's parameters, in their own dtypes."""
    if component == "text_encoder":
        return {f"{prefix}text_model.embeddings.position_ids": torch.arange(POSITIONS)[None]}
    if component == "text_encoder_2":
        return {f"{prefix}logit_scale": torch.tensor(4.6052)}
    if component != "unet" or architecture != "sd15":
        return {}
    # The buffers of CompVis' DDPM, which files that its code saved have.
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)
    before = torch.cat([torch.ones(1, dtype=kept.dtype), kept[:-1]])
    variance = betas * (1 - before) / (1 - kept)
    buffers = {
        "betas": betas,
        "alphas_cumprod": kept,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": kept.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - kept).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - kept).log(),
        "sqrt_recip_alphas_cumprod": (1 / kept).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / kept - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * before.sqrt() / (1 - kept),
        "posterior_mean_coef2": (1 - before) * (1 - betas).sqrt() / (1 - kept),
    }
    return {name: value.float() for name, value in buffers.items()}


def _components(architecture: str) -> dict[str, torch.nn.Module]:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    sdxl = architecture == "sdxl"
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=32,
        # Two in the published ones; one makes a reader count.
        layers_per_block=1 if sdxl else 2,
        scaling_factor=0.13025 if sdxl else 0.18215,
        force_upcast=True,
        sample_size=64,
    )
    if not sdxl:
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64, 128, 128),
            norm_num_groups=32,
            attention_head_dim=8,
            cross_attention_dim=64,
        )
        return {"unet": unet, "vae": vae, "text_encoder": _text_encoder(64)}
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 128),
        norm_num_groups=32,
        attention_head_dim=(1, 1, 2),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        cross_attention_dim=64 + 128,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=128 + 6 * 16,
    )
    # Two widths: diffusers tells the encoders of a single file apart by them.
    return {
        "unet": unet,
        "vae": vae,
        "text_encoder": _text_encoder(64),
        "text_encoder_2": _text_encoder(128, second=True),
    }


def _text_encoder(width: int, *, second: bool = False) -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=4 if second else 3,
        num_attention_heads=width // 64,
        projection_dim=width,
        hidden_act="gelu" if second else "quick_gelu",
        # The published values, as in tiny.py.
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if second else CLIPTextModel)(config)
