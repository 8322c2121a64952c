"""PyTorch's attention kernels in an order that the user chooses, for the UNet alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sushi_research.errors import UserError, first_line

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


class OrderedAttention:
    """diffusers' attention processor, with the kernels in `order`: the first one that can compute an attention does.

    The order holds within the attentions of this UNet: in training, where a recomputation may run them again in the backward pass,
    in evaluating and in sampling. The VAE and the text encoders have other shapes and dtypes, which not every kernel takes.
    """

    def __init__(self, order: Sequence[str]) -> None:
        from diffusers.models.attention_processor import AttnProcessor2_0

        self._backends = [BACKENDS[name] for name in order]
        self._attend = AttnProcessor2_0()

    def __call__(self, *arguments: Any, **options: Any) -> torch.Tensor:
        with sdpa_kernel(self._backends, set_priority=True):
            return self._attend(*arguments, **options)


def require_order(order: Sequence[str], unet: Any, dtype: torch.dtype, device: torch.device, *, masked: bool) -> None:
    """UserError unless, for each width of a head in the UNet, one kernel of the order runs here, forward and backward.

    `unet` may be without weights. `masked`: captions of a batch may differ in length, and the attention to them then has a mask.
    """
    from diffusers.models.attention_processor import Attention

    widths = {module.inner_dim // module.heads for module in unet.modules() if isinstance(module, Attention)}
    for width in sorted(widths):
        for has_mask in (False, True) if masked else (False,):
            if reason := _problem(order, width, dtype, device, has_mask):
                what = f"{str(dtype).removeprefix('torch.')} attention of {width} channels per head"
                what += " with a mask, which captions of different lengths need" if has_mask else ""
                raise UserError(
                    f"no kernel of train.attention [{', '.join(order)}] computes {what} on this device ({reason}): add math to the "
                    "list, which computes all, or leave train.attention at sdpa."
                )


def _problem(order: Sequence[str], width: int, dtype: torch.dtype, device: torch.device, has_mask: bool) -> str | None:
    """Why no kernel computes the attention of 64 pixels to a caption of 77 tokens, with gradients; None if one does."""
    query, key = (
        torch.zeros(1, 2, length, width, dtype=dtype, device=device, requires_grad=True) for length in (64, 77)
    )
    mask = torch.zeros(1, 2, 1, 77, dtype=dtype, device=device) if has_mask else None
    try:
        with sdpa_kernel([BACKENDS[name] for name in order], set_priority=True):
            F.scaled_dot_product_attention(query, key, key, attn_mask=mask).sum().backward()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return first_line(error).rstrip(".")
    return None
