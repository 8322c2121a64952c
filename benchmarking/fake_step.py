"""Counts one training step of a real model on fake tensors, which have shapes but no memory: ours, and the usual ones.

The tensors are fake CPU tensors, because PyTorch without CUDA cannot run autograd on fake CUDA tensors. What matters is as on a
GPU: attention is the fused flash kernel, which saves its result and one number per row for the backward pass. Two things are
not the CPU's: autocast, of which the rules of CUDA are followed, and bitsandbytes' optimizer, one operator per tensor as on CUDA.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from diffusers.models.attention import FeedForward
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.optim import optimizer as torch_optimizer
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import _disable_current_modes

from benchmarking.measured_code import load_script
from benchmarking.python_calls import PythonCalls
from benchmarking.variants import Bench, as_peft, with_master_weights
from sushi_research import models
from sushi_research.adapters import lora
from sushi_research.adapters.settings import AdapterSettings
from sushi_research.fast import checkpointing
from sushi_research.fast.batch import Batch
from sushi_research.models.components import build_empty
from sushi_research.models.prediction import Prediction
from sushi_research.planning.live_bytes import LiveBytes
from sushi_research.planning.op_counts import Counter, Counts
from sushi_research.runs.job import Job
from testing.real_configs import UNETS

# The side of the latents at each architecture's resolution: 512 and 1024 pixels.
LATENTS = {"sd15": 64, "sdxl": 128}
TARGETS = {"attention": "attention", "all": "kohya_conv"}
RANK = 16
CHECKPOINTING = checkpointing.MODES


@dataclass(frozen=True)
class Way:
    """A way to train an adapter on a bf16 UNet: its words, its step, the adapter's dtype, and whether autocast is on."""

    words: str
    build: Callable[..., Any]
    adapter_dtype: torch.dtype
    autocast: bool = False


WAYS = {
    "ours": Way("fp32 master weights, one working copy in bf16", with_master_weights, torch.float32),
    "fp32": Way("fp32 adapters as peft makes them", as_peft, torch.float32),
    "autocast": Way("fp32 adapters under autocast to bf16", as_peft, torch.float32, autocast=True),
    "bf16": Way("bf16 adapters, no master weights", as_peft, torch.bfloat16),
}


def count_step(architecture: str, targets: str, way: str, modes: Sequence[str] = CHECKPOINTING) -> dict[str, int]:
    """The numbers of one step with one sample. `targets` is a key of TARGETS, `way` of WAYS.

    `peak_bytes_<mode>` are counted for these modes of checkpointing, all else without any.
    """
    kind = WAYS[way]
    with _fake_tensors(), cuda_autocast() if kind.autocast else contextlib.nullcontext():
        unet = fake_unet(architecture, TARGETS[targets], kind.adapter_dtype)
        adapter = list(lora.adapter_parameters({"unet": unet}).values())
        with LiveBytes(unet.parameters()) as live:
            watched = _Watched(load_script(architecture).training_step, adapter)
            step = kind.build(fake_bench(architecture, watched), unet, lambda index: [fake_batch(architecture, unet)])
            step(0)  # makes the optimizer's state
            watched.is_real = True
            found = {}
            for mode in modes:
                _set_checkpointing(unet, mode)
                live.peak = live.live
                step(1)
                found[f"peak_bytes_{mode}"] = live.peak
            _set_checkpointing(unet, "none")
            # After a step of each kind, because the first calls functions that remember their answer.
            found |= _counts(lambda: step(1), unet, watched)
    return dict(sorted((found | {"trainable_tensors": len(adapter)}).items()))


def _counts(step: Callable[[], Any], unet: Any, watched: _Watched) -> dict[str, int]:
    launches: list[int] = []

    def before(*_: Any) -> None:
        launches.append(-counter.counts().ops)

    def after(*_: Any) -> None:
        launches.append(counter.counts().ops)

    hooks = [
        torch_optimizer.register_optimizer_step_pre_hook(before),
        torch_optimizer.register_optimizer_step_post_hook(after),
    ]
    try:
        with Counter(unet.parameters()) as counter, PythonCalls() as python:
            watched.counter = counter
            step()
    finally:
        watched.counter = None
        for hook in hooks:
            hook.remove()
    inner, whole = watched.counts, counter.counts()
    return {
        "flops": whole.flops,
        "ops": inner.ops,
        "ops_whole_step": whole.ops,
        "dtype_copies": inner.dtype_copies,
        "dtype_copies_whole_step": whole.dtype_copies,
        "saved_bytes": whole.saved_bytes,
        "optimizer_launches": sum(launches),
        "python_calls": python.calls,
    }


class _Losses:
    """Metrics that do nothing with what the training step adds."""

    added: tuple[torch.Tensor, ...] = ()

    def add(self, *added: torch.Tensor) -> None:
        self.added = added


