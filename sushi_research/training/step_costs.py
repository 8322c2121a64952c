"""Predicts FLOPs and peak memory of a job's micro-batches, for any batch size and checkpointing, before anything is loaded.

The traces of planning/ take seconds for a real model, so what they found is remembered next to the caches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version

import numpy as np
import torch

from sushi_research.adapters import lora, tensor_names
from sushi_research.adapters.settings import AdapterSettings, settings_of
from sushi_research.caches.keys import entry_key
from sushi_research.config.sets import sets_of
from sushi_research.config.text_encoders import is_in_step
from sushi_research.fast.checkpointing import enable
from sushi_research.models import loading, storage
from sushi_research.models.components import build_empty
from sushi_research.planning import memory
from sushi_research.planning.memory import Held, Memory
from sushi_research.planning.step_cost import (
    decoding_cost,
    encoding_cost,
    micro_batch_cost,
    prediction_cost,
)
from sushi_research.planning.step_trace import STRIDE, Cost, Shape
from sushi_research.remembered import Remembered
from sushi_research.runs.job import Job
from sushi_research.training import text_encoder_plan, text_encoders
from sushi_research.training.averages import names_of
from sushi_research.training.optimizer_plan import state_bytes

# Increment it when the traces count in another way.
_VERSION = 1
_LIBRARIES = ("torch", "diffusers", "transformers", "peft")
# What this process has traced, by the key of what is remembered: a process may make several plans of one model.
_TRACED: dict[str, Mapping[str, np.ndarray]] = {}
# Pixels of a side that a latent pixel stands for.
FACTOR = 8


class NotTraced(Exception):
    """A cost that was never traced, where tracing is not allowed."""


class StepCosts:
    """The costs of a job's micro-batches on its base, with an adapter whose tensors have these `shapes`.

    `encoders` are the bytes of text encoders that stay in memory while the run trains. With `may_trace` false, only what an earlier
    command has traced is known, and everything else raises NotTraced.
    """

    def __init__(
        self,
        job: Job,
        base: loading.Base,
        shapes: Mapping[str, Sequence[int]],
        remembered: Remembered,
        encoders: int = 0,
        *,
        may_trace: bool = True,
    ) -> None:
        self._job, self._base, self._shapes, self._remembered = job, base, shapes, remembered
        self._encoders, self._may_trace = encoders, may_trace
        self._costs: dict[str, tuple[Cost, Cost]] = {}
        self._of_text: dict[str, Cost] = {}

    @cached_property
    def held(self) -> Held:
        """What is in memory all the time."""
        section, numbers = self._job.config.optimizer, sum(map(math.prod, self._shapes.values()))
        return Held(
            weights=float(self._arrays("unet-bytes", self._weights, storage=self._storage)["bytes"][0]),
            adapter=memory.adapter_bytes(numbers, self._dtype.itemsize, averages=len(names_of(self._job.config.ema))),
            optimizer=state_bytes(section, self._shapes),
            encoders=self._encoders,
        )

    def flops(self, checkpointing: str, samples: int, size: tuple[int, int]) -> float:
        """FLOPs of a micro-batch of so many samples of a bucket, of `size` (height, width) in pixels."""
        encoders = self._encoders_cost(checkpointing)
        of_text = encoders.flops_of(self._chunks(samples)) if encoders else 0.0
        return self._cost(checkpointing)[0].flops_of(self._shape(samples, size)) + of_text

    def peak(self, checkpointing: str, samples: int, size: tuple[int, int], recorded: bool) -> Memory:
        """The peak memory of such a micro-batch, and of the optimizer's step after it."""
        live = self._cost(checkpointing)[0].peak_bytes(self._shape(samples, size))
        if encoders := self._encoders_cost(checkpointing):  # what they save is there while the UNet computes
            live += encoders.peak_bytes(self._chunks(samples))
        if self._storage != "compute":  # one weight at a time is made again
            live += self._dtype.itemsize * float(self._arrays("unet-bytes", self._weights)["largest"][0])
        step = memory.STEP_BYTES.get(self._job.config.optimizer.name, memory.OTHER_STEP_BYTES)
        live = max(live, step * sum(map(math.prod, self._shapes.values())))
        return self._on_device(self.held.total, live, checkpointing, recorded)

    def evaluating(self, checkpointing: str, samples: int, size: tuple[int, int]) -> Memory:
        """The peak memory of predicting so many samples of a bucket at once, without gradients."""
        live = self._cost(checkpointing)[1].peak_bytes(self._shape(samples, size))
        return self._on_device(self.held.total, live, "none", False)

    def sampling(self, size: tuple[int, int], tile: int | None) -> Memory:
        """The peak memory of decoding a sample of `size` pixels next to the UNet: whole, or in tiles of so many pixels a side.

        Generating its latents, two samples at a time, takes less.
        """
        size = size if tile is None else (min(size[0], tile), min(size[1], tile))
        dtype, found = self._vae
        live = _cost_of(found, "decoding").peak_bytes(self._shape(1, size))
        return self._on_device(self.held.total + dtype.itemsize * float(found["numbers"][0]), live, "none", False)

    def caching(self, size: tuple[int, int]) -> Memory:
        """The peak memory of encoding one image of `size` pixels. The UNet is not loaded yet."""
        dtype, found = self._vae
        live = _cost_of(found, "encoding").peak_bytes(self._shape(1, size))
        return self._on_device(dtype.itemsize * float(found["numbers"][0]), live, "none", False)

    def _on_device(self, held: float, live: float, checkpointing: str, recorded: bool) -> Memory:
        if self._job.device.type == "cuda":
            return memory.on_gpu(held, live, checkpointing=checkpointing, recorded=recorded)
        return memory.on_cpu(held, live)

    def _shape(self, samples: int, size: tuple[int, int]) -> Shape:
        tokens = 77 * self._job.config.captions.chunks
        return Shape(samples, size[0] // FACTOR, size[1] // FACTOR, tokens)

    def _chunks(self, samples: int) -> Shape:
        """The chunks of the captions of so many samples, at most."""
        return Shape(samples * self._job.config.captions.chunks, STRIDE, STRIDE, 1)

    def _encoders_cost(self, checkpointing: str) -> Cost | None:
        """That of encoding chunks of captions with the text encoders that are trained; None if none is."""
        job = self._job
        if not is_in_step(job.config.text_encoders):
            return None

        def make() -> Mapping[str, np.ndarray]:
            return _arrays_of({"encoders": text_encoder_plan.cost_of(job, self._base, checkpointing)})

        if checkpointing not in self._of_text:
            shapes = {name: list(shape) for name, shape in self._shapes.items() if not _is_of_unet(name)}
            settings = text_encoders.adapter_settings(job.config)
            found = self._arrays(
                "encoders-cost",
                make,
                adapter=shapes,
                encoders={name: self._base.config(name) for name in job.model.TEXT_ENCODERS},
                checkpointing=checkpointing,
                drops=[settings.dropout > 0, settings.rank_dropout > 0, settings.module_dropout > 0],
                settings=text_encoders.text_settings(job),
            )
            self._of_text[checkpointing] = _cost_of(found, "encoders")
        return self._of_text[checkpointing]

    @property
    def _dtype(self) -> torch.dtype:
        return self._job.compute_dtype

    @property
    def _storage(self) -> storage.Storage:
        return self._job.config.model.base_storage

    def _cost(self, checkpointing: str) -> tuple[Cost, Cost]:
        """Those of a micro-batch, and of a prediction without gradients."""
        if checkpointing not in self._costs:
            job = self._job
            settings = settings_of(job.config.lora, seed=0)
            to_base = any(each.target == "base" for each in sets_of(job.config))
            to_text = is_in_step(job.config.text_encoders)
            shapes = {name: list(shape) for name, shape in self._shapes.items() if _is_of_unet(name)}
            text_shapes = job.model.text_shapes(self._base)

            def make() -> Mapping[str, np.ndarray]:
                unet = loading.empty_unet(self._base)
                lora.attach(unet, settings, start=job.start and job.start.matches["unet"])
                unet.train()
                enable(unet, checkpointing, draws=settings.drops)
                step = micro_batch_cost(
                    unet, job.model, text_shapes, dtype=self._dtype, to_base=to_base, to_text=to_text
                )
                prediction = prediction_cost(unet, job.model, text_shapes, dtype=self._dtype)
                return _arrays_of({"step": step, "prediction": prediction})

            found = self._arrays(
                "step-cost",
                make,
                adapter=shapes,
                dropout=settings.dropout > 0,
                **(
                    {"parts": [settings.rank_dropout > 0, settings.module_dropout > 0]}
                    if _drops_parts(settings)
                    else {}
                ),
                **({"to_text": True} if to_text else {}),
                dtype=str(self._dtype),
                checkpointing=checkpointing,
                to_base=to_base,
                text={name: list(shape) for name, shape in text_shapes.items()},
            )
            self._costs[checkpointing] = _cost_of(found, "step"), _cost_of(found, "prediction")
        return self._costs[checkpointing]

    def _weights(self) -> Mapping[str, np.ndarray]:
        unet = loading.empty_unet(self._base)
        largest = max(parameter.numel() for parameter in unet.parameters())
        total = storage.weight_bytes(unet, self._dtype, self._storage)
        return {"bytes": np.array([total]), "largest": np.array([largest])}

    @cached_property
    def _vae(self) -> tuple[torch.dtype, Mapping[str, np.ndarray]]:
        """(the VAE's dtype, its number of parameters and the costs of encoding and decoding)."""
        dtype = loading.vae_dtype(self._base, self._job.device)

        def make() -> Mapping[str, np.ndarray]:
            vae = build_empty("vae", self._base.config("vae"))
            costs = {"encoding": encoding_cost(vae, dtype), "decoding": decoding_cost(vae, dtype)}
            return {"numbers": np.array([sum(each.numel() for each in vae.parameters())])} | _arrays_of(costs)

        return dtype, self._arrays("vae-cost", make, component="vae", dtype=str(dtype))

    def _arrays(
        self, kind: str, make: Callable[[], Mapping[str, np.ndarray]], component: str = "unet", **recipe: object
    ) -> Mapping[str, np.ndarray]:
        """What `make` returns, remembered by the component's config, the recipe and the libraries."""
        libraries = {name: version(name) for name in _LIBRARIES}
        config = self._base.config(component)
        recipe = {"dtype": str(self._dtype), **recipe, "version": _VERSION, "libraries": libraries, "kind": kind}
        key = entry_key(architecture=self._job.model.NAME, config=config, **recipe)
        found = self._remembered.find(kind, key)
        if found is None and not self._may_trace:
            raise NotTraced
        if found is None:
            _TRACED[key] = _TRACED[key] if key in _TRACED else make()
            found = self._remembered.put(kind, key, _TRACED[key])
        return found


def _is_of_unet(name: str) -> bool:
    return tensor_names.parse(name).component == "unet"


def _drops_parts(settings: AdapterSettings) -> bool:
    return bool(settings.rank_dropout or settings.module_dropout)


def _arrays_of(costs: Mapping[str, Cost]) -> dict[str, np.ndarray]:
    return {
        f"{name}_{field}": getattr(cost, field)
        for name, cost in costs.items()
        for field in ("exponents", "flops", "alive")
    }


def _cost_of(arrays: Mapping[str, np.ndarray], name: str) -> Cost:
    return Cost(*(arrays[f"{name}_{field}"] for field in ("exponents", "flops", "alive")))
