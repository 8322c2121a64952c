"""The components of a base: their classes in diffusers and transformers, empty models of them, and their weights looked at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sushi_research.errors import UserError, first_line

# The class of each; text_encoder_2 must be the one with the projection: without it there is no pooled output.
CLASSES = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}
# What each is called before a user.
TITLES = {"unet": "UNet", "vae": "VAE", "text_encoder": "text encoder", "text_encoder_2": "second text encoder"}


# Counts of modules, and more of them than any Stable Diffusion has: a config must not make us build for hours.
LIMITS = {"layers_per_block": 4, "transformer_layers_per_block": 16, "num_hidden_layers": 64}


def require_bounded(config: Mapping[str, Any]) -> None:
    """ValueError where a config asks for more layers than `LIMITS`."""
    for key, most in LIMITS.items():
        value = config.get(key)
        for count in value if isinstance(value, list | tuple) else [value]:
            if isinstance(count, int | float) and count > most:
                raise ValueError(f"{key} is {count}, more than any Stable Diffusion has")


def model_class(name: str) -> Any:
    """The class of the component `name`, in diffusers or transformers."""
    import diffusers
    import transformers

    return getattr(transformers if name.startswith("text_encoder") else diffusers, CLASSES[name])


def build_empty(name: str, config: Mapping[str, Any]) -> Any:
    """The model of `config` with its parameters on the meta device and its buffers real; ValueError for a config that
    describes no model."""
    from accelerate import init_empty_weights

    require_bounded(config)
    kind = model_class(name)
    try:
        with init_empty_weights(include_buffers=False):
            return (
                kind(kind.config_class(**config)) if name.startswith("text_encoder") else kind.from_config(dict(config))
            )
    except Exception as error:
        # A width that its groups do not divide, a list where a number belongs: each library has its own error for it.
        raise ValueError(first_line(error)) from error


# What torch's own allocations begin at, and what the CPU's fastest kernels ask for.
ALIGNMENT = 64


def align(model: Any) -> None:
    """Copies each weight on the CPU that begins elsewhere than torch's own tensors do.

    A tensor of a mapped safetensors file begins where its header ended, and a CPU's matrix product may round otherwise there:
    without this the same weights in another file would train another adapter. The copy lasts when the file is replaced, too.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()


def require_finite(value: Any, key: str, where: str, stored: Any = None) -> None:
    """UserError, naming the tensor, for weights with NaN or infinity in them: what is trained on them is lost.

    `stored` is the tensor as the file has it, where that is at hand: a sound one may be too large for fp16.
    """
    if _is_finite(value):
        return
    if stored is not None and _is_finite(stored):
        name = str(value.dtype).removeprefix("torch.")
        raise UserError(f"{where} has values in {key} that {name} cannot hold: set the precision to bf16 or fp32.")
    raise UserError(
        f"{where} has values that are not finite (NaN or infinity) in {key}: the file is damaged, or a merge or a cast to "
        "fp16 spoiled it, so take another copy of the model."
    )


def _is_finite(value: Any) -> bool:
    import torch

    # Whatever is not finite shows in the sum, which takes one pass and no memory. Only where it overflows is each looked at.
    return bool(value.sum(dtype=torch.float32).isfinite()) or bool(value.isfinite().all())
