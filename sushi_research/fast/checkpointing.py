"""Gradient checkpointing: activations that the backward pass recomputes, so that they need not be stored (arXiv 1604.06174)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

MODES = ("none", "feed_forward", "all")


def enable(unet: Any, mode: str, *, draws: bool) -> None:
    """Turns on a mode of train.gradient_checkpointing in a `UNet2DConditionModel`.

    "all" recomputes every resnet and transformer block; "feed_forward" only the feed-forward layers of the transformer blocks,
    whose activations are the widest. The random state is kept for the recomputation only if the adapter `draws` random
    numbers, so that it draws the same ones: a recorded step cannot read it.
    """
    assert mode in MODES, mode
    recompute = partial(_recompute, draws)
    if mode == "all":
        unet.enable_gradient_checkpointing(recompute)
    elif mode == "feed_forward":
        from diffusers.models.attention import BasicTransformerBlock

        for block in unet.modules():
            if isinstance(block, BasicTransformerBlock):
                block.ff.forward = partial(_forward, block.ff.forward, recompute)


def _recompute(preserve_rng_state: bool, module: Any, *arguments: Any) -> Any:
    return checkpoint(module, *arguments, use_reentrant=False, preserve_rng_state=preserve_rng_state)


def _forward(forward: Any, recompute: Any, *arguments: Any) -> Any:
    # Evaluating and sampling compute no gradients, so there is nothing to recompute.
    return recompute(forward, *arguments) if torch.is_grad_enabled() else forward(*arguments)
