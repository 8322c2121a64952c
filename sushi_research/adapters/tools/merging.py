"""Adds adapters: the changes of the weights, each times a number, not the matrices that they are products of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from sushi_research.adapters.entries import Difference, Entry, LowRank
from sushi_research.adapters.formats.writing import kind_of, without_mid
from sushi_research.adapters.tools.base_weights import Weights
from sushi_research.adapters.tools.convert import is_of_norm_or_bias, source_change
from sushi_research.adapters.tools.located import Entries, Located, require_same
from sushi_research.adapters.tools.low_rank import Change, Limit, cut, needs_weight, spectrum, summed, times
from sushi_research.errors import UserError
from sushi_research.progress import progress

# An adapter and the number that its change is multiplied by.
Weighted = tuple[Located, float]


def merge(adapters: Sequence[Weighted], limit: Limit | None, weights: Weights | None) -> Entries:
    """The sum of the adapters' changes.

    Low-rank pairs are concatenated, which is exact: the ranks add up. Where that exceeds the limit, the sum is reduced to it. Full
    differences are added. Without a limit sums of other kinds are a UserError, and so are adapters of two architectures.
    """
    require_same([located for located, _ in adapters])
    layers = {component: {} for located, _ in adapters for component in located.matches}
    for located, _ in adapters:
        for component, entries in located.matches.items():
            layers[component] |= dict.fromkeys(entries)
    found: dict[str, dict[str, Entry]] = {component: {} for component in layers}
    places = [(component, path) for component, paths in layers.items() for path in paths]
    for component, path in progress(places, description="merging", unit="layer"):
        parts = parts_of(adapters, component, path)
        found[component][path] = _sum(parts, limit, weights, component, path)
    return found


def parts_of(adapters: Sequence[Weighted], component: str, path: str) -> list[Weighted]:
    """Those of the adapters that change a layer."""
    return [(located, factor) for located, factor in adapters if path in located.matches.get(component, {})]


def sum_of(parts: Sequence[Weighted], weights: Weights | None, component: str, path: str) -> Change:
    """The sum of the changes of a layer."""
    return summed([times(source_change(located, weights, component, path), factor) for located, factor in parts])


def _sum(parts: Sequence[Weighted], limit: Limit | None, weights: Weights | None, component: str, path: str) -> Entry:
    entries = [located.matches[component][path] for located, _ in parts]
    factors = [factor for _, factor in parts]
    shape = parts[0][0].shapes[component][path]
    pairs = [entry for entry in entries if isinstance(entry, LowRank) and not needs_weight(entry)]
    fits = limit is None or (limit.kept is None and sum(entry.rank for entry in pairs) <= limit.most(shape))
    if len(pairs) == len(entries) and fits:
        return concatenated(pairs, factors)
    if limit and not all(is_of_norm_or_bias(entry, shape) for entry in entries):
        values = spectrum(sum_of(parts, weights, component, path))
        rank = limit.rank_of(values.values, shape)
        return cut(entries[0].name, values, rank, shape, _total(entries, factors, "bias"))
    if all(isinstance(entry, Difference) for entry in entries):
        return Difference(entries[0].name, *(_total(entries, factors, part) for part in ("weight", "bias")))
    [(located, factor), *others] = parts
    if not others and factor == 1:
        return entries[0]
    if not others and not needs_weight(entries[0]):
        return replace(entries[0], scale=entries[0].scale * factor, bias=_total(entries, factors, "bias"))
    located, entry = next(
        (part[0], entry)
        for part, entry in zip(parts, entries, strict=True)
        if not isinstance(entry, LowRank) or needs_weight(entry)
    )
    raise UserError(
        f"{located.path} holds {kind_of(entry)} ({entry.name}), and such a sum is no adapter of that kind: give a rank (--rank), "
        "to which it is approximated."
    )


def concatenated(entries: Sequence[LowRank], factors: Sequence[float]) -> LowRank:
    """The sum of low-rank pairs, each times a number, as one pair whose rank is the sum of theirs.

    Exact up to the rounding of `up` times a scale, and without any where all products of scale and number are equal.
    """
    entries = list(entries)
    scales = [entry.scale * factor for entry, factor in zip(entries, factors, strict=True)]
    bias = _total(entries, factors, "bias")
    if len(entries) == 1:
        return replace(entries[0], scale=scales[0], bias=bias)
    entries = [without_mid(entry) for entry in entries]
    if len(set(scales)) == 1:
        ups, scale = [entry.up for entry in entries], scales[0]
    else:
        ups = [(entry.up.double() * own).float() for entry, own in zip(entries, scales, strict=True)]
        scale = 1.0
    downs = [entry.down for entry in entries]
    return LowRank(entries[0].name, _joined(downs, 0), _joined(ups, 1), scale, bias=bias)


def _joined(tensors: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
    """The tensors one after another; in fp32 if their dtypes differ."""
    same = len({tensor.dtype for tensor in tensors}) == 1
    return torch.cat([tensor if same else tensor.float() for tensor in tensors], axis)


def _total(entries: Sequence[Entry], factors: Sequence[float], name: str) -> torch.Tensor | None:
    """The sum of one of the entries' tensors, each times a number; None if no entry has it, and itself if there is one, times 1."""
    found = [(getattr(entry, name), factor) for entry, factor in zip(entries, factors, strict=True)]
    found = [(tensor, factor) for tensor, factor in found if tensor is not None]
    if not found or (len(found) == 1 and found[0][1] == 1):
        return found[0][0] if found else None
    return torch.stack([tensor.double() * factor for tensor, factor in found]).sum(0).float()
