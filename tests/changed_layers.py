"""What the layers of a pipeline compute with adapter files on it, against the changes of weights and biases that the files say."""

from __future__ import annotations

import torch
import torch.nn.functional as F

LAYERS = torch.nn.Linear | torch.nn.Conv2d
NORMS = LAYERS | torch.nn.GroupNorm | torch.nn.LayerNorm


def layers_of(pipeline, kinds=LAYERS):
    """(component, path) -> linear or convolutional layer of the UNet and the text encoders, or also norm."""
    return {
        (component, path): layer
        for component in ("unet", "text_encoder", "text_encoder_2")
        if getattr(pipeline, component, None) is not None
        for path, layer in getattr(pipeline, component).named_modules()
        if isinstance(layer, kinds)
    }


def without_hooks(pipeline):
    """Takes everything off that was put on the pipeline."""
    for part in pipeline.components.values():
        for module in part.modules() if isinstance(part, torch.nn.Module) else ():
            module._forward_hooks.clear()


def operation(layer, x, weight, bias):
    """What a layer like this one gives with this weight and bias."""
    if isinstance(layer, torch.nn.Conv2d):
        return F.conv2d(x, weight, bias, layer.stride, layer.padding)
    if isinstance(layer, torch.nn.GroupNorm):
        return F.group_norm(x, layer.num_groups, weight, bias, layer.eps)
    if isinstance(layer, torch.nn.LayerNorm):
        return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
    return F.linear(x, weight, bias)


def assert_changed(pipeline, changes, rtol=1e-4, only=None):
    """Every layer computes with the weight and bias of its own plus `changes[where]`, and every other one as in the base.

    `only` are the layers that are looked at, to save time.
    """
    for where, layer in layers_of(pipeline, NORMS).items():
        if only is not None and where not in only:
            continue
        channels = isinstance(layer, torch.nn.Conv2d | torch.nn.GroupNorm)
        width = layer.weight.shape[-1 if layer.weight.ndim < 4 else 1]
        x = torch.randn((2, width, 5, 5) if channels else (3, width), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            found, plain = layer(x), operation(layer, x, layer.weight, layer.bias)
            if where not in changes:
                assert torch.equal(found, plain), where
                continue
            weight, bias = changes[where]
            bias = layer.bias if bias is None else layer.bias + bias
            wanted = operation(layer, x, layer.weight + weight, bias)
        assert (found - wanted).abs().max() <= rtol * (wanted - plain).abs().max(), where
