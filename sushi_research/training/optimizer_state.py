"""The state of an optimizer by the names of the adapter's tensors, as a checkpoint holds it.

    tensors     name -> what belongs to that tensor. Of a flat parameter: its part of every state of the parameter's length.
    flat        for each flat parameter the names of its tensors in order, and the rest of its state: scalars, and the scales of
                8-bit blocks, which cross tensors; None if the optimizer holds single tensors
    groups      for each parameter group the names of its tensors, and its options, such as the learning rate
    others      what else its `state_dict` holds

So no order of the adapter's tensors is part of a checkpoint, except where the scales of blocks depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from sushi_research.training.master_weights import MasterWeights

# The key of a state that is not by name: that of an optimizer whose `state_dict` is not torch's.
_WHOLE = "whole"


class ForeignState(Exception):
    """A saved state that does not fit the optimizer. The message says why, as the part of a sentence."""


def named_state(optimizer: torch.optim.Optimizer, master_weights: MasterWeights) -> dict[str, Any]:
    """The optimizer's state by name. Tensors are views of the optimizer's own, so save them before the next step.

    A `state_dict` that is not built as torch's (of a class that wraps another optimizer) is kept whole, with the order of names.
    """
    state, held = optimizer.state_dict(), _held(optimizer, master_weights)
    if not _is_usual(state, optimizer):
        return {_WHOLE: state, "names": held}
    shapes, is_flat = master_weights.shapes(), _is_flat(optimizer, master_weights)
    states, tensors, flat = dict(state["state"]), {}, []
    for index, names in zip(_indices(state), held, strict=True):
        found = states.pop(index, None)
        if not is_flat:
            tensors |= {} if found is None else {names[0]: found}
            continue
        flat.append({"names": names, "state": None if found is None else _without_numbers(found, names, shapes)})
        tensors |= {} if found is None else _split(found, names, shapes)
    groups = []
    names_of = iter(held)
    for group in state["param_groups"]:
        names = [name for _ in group["params"] for name in next(names_of)]
        groups.append({"names": names, "options": {key: value for key, value in group.items() if key != "params"}})
    others = {key: value for key, value in state.items() if key not in ("state", "param_groups")}
    return {
        "tensors": tensors,
        "flat": flat if is_flat else None,
        "groups": groups,
        "others": others | ({"state": states} if states else {}),
    }


def load_named_state(optimizer: torch.optim.Optimizer, master_weights: MasterWeights, saved: Mapping[str, Any]) -> None:
    """Gives the optimizer a state from `named_state`, joined by name.

    Raises ForeignState if it is that of other tensors, of another layout, or not whole; errors of the optimizer itself go through.
    """
    held = _held(optimizer, master_weights)
    if _WHOLE in saved:
        if saved.get("names") != held:
            raise ForeignState("its optimizer state has other tensors, or in another order")
        optimizer.load_state_dict(saved[_WHOLE])
        return
    state = optimizer.state_dict()
    if not _is_usual(state, optimizer) or not all(key in saved for key in ("tensors", "flat", "groups", "others")):
        raise ForeignState("its optimizer state is not by name")
    is_flat = _is_flat(optimizer, master_weights)
    if is_flat != (saved["flat"] is not None):
        raise ForeignState(f"its optimizer state is that of {'single tensors' if is_flat else 'one flat tensor'}")
    groups = []
    for group, found in zip(state["param_groups"], _groups(saved, state, held), strict=True):
        groups.append({**found["options"], "params": group["params"]})
    states = dict(saved["others"].get("state", {}))
    for number, (index, names) in enumerate(zip(_indices(state), held, strict=True)):
        if not is_flat:
            found = saved["tensors"].get(names[0])
        else:
            found = _joined(saved["flat"][number], saved["tensors"], names, master_weights.shapes())
        if found is not None:
            states[index] = found
    others = {key: value for key, value in saved["others"].items() if key != "state"}
    optimizer.load_state_dict({"state": states, "param_groups": groups, **others})


def _held(optimizer: torch.optim.Optimizer, master_weights: MasterWeights) -> list[list[str]]:
    """The names of the tensors of each parameter that the optimizer holds, in its order."""
    singles = zip(master_weights.parameters(), ([name] for name in master_weights.shapes()), strict=True)
    flat = zip(master_weights.flat_parameters(), master_weights.groups(), strict=True)
    names = {id(parameter): names for parameter, names in (*singles, *flat)}
    return [list(names[id(parameter)]) for parameter in _parameters(optimizer)]


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _is_flat(optimizer: torch.optim.Optimizer, master_weights: MasterWeights) -> bool:
    flat = {id(parameter) for parameter in master_weights.flat_parameters()}
    return all(id(parameter) in flat for parameter in _parameters(optimizer))


def _is_usual(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> bool:
    """Whether the `state_dict` numbers the parameters in the groups as torch's does."""
    groups = state.get("param_groups")
    if not (isinstance(state.get("state"), dict) and isinstance(groups, list)):
        return False
    numbers = [group.get("params", ()) for group in groups if isinstance(group, dict)]
    return list(map(len, numbers)) == [len(group["params"]) for group in optimizer.param_groups]


