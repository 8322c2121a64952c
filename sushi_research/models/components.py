"""The components of a base: their classes in diffusers and transformers, building them empty, and checks of their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sushi_research.errors import UserError, first_line

# The class of each component. text_encoder_2 needs the class with the projection, which computes the pooled output.
CLASSES = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}
# The name of each component in messages.
TITLES = {"unet": "UNet", "vae": "VAE", "text_encoder": "text encoder", "text_encoder_2": "second text encoder"}


# Upper bounds on layer counts, above those of any Stable Diffusion: a damaged config must not make us build for hours.
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
    """Builds the model of `config` with its parameters on the meta device and real buffers.

    ValueError if no model can be built from the config.
    """
    from accelerate import init_empty_weights

    require_bounded(config)
    kind = model_class(name)
    try:
        with init_empty_weights(include_buffers=False):
            return (
                kind(kind.config_class(**config)) if name.startswith("text_encoder") else kind.from_config(dict(config))
            )
    except Exception as error:
        # For example a width not divisible by its groups, or a list instead of a number. Each library raises its own error.
        raise ValueError(first_line(error)) from error


def require_finite(value: Any, key: str, where: str, stored: Any = None) -> None:
    """UserError, naming the tensor `key`, for weights that contain NaN or infinity.

    `stored` is the tensor before the cast to the dtype of `value`, if known: finite values may overflow in fp16.
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
    if not value.numel():
        return True
    # Both are NaN if any value is. This is by far the fastest of torch's passes over a tensor in 16 bits on a CPU.
    least, most = value.aminmax()
    return bool(least.isfinite() & most.isfinite())
