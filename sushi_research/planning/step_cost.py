"""The cost of a training's micro-batch, and of the VAE, for every shape: the real model code, traced without weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch

from sushi_research import objectives
from sushi_research.adapters import lora
from sushi_research.planning.step_trace import Cost, Shape, trace


def micro_batch_cost(
    unet: Any,
    model: ModuleType,
    text_shapes: Mapping[str, tuple[int, ...]],
    *,
    dtype: torch.dtype,
    to_base: bool = False,
    to_text: bool = False,
) -> Cost:
    """The cost of a micro-batch: prediction, loss, backward pass, and the sum of the gradients.

    `unet` is on the meta device with its adapter, its checkpointing and its training mode as in the training; its tensors become
    those of `dtype`. `text_shapes` are those of the model module. With `to_base`, some samples learn the base's own prediction;
    with `to_text`, the text gets gradients too, and so does every layer after the first that reads it.
    """
    _convert(unet, dtype)
    adapter = list(lora.adapter_parameters({"unet": unet}).values())

    def run(shape: Shape) -> None:
        inputs = _inputs(shape, text_shapes)
        for tensor in inputs["text"].values():
            tensor.requires_grad_(to_text)
        prediction = model.predict(unet, **inputs, dtype=dtype)
        if to_base:
            with torch.no_grad(), lora.without_adapter(unet):
                target = model.predict(unet, **inputs, dtype=dtype)
        else:
            target = inputs["noisy"]
        objectives.mse_per_sample(prediction, target).sum().backward()
        # As `MasterWeights.accumulate`.
        gradients = [parameter.grad.reshape(-1) for parameter in adapter]
        for parameter in adapter:
            parameter.grad = None
        torch.cat(gradients)

    return trace(run, unet.parameters())


def encoders_cost(
    text: Any, encoders: Sequence[Any], model: ModuleType, settings: Mapping[str, Any], dtype: torch.dtype
) -> Cost:
    """The cost of encoding texts of one chunk of 77 tokens with text encoders that are trained, forward and backward.

    `encoders` are those of `text` (the model module's `Text`), on the meta device as `unet` in `micro_batch_cost`. Of the shape,
    only the number of samples matters.
    """
    for encoder in encoders:
        _convert(encoder, dtype)
    parameters = [parameter for encoder in encoders for parameter in encoder.parameters()]

    def run(shape: Shape) -> None:
        ids = torch.zeros(shape.samples, 1, 77, dtype=torch.int64, device="meta")
        found = model.encode_ids(text, dict.fromkeys(model.TOKENS, ids), **settings)
        sum(tensor.float().sum() for tensor in found.values()).backward()
        for parameter in parameters:
            parameter.grad = None

    return trace(run, [*parameters, *(buffer for encoder in encoders for buffer in encoder.buffers())])


def prediction_cost(
    unet: Any, model: ModuleType, text_shapes: Mapping[str, tuple[int, ...]], *, dtype: torch.dtype
) -> Cost:
    """The cost of a prediction without gradients, as in evaluating and sampling. Its arguments are those of `micro_batch_cost`."""
    _convert(unet, dtype)

    @torch.no_grad()
    def run(shape: Shape) -> Any:
        return model.predict(unet, **_inputs(shape, text_shapes), dtype=dtype)

    return trace(run, unet.parameters())


def decoding_cost(vae: Any, dtype: torch.dtype) -> Cost:
    """The cost of decoding latents with a VAE on the meta device; its shape's tokens do not matter."""
    _convert(vae, dtype)

    @torch.no_grad()
    def run(shape: Shape) -> Any:
        return vae.decode(torch.empty(shape.samples, 4, shape.rows, shape.columns, dtype=dtype, device="meta")).sample

    return trace(run, vae.parameters())


def encoding_cost(vae: Any, dtype: torch.dtype) -> Cost:
    """The cost of encoding images with a VAE on the meta device; rows and columns of the shape are those of the latents."""
    _convert(vae, dtype)
    factor = 8

    @torch.no_grad()
    def run(shape: Shape) -> Any:
        size = (shape.samples, 3, shape.rows * factor, shape.columns * factor)
        return vae.encode(torch.empty(size, dtype=dtype, device="meta")).latent_dist.mean

    return trace(run, vae.parameters())


def _convert(unet: Any, dtype: torch.dtype) -> None:
    for parameter in unet.parameters():
        parameter.data = parameter.data.to(dtype)


def _inputs(shape: Shape, text_shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The arguments of a model module's `predict`, on the meta device."""
    samples, tokens = shape.samples, {"hidden": (shape.tokens,)}
    text = {
        name: torch.empty(samples, *tokens.get(name, ()), widths[-1], dtype=torch.float16, device="meta")
        for name, widths in text_shapes.items()
    }
    return {
        "noisy": torch.empty(samples, 4, shape.rows, shape.columns, device="meta"),
        "timesteps": torch.empty(samples, dtype=torch.int64, device="meta"),
        "text": text,
        "time_ids": torch.empty(samples, 6, device="meta"),
    }