def _indices(state: Mapping[str, Any]) -> list[int]:
    return [index for group in state["param_groups"] for index in group["params"]]


def _groups(saved: Mapping[str, Any], state: Mapping[str, Any], held: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """The saved parameter groups, which hold the tensors of today's."""
    names_of = iter(held)
    today = [sorted(name for _ in group["params"] for name in next(names_of)) for group in state["param_groups"]]
    if [sorted(group["names"]) for group in saved["groups"]] != today:
        raise ForeignState("its optimizer state has other tensors, or in other groups")
    return saved["groups"]


def _is_numbers(value: Any, names: Sequence[str], shapes: Mapping[str, torch.Size]) -> bool:
    """Whether a value of a flat parameter's state has one number (or as many, [k, n]) for each of the parameter's numbers."""
    length = sum(shapes[name].numel() for name in names)
    return isinstance(value, torch.Tensor) and value.ndim >= 1 and value.shape[-1] == length


def _without_numbers(state: Any, names: Sequence[str], shapes: Mapping[str, torch.Size]) -> Any:
    """The part of a flat parameter's state that belongs to no single tensor. bitsandbytes' state is one level deeper."""
    return {
        key: _without_numbers(value, names, shapes) if isinstance(value, dict) else value
        for key, value in state.items()
        if not _is_numbers(value, names, shapes)
    }


def _split(state: Mapping[str, Any], names: Sequence[str], shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    """The parts of a flat parameter's state by name, each in the shape of its tensor (after leading dimensions)."""
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, value in state.items():
        if isinstance(value, dict):
            for name, part in _split(value, names, shapes).items():
                found[name] |= {key: part} if part else {}
        elif _is_numbers(value, names, shapes):
            pieces = value.split([shapes[name].numel() for name in names], dim=-1)
            for name, piece in zip(names, pieces, strict=True):
                found[name][key] = piece.view(*piece.shape[:-1], *shapes[name])
    return found


def _joined(
    saved: Mapping[str, Any], tensors: Mapping[str, Any], names: Sequence[str], shapes: Mapping[str, torch.Size]
) -> dict[str, Any] | None:
    """The state of a flat parameter with the tensors `names`; None if it had none."""
    if sorted(saved["names"]) != sorted(names):
        raise ForeignState("its optimizer state has other tensors, or in other groups")
    if saved["state"] is None:
        return None
    if saved["names"] != names and _has_blocks(saved["state"]):
        raise ForeignState(
            "its optimizer state has scales of blocks that cross tensors, which are in another order now"
        )
    return _merged(saved["state"], [tensors.get(name) for name in names], [shapes[name] for name in names])


def _has_blocks(state: Mapping[str, Any]) -> bool:
    values = state.values()
    return any(
        _has_blocks(value) if isinstance(value, dict) else isinstance(value, torch.Tensor) and value.numel() > 1
        for value in values
    )


def _merged(rest: Any, parts: Sequence[Any], shapes: Sequence[torch.Size]) -> dict[str, Any]:
    """`rest` with the tensors' parts of each state joined in their order."""
    if not all(isinstance(part, dict) and part.keys() == parts[0].keys() for part in parts):
        raise ForeignState("its optimizer state lacks a part of some tensors")
    merged = dict(rest)
    for key in parts[0]:
        values = [part[key] for part in parts]
        merged[key] = (
            _merged(rest.get(key, {}), values, shapes) if isinstance(values[0], dict) else _cat(values, shapes)
        )
    return merged


def _cat(values: Sequence[Any], shapes: Sequence[torch.Size]) -> torch.Tensor:
    flat = []
    for value, shape in zip(values, shapes, strict=True):
        is_whole = isinstance(value, torch.Tensor) and value.dtype == values[0].dtype
        if not is_whole or value.shape[value.ndim - len(shape) :] != shape:
            raise ForeignState(f"its optimizer state has a part that is not of {list(shape)}")
        flat.append(value.reshape(*value.shape[: value.ndim - len(shape)], -1))
    return torch.cat(flat, dim=-1)
