"""The largest norm of what an adapter adds to a layer (lora.max_norm), held after each step of the optimizer.

The norm is the Frobenius norm of the layer's change, with its scale and without the magnitude of a DoRA. Where it is larger than
the limit, every factor of the module is multiplied by the same number, so that the change has the norm of the limit:
sqrt(limit / norm) for the two matrices of a LoRA, as `scale_weight_norms` of kohya's sd-scripts does it. It acts on the fp32 master
weights, so it is the same in every process, and a resumed run goes on bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import nn

from sushi_research.adapters import lora, tensor_names
from sushi_research.training.master_weights import MasterWeights

# Numbers of a chunk of modules: 64 MiB for each of its intermediate results.
CHUNK = 2**24
Parts = dict[str, torch.Tensor]


class _Chunk(NamedTuple):
    """Modules of one kind and shape: their tensors by part, one of each module, and their scales [n]."""

    tensors: dict[str, list[torch.Tensor]]
    scales: torch.Tensor


class MaxNorm:
    """The limit, and the modules that it holds for. Call `apply` after each step of the optimizer."""

    def __init__(self, limit: float, tensors: Mapping[str, torch.Tensor], scales: Mapping[str, float]) -> None:
        """`tensors`: the master weights by name. `scales`: that of each module, by the beginning of its tensors' names."""
        self.limit = limit
        self._tensors, self._scales = tensors, scales
        self.leave(())

    def leave(self, frozen: Collection[str]) -> None:
        """From now on leaves these tensors alone."""
        modules: dict[str, Parts] = {}
        for name, tensor in self._tensors.items():
            found = tensor_names.parse(name)
            is_factor = found.part != "magnitude" and found.path != tensor_names.NEW_TOKENS
            if is_factor and name not in frozen:
                modules.setdefault(tensor_names.module_name(found.component, found.path), {})[found.part] = tensor
        self._chunks = list(_chunks(modules, self._scales))
        self.forget()

    @torch.no_grad()
    def apply(self) -> None:
        """Scales down the modules that are above the limit. Waits for nothing: no module is looked at by itself."""
        after, scaled = [], []
        for tensors, scales in self._chunks:
            stacked = {part: torch.stack(each) for part, each in tensors.items()}
            norms = norms_of(stacked) * scales
            ratios = (self.limit / norms).clamp(max=1.0)  # of a norm of 0 it is 1
            factors = ratios ** (1 / len(stacked))
            for part, values in stacked.items():
                values *= factors.view(-1, *[1] * (values.ndim - 1))
                torch._foreach_copy_(tensors[part], list(values.unbind()))
            after.append(norms * ratios)
            scaled.append(ratios < 1)
        norms = torch.cat(after)
        self._metrics = torch.stack([torch.cat(scaled).sum().float(), norms.mean(), norms.max()])

    def forget(self) -> None:
        """Drops the metrics of the last `apply`, where a step was skipped."""
        self._metrics: torch.Tensor | None = None

    def metrics(self) -> dict[str, float | None]:
        """The number of modules that `apply` has scaled down, and the mean and the largest norm after it; None if it was not called
        in this step."""
        scaled, mean, largest = (None, None, None) if self._metrics is None else self._metrics.tolist()
        return {
            "max_norm/scaled": None if scaled is None else int(scaled),
            "max_norm/mean": mean,
            "max_norm/largest": largest,
        }


def limit_of(limit: float | None, master_weights: MasterWeights, components: Mapping[str, nn.Module]) -> MaxNorm | None:
    """The limit of a run, whose components have the adapters; None without one."""
    if limit is None:
        return None
    tensors = dict(zip(master_weights.shapes(), master_weights.parameters(), strict=True))
    scales = {
        tensor_names.module_name(component, path): entry.scale
        for component, entries in lora.trained_entries(components, tensors).items()
        for path, entry in entries.items()
    }
    return MaxNorm(limit, tensors, scales)


def norms_of(parts: Parts) -> torch.Tensor:
    """The norms [n] of the changes of n layers of one shape, without their scale. `parts` are stacked, [n, ...] each.

    Full matrices are only built where that takes less memory than the products of their factors with themselves.
    """
    if "lora_A.weight" in parts:
        return _norms_of_product(parts["lora_B.weight"].flatten(2), parts["lora_A.weight"].flatten(2))
    if "hada_w1_a" in parts:
        a, b, c, d = (parts[f"hada_{part}"] for part in ("w1_a", "w1_b", "w2_a", "w2_b"))
        if not _has_small_products(a.shape[1], a.shape[2] * c.shape[2], b.shape[2]):
            return torch.linalg.vector_norm((a @ b) * (c @ d), dim=(1, 2))
        # The elementwise product of two products is one product of the rowwise and columnwise products of their factors.
        up = (a[..., :, None] * c[..., None, :]).flatten(2)
        return _norms_of_product(up, (b[:, :, None] * d[:, None]).flatten(1, 2))
    # The norm of a Kronecker product is the product of the norms.
    return _norms_of_kronecker_factor(parts, "w1") * _norms_of_kronecker_factor(parts, "w2")


def _norms_of_kronecker_factor(parts: Parts, name: str) -> torch.Tensor:
    whole = parts.get(f"lokr_{name}")
    if whole is not None:
        return torch.linalg.vector_norm(whole.flatten(1), dim=1)
    return _norms_of_product(parts[f"lokr_{name}_a"], parts[f"lokr_{name}_b"].flatten(2))


def _norms_of_product(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The norms [n] of `up` [n, out, rank] @ `down` [n, rank, in]: the squared norm is tr((up^T up)(down down^T))."""
    if not _has_small_products(up.shape[1], up.shape[2], down.shape[2]):
        return torch.linalg.vector_norm(up @ down, dim=(1, 2))
    squares = ((up.mT @ up) * (down @ down.mT)).sum((1, 2))
    return squares.clamp(min=0.0).sqrt()  # rounding may make a square of almost 0 negative


def _has_small_products(outputs: int, rank: int, inputs: int) -> bool:
    """Whether the products of two factors with themselves are smaller than their product with each other."""
    return rank * max(rank, outputs + inputs) < 2 * outputs * inputs


def _chunks(modules: Mapping[str, Parts], scales: Mapping[str, float]) -> Iterator[_Chunk]:
    """The modules by kind and shapes, as many together as `CHUNK` allows."""
    alike: dict[tuple[tuple[str, torch.Size], ...], list[str]] = {}
    for name, parts in modules.items():
        alike.setdefault(tuple((part, tensor.shape) for part, tensor in parts.items()), []).append(name)
    for key, names in alike.items():
        size = max(1, CHUNK // _numbers(dict(key)))
        device = next(iter(modules[names[0]].values())).device
        for first in range(0, len(names), size):
            some = names[first : first + size]
            yield _Chunk(
                {part: [modules[name][part] for name in some] for part, _ in key},
                torch.tensor([abs(scales[name]) for name in some], dtype=torch.float32, device=device),
            )


def _numbers(shapes: Mapping[str, torch.Size]) -> int:
    """The numbers of a module's factors, or of the full matrices or larger factors that its norm may take."""
    numbers = sum(map(math.prod, shapes.values()))
    if "hada_w1_a" in shapes:
        (outputs, rank), inputs = shapes["hada_w1_a"], shapes["hada_w1_b"][1]
        numbers += min(2 * outputs * inputs, rank * rank * max(rank * rank, outputs + inputs))
    return numbers
