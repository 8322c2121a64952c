"""Converts what an adapter file holds so that a layout can hold it, exactly or as low-rank pairs of a lower rank."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence

import torch

from sushi_research.adapters.entries import Difference, Entry, LowRank
from sushi_research.adapters.formats.writing import kind_of
from sushi_research.adapters.tools.base_weights import Weights
from sushi_research.adapters.tools.located import Entries, Located, each_entry
from sushi_research.adapters.tools.low_rank import Change, Limit, change_of, cut, needs_weight, spectrum
from sushi_research.errors import UserError, some
from sushi_research.progress import progress


def reduce(located: Located, limit: Limit, weights: Weights | None, description: str = "reducing") -> Entries:
    """The entries with changes of weights reduced to the limit: those of a lower rank stay as they are, bit for bit.

    Other kinds than low-rank pairs become such pairs, except changes of norms. UserError for a DoRA without the base's weights.
    """
    found: dict[str, dict[str, Entry]] = {component: {} for component in located.matches}
    total = sum(map(len, located.matches.values()))
    for component, path, _ in progress(each_entry(located.matches), total=total, description=description, unit="layer"):
        found[component][path] = reduced(located, limit, weights, component, path)
    return found


def reduced(located: Located, limit: Limit, weights: Weights | None, component: str, path: str) -> Entry:
    """One entry, reduced to the limit."""
    entry, shape = located.matches[component][path], located.shapes[component][path]
    if is_of_norm_or_bias(entry, shape):
        return entry
    is_plain = isinstance(entry, LowRank) and not needs_weight(entry)
    if is_plain and limit.kept is None and entry.rank <= limit.most(shape):
        return entry
    values = spectrum(source_change(located, weights, component, path))
    rank = limit.rank_of(values.values, shape)
    return entry if is_plain and rank >= entry.rank else cut(entry.name, values, rank, shape, entry.bias)


def source_change(located: Located, weights: Weights | None, component: str, path: str) -> Change:
    """The change that a file makes to a layer; of a DoRA with the base's weight. UserError for a DoRA without a base."""
    entry = located.matches[component][path]
    weight = None
    if needs_weight(entry):
        if weights is None:
            raise UserError(
                f"{located.path} holds {kind_of(entry)} ({entry.name}), whose change depends on the weights of the base: give it "
                "(--base)."
            )
        weight = weights.get(component, f"{path}.weight")
    return change_of(entry, located.shapes[component][path], weight)


def is_of_norm_or_bias(entry: Entry, shape: tuple[int, ...]) -> bool:
    """Whether an entry changes what no low-rank pair changes."""
    return len(shape) < 2 or (isinstance(entry, Difference) and entry.weight is None)


def largest_rank(entries: Entries) -> int:
    """The largest rank of a low-rank pair; 0 without any."""
    return max((entry.rank for _, _, entry in each_entry(entries) if isinstance(entry, LowRank)), default=0)


def ranks(entries: Entries) -> str:
    """The ranks of the low-rank pairs, with the number of layers of each: "4 (128), 2 (8)"."""
    found = Counter(entry.rank for _, _, entry in each_entry(entries) if isinstance(entry, LowRank))
    shown = [f"{rank} ({count:,})" for rank, count in sorted(found.items())]
    return some(shown[::-1], 6) if shown else "none (no low-rank pairs)"


def dtype_of(located: Sequence[Located]) -> torch.dtype:
    """The narrowest dtype that holds the tensors of all the files, of those that every program reads."""
    kinds = {
        tensor.dtype for each in located for _, _, entry in each_entry(each.matches) for tensor in tensors_in(entry)
    }
    # One byte (float8) fits into two.
    found = functools.reduce(torch.promote_types, (kind for kind in kinds if kind.itemsize > 1), torch.float16)
    return found if found.itemsize < 8 else torch.float32


def tensors_in(entry: Entry) -> list[torch.Tensor]:
    """The tensors of an entry."""
    return [value for value in vars(entry).values() if isinstance(value, torch.Tensor)]