class _Watched:
    """The script's training_step, counted apart from the rest of the step; until `is_real` its gradients are just zeros."""

    def __init__(self, training_step: Callable[..., None], adapter: Sequence[torch.nn.Parameter]) -> None:
        self.training_step, self.adapter = training_step, adapter
        self.is_real, self.counts = False, Counts(0, 0, 0)
        self.counter: Counter | None = None

    def __call__(self, *arguments: Any) -> None:
        if not self.is_real:
            for parameter in self.adapter:
                parameter.grad = torch.zeros_like(parameter)
            arguments[-1].add(torch.zeros(()), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
            return
        *others, metrics = arguments
        before, losses = self.counter.counts() if self.counter else None, _Losses()
        self.training_step(*others, losses)
        if self.counter and before:
            self.counts = self.counter.counts() - before
        metrics.add(*losses.added)


def fake_unet(architecture: str, targets: str, adapter_dtype: torch.dtype) -> Any:
    """The UNet of an architecture with an adapter of rank 16, on fake tensors: bf16, and the adapter in its dtype."""
    with _disable_current_modes():
        unet = build_empty("unet", UNETS[architecture])
        lora.attach(
            unet, AdapterSettings(targets=targets, rank=RANK, alpha=float(RANK), dropout=0.0, init="default", seed=0)
        )

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=adapter_dtype if tensor.requires_grad else torch.bfloat16)

    return unet._apply(fake).train()


def fake_bench(architecture: str, training_step: Callable[..., None]) -> Bench:
    """What the variants of a step need beyond a UNet and batches."""
    config = models.ARCHITECTURES[architecture].config_class()(
        model={"base": "none"}, data={"path": "none"}, train={"steps": 1}, optimizer={"name": "adamw8bit"}
    )
    return Bench(
        job=Job(config, models.load(architecture), Accelerator(cpu=True), "bf16"),
        script=SimpleNamespace(training_step=training_step),
        base=SimpleNamespace(prediction=Prediction()),
        items=[],
        sampler=None,
        caches=None,
        finish=ExitStack(),
    )


def fake_batch(architecture: str, unet: Any) -> Batch:
    """One sample as the loader gives it, in fp16 as cached, with its noise."""
    shape = (1, 4, LATENTS[architecture], LATENTS[architecture])
    text = {"hidden": torch.ones(1, 77, unet.config.cross_attention_dim, dtype=torch.half)}
    if unet.config.addition_embed_type:
        width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        text["pooled"] = torch.ones(1, width, dtype=torch.half)
    return Batch(
        mean=torch.zeros(shape, dtype=torch.half),
        std=torch.ones(shape, dtype=torch.half),
        text=text,
        time_ids=torch.ones(1, 6),
        loss_weights=torch.ones(1),
        names=("picture",),
        keys=((0, "picture", 0),),
        seed=0,
        device=torch.device("cpu"),
        prefetched={"noise": torch.zeros(shape), "posterior": torch.zeros(shape)},
    )


def _set_checkpointing(unet: Any, mode: str) -> None:
    unet.disable_gradient_checkpointing()
    for module in unet.modules():
        if isinstance(module, FeedForward):
            vars(module).pop("forward", None)
    checkpointing.enable(unet, mode, draws=False)


@contextlib.contextmanager
def _fake_tensors() -> Iterator[None]:
    """Fake tensors, also for bitsandbytes, which reads the numbers of a table that it makes, and for torch's foreach functions."""
    from bitsandbytes import functional as bitsandbytes

    def real(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            with _disable_current_modes():
                return function(*arguments, **options)

        return call

    table = mock.patch.object(bitsandbytes, "create_dynamic_map", real(bitsandbytes.create_dynamic_map))
    types = [*_foreach_utils._foreach_supported_types, FakeTensor]
    foreach = mock.patch.object(_foreach_utils, "_foreach_supported_types", types)
    with warnings.catch_warnings(), table, foreach, FakeTensorMode(allow_non_fake_inputs=True):
        # The address of a fake tensor is 0, which is fine for comparing addresses.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        yield


@contextlib.contextmanager
def cuda_autocast() -> Iterator[None]:
    """What `torch.autocast("cuda", torch.bfloat16)` does to the operators of a UNet, on any device.

    From https://docs.pytorch.org/docs/stable/amp.html: products, convolutions and attention compute in bf16, norms in fp32, all
    others in the dtype of their inputs. It holds in the backward pass too, for activations that are computed again.
    """

    def casts(name: str, dtype: torch.dtype) -> Any:
        function = getattr(functional, name)

        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            cast = [each.to(dtype) if isinstance(each, torch.Tensor) else each for each in arguments]
            return function(*cast, **options)

        return mock.patch.object(functional, name, call)

    with ExitStack() as stack:
        for name in ("linear", "conv2d", "scaled_dot_product_attention"):
            stack.enter_context(casts(name, torch.bfloat16))
        for name in ("group_norm", "layer_norm"):
            stack.enter_context(casts(name, torch.float32))
        yield
