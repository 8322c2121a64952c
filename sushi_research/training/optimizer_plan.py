"""What a plan says about the optimizer: its state's bytes, what it does with the tensors, and settings that rarely fit it."""

from __future__ import annotations

import contextlib
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sushi_research.adapters import tensor_names
from sushi_research.config.learning import OptimizerSection, ScheduleSection
from sushi_research.config.section import plural
from sushi_research.files import size_text
from sushi_research.planning import memory
from sushi_research.training import optim
from sushi_research.training.master_weights import MasterWeights
from sushi_research.training.optimizer_classes import NAMED, class_path, is_elementwise, optimizer_class

# Numbers of the tensor on which an elementwise optimizer is measured: so many that tables of 8-bit states hardly count.
_MEASURED = 65_536


@dataclass(frozen=True)
class OptimizerPlan:
    """The optimizer of a run: its name and class, bytes of its state in all and for each trained number, whether it gets all
    tensors of a group joined into one, how many tensors its AdamW trains (muon), whether it averages the weights, and notes."""

    name: str
    path: str
    state_bytes: float
    bytes_per_number: float
    joined: bool
    by_adamw: int
    averages: bool
    notes: tuple[str, ...]

    def describe(self) -> list[str]:
        """The lines of a plan."""
        title = self.name if self.name == self.path else f"{self.name} ({self.path})"
        parts = [f"state {size_text(self.state_bytes)}, {self.bytes_per_number:.3g} bytes for each trained number"]
        parts += ["all tensors of a rate joined into one"] if self.joined else []
        if self.by_adamw:
            parts.append(f"{self.by_adamw} tensor{plural(self.by_adamw)} that are no matrices are trained by its AdamW")
        parts += ["the averaged weights are evaluated, sampled and exported"] if self.averages else []
        return [f"optimizer    {title}: {'; '.join(parts)}", *(f"{'':<13}{note}" for note in self.notes)]


def plan_of(section: OptimizerSection, schedule: ScheduleSection, shapes: Mapping[str, Sequence[int]]) -> OptimizerPlan:
    """The plan of an optimizer for tensors of these shapes by name, which it can train (`optimizer_check.require_usable`)."""
    state = state_bytes(section, shapes)
    averages = optim.averages_weights(optimizer_class(section.name))
    return OptimizerPlan(
        name=section.name,
        path=class_path(section.name),
        state_bytes=state,
        bytes_per_number=state / sum(map(math.prod, shapes.values())),
        joined=is_elementwise(section.name, section.kwargs),
        by_adamw=sum(not tensor_names.is_matrix(name) for name in shapes) if section.name == "muon" else 0,
        averages=averages,
        notes=_notes(section, schedule, averages),
    )


def state_bytes(section: OptimizerSection, shapes: Mapping[str, Sequence[int]]) -> float:
    """Bytes of the optimizer's state for tensors of these shapes by name: known, or those that one step leaves.

    Arguments may add to what is known (AdamW's amsgrad).
    """
    numbers = sum(map(math.prod, shapes.values()))
    if section.name in memory.STATE_BYTES and not section.kwargs:
        return numbers * memory.STATE_BYTES[section.name]
    if is_elementwise(section.name, section.kwargs):
        return numbers * _measured(section, {"measured.lora_A.weight": (_MEASURED,)})[0] / _MEASURED
    # One tensor of each shape, as the optimizer treats equal shapes equally; Prodigy keeps no copy of one that starts at zero.
    kinds = {
        name: (tuple(shape), tensor_names.is_matrix(name), tensor_names.starts_at_zero(name))
        for name, shape in shapes.items()
    }
    counts, one_each = Counter(kinds.values()), {kind: name for name, kind in kinds.items()}
    found = _measured(section, {name: shapes[name] for name in one_each.values()})
    return sum(each * counts[kind] for kind, each in zip(one_each, found, strict=True))


def _measured(section: OptimizerSection, shapes: Mapping[str, Sequence[int]]) -> list[float]:
    """Bytes of the state of each tensor after a step. They start at zero or not as those of an adapter do."""
    working = {
        name: nn.Parameter(torch.full(tuple(shape), float(not tensor_names.starts_at_zero(name))))
        for name, shape in shapes.items()
    }
    master_weights = MasterWeights(working, torch.float32)
    with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()):
        optimizer = optim.build_optimizer(section.name, master_weights, section.lr, section.kwargs)
        for flat in master_weights.flat_parameters():
            flat.grad.fill_(1.0)
        optimizer.step()
    is_flat = is_elementwise(section.name, section.kwargs)
    held = master_weights.flat_parameters() if is_flat else master_weights.parameters()
    return [sum(tensor.nbytes for tensor in _tensors(optimizer.state[parameter])) for parameter in held]


def _tensors(nest: object) -> list[torch.Tensor]:
    if isinstance(nest, torch.Tensor):
        return [nest]
    items = nest.values() if isinstance(nest, Mapping) else nest if isinstance(nest, list | tuple) else ()
    return [tensor for each in items for tensor in _tensors(each)]


def _notes(section: OptimizerSection, schedule: ScheduleSection, averages: bool) -> tuple[str, ...]:
    if schedule.name == "range_test":
        return ()  # the rate is not one to train with
    notes = []
    is_prodigy = class_path(section.name).rpartition(".")[2].startswith(("Prodigy", "DAdapt"))
    if is_prodigy and section.lr < 0.1:
        notes.append(
            f"optimizer.lr is a factor of this optimizer's own estimate: 1 is usual, and {section.lr:g} makes the steps "
            f"{1 / section.lr:,.0f} times smaller"
        )
    elif section.name in NAMED and not is_prodigy and section.lr >= 0.1:
        notes.append(
            f"optimizer.lr {section.lr:g} is about how far each step moves a weight: 0.00001 to 0.001 are usual, 1 is for prodigy"
        )
    if averages and schedule.name not in ("constant", "constant_with_warmup"):
        notes.append(
            f"an optimizer that averages the weights needs no decay of its rate: schedule.name is {schedule.name}"
        )
    return tuple(notes)
