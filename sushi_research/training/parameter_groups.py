"""The parameter groups of the optimizer: tensors of the adapters that are trained with one learning rate.

The rate of a group is that of the schedule times its factor, the product of

    own rate / optimizer.lr     of a component with a learning rate of its own (`Own.lr`)
    lr_factor                   of the last entry of lora.overrides that fits the layer
    lora_plus_ratio             of the matrices that are applied second, if it is set (LoRA+, arXiv 2402.12354)

A group whose component has an end step (`Own.until`) has a rate of zero from then on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from sushi_research.config import TrainingConfig

# Beginnings of the names of tensors that do not belong to the UNet, whose names have no prefix.
_OTHER_COMPONENTS = ("text_encoder", "text_encoder_2")
# The name of the second matrix of a pair, which starts at zero: B in peft's words, `lora_up` in kohya's.
_SECOND = ".lora_B."


@dataclass(frozen=True)
class Own:
    """What a component has instead of the run's: a learning rate (None: optimizer.lr), and the number of steps that it is
    trained for (None: all)."""

    lr: float | None = None
    until: int | None = None


@dataclass(frozen=True)
class Group:
    """Tensors by name, the factor of their learning rate, and the number of steps that they are trained for (None: all).

    `label` is the group's name in metrics and in the plan, such as `unet`, `unet_up` (LoRA+) or `unet_x0.5` (an override).
    """

    names: tuple[str, ...]
    lr_factor: float
    component: str
    label: str
    until: int | None = None

    def has_ended(self, step: int) -> bool:
        """Whether the group is not trained any more in the step of this number, from 0."""
        return self.until is not None and step >= self.until

    def rate(self, rate: float, step: int) -> float:
        """The learning rate in the step of this number, from 0, where that of the schedule is `rate`."""
        return 0.0 if self.has_ended(step) else rate * self.lr_factor


def groups_of(
    names: Iterable[str], config: TrainingConfig, own: Mapping[str, Own] = MappingProxyType({})
) -> list[Group]:
    """The groups of an adapter's tensors, which have the names that checkpoints use; `own` is by component.

    Both groups and names keep their order, so a run without any of these settings has one group, and the tensors' order.
    """
    found: dict[str, list[str]] = {}
    groups: dict[str, Group] = {}
    for name in names:
        component = component_of(name)
        settings = own.get(component, Own())
        factor = 1.0 if settings.lr is None else settings.lr / config.optimizer.lr
        label = component
        if config.optimizer.lora_plus_ratio != 1 and _SECOND in name:
            factor *= config.optimizer.lora_plus_ratio
            label += "_up"
        found.setdefault(label, []).append(name)
        groups[label] = Group((), factor, component, label, settings.until)
    return [
        Group(tuple(found[label]), group.lr_factor, group.component, label, group.until)
        for label, group in groups.items()
    ]


def component_of(name: str) -> str:
    """The component of a tensor, by its name in checkpoints."""
    first = name.partition(".")[0]
    return first if first in _OTHER_COMPONENTS else "unet"


def differ(groups: Sequence[Group]) -> bool:
    """Whether the groups have other learning rates than each other, in some step."""
    return len({(group.lr_factor, group.until) for group in groups}) > 1


@dataclass(frozen=True)
class Rates:
    """The learning rates of a run, before the schedule's factor: optimizer.lr, and the groups that have others."""

    lr: float
    groups: tuple[Group, ...]

    def to_json(self) -> list[dict[str, Any]]:
        """The label, learning rate, number of tensors and end step of each group."""
        return [
            {"group": each.label, "lr": self.lr * each.lr_factor, "tensors": len(each.names), "until": each.until}
            for each in self.groups
        ]

    def describe(self) -> list[str]:
        """The line of a plan, if there are several rates."""
        if not differ(self.groups):
            return []
        parts = [
            f"{each.label} {self.lr * each.lr_factor:.4g}{'' if each.until is None else f' for {each.until} steps'}"
            for each in self.groups
        ]
        return [f"rates        {', '.join(parts)} (before the schedule's factor)"]
