"""A batch of fixed addresses: what a recorded step reads, filled anew before each replay."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from sushi_research.fast.batch import Batch

# A draw of random numbers: "normal", "uniform" or "integers", its purpose, and the shape or the upper end.
Draw = tuple[str, str, Any]
ShapeKey = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]


def tensors_of(batch: Batch) -> dict[str, torch.Tensor]:
    """The tensors of a batch by name, without its random numbers."""
    named = {name: getattr(batch, name) for name in ("mean", "std", "time_ids", "loss_weights", "step")}
    optional = {name: getattr(batch, name) for name in ("mask", "to_base", "roles")}
    texts = {f"text.{name}": tensor for name, tensor in batch.text.items()}
    return named | texts | {name: tensor for name, tensor in optional.items() if tensor is not None}


def shape_key(batch: Batch) -> ShapeKey:
    """What decides whether one recording serves two batches: names, shapes and dtypes of their tensors, whatever their order."""
    return tuple(sorted((name, tuple(each.shape), each.dtype) for name, each in tensors_of(batch).items()))


class StaticBatch:
    """The tensors and random numbers of a batch at addresses of its own; what `training_step` reads of a `Batch` has its name.

    `names`, `keys` and `seed` are missing on purpose: a recording would repeat those of the batch that it was made with.
    """

    def __init__(self, batch: Batch) -> None:
        self._tensors = {name: tensor.clone() for name, tensor in tensors_of(batch).items()}
        self._draws: dict[Draw, torch.Tensor] = {}
        self._noted: Batch | None = None
        self._size, self.device = len(batch), batch.device
        found = self._tensors
        self.mean, self.std, self.time_ids = found["mean"], found["std"], found["time_ids"]
        self.loss_weights, self.step = found["loss_weights"], found["step"]
        self.mask, self.to_base, self.roles = found.get("mask"), found.get("to_base"), found.get("roles")
        self.text = {name: found[f"text.{name}"] for name in batch.text}

    def __len__(self) -> int:
        return self._size

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"a recorded step cannot read batch.{name}, which is not a tensor")

    @contextlib.contextmanager
    def noting_draws(self, batch: Batch) -> Iterator[None]:
        """A block in which the step may ask for random numbers: they are made for `batch`, and `fill` will make them again."""
        self._noted = batch
        try:
            yield
        finally:
            self._noted = None

    def normal(self, purpose: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """Standard normal noise of the batch with which this one was filled (`Batch.normal`)."""
        return self._draw(("normal", purpose, shape))

    def uniform(self, purpose: str, shape: tuple[int, ...] = ()) -> torch.Tensor:
        """Uniform numbers of the batch with which this one was filled (`Batch.uniform`)."""
        return self._draw(("uniform", purpose, shape))

    def integers(self, purpose: str, high: int) -> torch.Tensor:
        """Uniform integers of the batch with which this one was filled (`Batch.integers`)."""
        return self._draw(("integers", purpose, high))

    def fill(self, batch: Batch) -> None:
        """Copies the tensors of `batch`, which has the same `shape_key`, and makes its random numbers, on the CPU as always."""
        for name, tensor in tensors_of(batch).items():
            self._tensors[name].copy_(tensor, non_blocking=True)
        for draw, tensor in self._draws.items():
            tensor.copy_(_drawn(batch, draw), non_blocking=True)

    def _draw(self, draw: Draw) -> torch.Tensor:
        if draw not in self._draws:
            if self._noted is None:
                kind, purpose, _ = draw
                raise RuntimeError(
                    f"batch.{kind}({purpose!r}) was not asked for when the step ran before its recording"
                )
            self._draws[draw] = _drawn(self._noted, draw).clone()
        return self._draws[draw]


def _drawn(batch: Batch, draw: Draw) -> torch.Tensor:
    kind, purpose, argument = draw
    return getattr(batch, kind)(purpose, argument)
