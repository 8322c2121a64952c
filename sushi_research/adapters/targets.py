"""Which layers of a component get an adapter: presets, and endings of paths."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from sushi_research.errors import UserError, nearest

# The parts of the UNet that adapter files can name; conv_in, conv_out and the embeddings are not among them.
BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")
# The layers of a text encoder; the first has no `text_model` in transformers 5.
_ENCODER_LAYERS = ("encoder.layers.", "text_model.encoder.layers.")

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
PROJECTIONS = ("proj_in", "proj_out")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv")
PRESETS: dict[str, tuple[str, ...]] = {
    "attention": ATTENTION,
    "attention_ff": ATTENTION + FEED_FORWARD,
    "kohya": ATTENTION + FEED_FORWARD + PROJECTIONS,
    "kohya_conv": ATTENTION + FEED_FORWARD + PROJECTIONS + CONVOLUTIONS,
}
# All layers of a text encoder, as kohya's sd-scripts adapts them.
TEXT_ENCODER = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def resolve_targets(targets: str | Sequence[str]) -> list[str]:
    """The module path suffixes to adapt: those of a preset, or the given list. UserError for an unknown preset."""
    if not isinstance(targets, str):
        return list(targets)
    if targets not in PRESETS:
        raise UserError(
            f"{targets} is not a preset of adapter targets{nearest(targets, PRESETS)}: choose from "
            f"{', '.join(PRESETS)}, or give a list of module names."
        )
    return list(PRESETS[targets])


def adaptable_paths(component: nn.Module, name: str = "unet") -> list[str]:
    """Paths of the layers that can have an adapter, in a component without one: of the UNet all layers of the preset `kohya_conv`,
    of a text encoder those of `TEXT_ENCODER`."""
    begins = BLOCKS if name == "unet" else _ENCODER_LAYERS
    return [
        path
        for path, module in component.named_modules()
        if path.startswith(begins) and isinstance(module, nn.Linear | nn.Conv2d)
    ]


def matching(endings: Sequence[str], paths: Sequence[str]) -> set[str]:
    """Those of the paths that one of the endings names, as peft matches them."""
    return {path for path in paths if any(path == ending or path.endswith(f".{ending}") for ending in endings)}


def target_layers(component: nn.Module, endings: Sequence[str], name: str = "unet") -> dict[str, nn.Module]:
    """Path -> layer that the endings name, in the component's order.

    UserError if a suffix matches no module, or one that cannot have an adapter. Matches as peft does.
    """
    modules, adaptable = dict(component.named_modules()), set(adaptable_paths(component, name))
    title, choice, key = (
        ("UNet", PRESETS["kohya_conv"], "lora") if name == "unet" else (name, TEXT_ENCODER, "text_encoders")
    )
    found: set[str] = set()
    for ending in endings:
        matches = matching([ending], list(modules))
        if not matches:
            raise UserError(
                f"{key}.targets: the adapter target {ending} fits no module of the {title}{nearest(ending, choice)}: correct or "
                "remove it."
            )
        for path in modules:
            if path in matches and path not in adaptable:
                raise UserError(
                    f"{key}.targets: the adapter target {ending} fits {path}, which cannot have an adapter: choose from "
                    f"{', '.join(choice)}, or endings that name fewer modules."
                )
        found |= matches
    return {path: module for path, module in modules.items() if path in found}
