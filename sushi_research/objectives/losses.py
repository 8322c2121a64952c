"""Errors of predictions, one number for each sample."""

from __future__ import annotations

import torch


def mse_per_sample(prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared error of each sample over its C x H x W values, in float32: [B].

    With a mask [B, 1, H, W] float32 of weights from 0 to 1 it is the weighted mean, sum(w e) / sum(w): a small subject counts as
    much as one that fills the image. A sample whose weights are all 0 has the error 0.
    """
    # With one operand in fp32 the difference is computed in fp32. The conversion of the other is exact and needs no copy.
    errors = (prediction - target.float()).square()
    if mask is None:
        return errors.flatten(1).mean(1)
    weights = mask.expand_as(errors)
    return (errors * weights).flatten(1).sum(1) / weights.flatten(1).sum(1).clamp(min=torch.finfo(torch.float32).tiny)
