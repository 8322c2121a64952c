"""The parameter groups of the optimizer: tensors of the adapters that are trained with one learning rate.

The rate of a group is that of the schedule times its factor, the product of

    own rate / optimizer.lr     of a component with a learning rate of its own (`Own.lr`), or of new tokens
    lr_factor                   of the last entry of lora.overrides that fits the module and has one
    lora_plus_ratio             of the matrices that are applied second, if it is set (LoRA+, arXiv 2402.12354)

A group whose component has an end step (`Own.until`) stays as it is from then on, and one with a factor of 0 from the start.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from sushi_research.adapters import tensor_names
from sushi_research.adapters.settings import fits
from sushi_research.config import TrainingConfig
from sushi_research.config.section import steps_text
from sushi_research.errors import UserError

# The second matrix of a pair, which starts at zero: B in peft's words, `lora_up` in kohya's.
_SECOND = "lora_B.weight"


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
    """The groups of an adapter's tensors, which have the names that checkpoints use; `own` is by component, and for new tokens
    under `tensor_names.NEW_TOKENS`.

    Both groups and names keep their order, so a run without any of these settings has one group, and the tensors' order.
    """
    names_of: dict[str, list[str]] = {}
    groups: dict[str, Group] = {}
    for name in names:
        tensor = tensor_names.parse(name)
        is_token = tensor.path == tensor_names.NEW_TOKENS
        label, factor = tensor_names.NEW_TOKENS if is_token else tensor.component, 1.0
        settings = own.get(label, Own())
        until = settings.until
        if settings.lr is not None:
            factor = settings.lr / config.optimizer.lr
        override = 1.0 if is_token else _override(config, tensor_names.module_name(tensor.component, tensor.path))
        if override != 1:
            label, factor = f"{label}_x{repr(override).removesuffix('.0')}", factor * override
        if config.optimizer.lora_plus_ratio != 1 and not is_token and tensor.part == _SECOND:
            label, factor = f"{label}_up", factor * config.optimizer.lora_plus_ratio
        names_of.setdefault(label, []).append(name)
        groups[label] = Group((), factor, tensor.component, label, until if factor else 0)
    return [replace(group, names=tuple(names_of[label])) for label, group in groups.items()]


def _override(config: TrainingConfig, module: str) -> float:
    """The factor that lora.overrides give a module: of the last entry that fits it and has one."""
    factors = [each.lr_factor for each in config.lora.overrides if fits(each.modules, module)]
    return next((factor for factor in reversed(factors) if factor is not None), 1.0)


def require_trained(groups: Sequence[Group], config: TrainingConfig, steps: int) -> None:
    """UserError if all groups end before the last of `steps` steps, so that nothing would be trained in the last ones, and if no
    tensor has the rate that LoRA+ gives."""
    if config.optimizer.lora_plus_ratio != 1 and not any(
        name.endswith(_SECOND) for group in groups for name in group.names
    ):
        raise UserError(
            f"optimizer.lora_plus_ratio has no effect, because a module of kind {config.lora.kind} is no pair of matrices: remove "
            "it, or set lora.kind to lora or dora."
        )
    last = max(steps if group.until is None else group.until for group in groups)
    if last < steps:
        raise UserError(
            "lora.overrides give a learning rate of 0 to all modules of the UNet, so nothing would be trained"
            f"{f' from step {last} on' if last else ''}: give some of them another lr_factor."
        )


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
            f"{each.label} {self.lr * each.lr_factor:.4g}{'' if each.until is None else f' for {steps_text(each.until)}'}"
            for each in self.groups
        ]
        return [f"rates        {', '.join(parts)} (before the schedule's factor)"]
