"""Builds the optimizer by name, and the learning rate as a function of the optimizer step."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from sushi_research.errors import UserError, nearest

OPTIMIZERS = {"adamw8bit": "bitsandbytes.optim.AdamW8bit", "adamw": "torch.optim.AdamW"}
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


def build_optimizer(
    name: str, parameters: Iterable[nn.Parameter], lr: float, kwargs: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """The optimizer `adamw8bit`, `adamw` or `module.Class`, with the further arguments `kwargs`.

    AdamW uses its fused kernel on CUDA and the foreach implementation elsewhere. AdamW8bit keeps fp32 state for tensors
    with fewer than 4,096 elements.

    Raises UserError for an unknown optimizer, for an unknown argument (naming the nearest one), and for invalid values.
    """
    optimizer_class = _optimizer_class(name)
    parameters = list(parameters)
    known = inspect.signature(optimizer_class).parameters
    if "lr" not in known:
        raise UserError(f"the optimizer {name} takes no lr: choose another one.")
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        allowed = [argument for argument in known if argument not in ("params", "lr")]
        for argument in kwargs:
            if argument not in allowed:
                raise UserError(
                    f"the optimizer {name} has no argument {argument}{nearest(argument, allowed)}: "
                    f"it takes {', '.join(allowed)}."
                )
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in kwargs.items()}
    if name == "adamw" and not {"fused", "foreach"} & set(arguments):
        on_cuda = all(parameter.device.type == "cuda" for parameter in parameters)
        arguments["fused" if on_cuda else "foreach"] = True
    try:
        return optimizer_class(parameters, lr=lr, **arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"the optimizer {name} refuses its arguments ({error}): correct optimizer.kwargs.") from error


def make_schedule(
    name: str, *, lr: float, total_steps: int, warmup: int | float, cycles: int = 1, power: float = 1.0
) -> Callable[[int], float]:
    """The learning rate as a function of the optimizer step (0 to total_steps - 1), with the schedules of diffusers.

    The values equal those of diffusers' `get_scheduler` when it is stepped once per optimizer step. But the function has
    no state: there is nothing to save, and the number of processes does not matter (accelerate steps a prepared
    scheduler once per process). `warmup` is a number of steps (int) or a fraction of the run (float below 1, rounded up
    to whole steps); it must be 0 for constant. `cycles` is for cosine_with_restarts, `power` for polynomial.

    Raises UserError for an unknown name or invalid values.
    """
    from diffusers.optimization import get_scheduler

    if name not in SCHEDULES:
        raise UserError(f"{name} is not a schedule{nearest(name, SCHEDULES)}: choose from {', '.join(SCHEDULES)}.")
    warmup_steps = math.ceil(warmup * total_steps) if isinstance(warmup, float) else warmup
    assert name != "constant" or warmup_steps == 0, "get_scheduler would silently ignore the warm-up"
    if not 0 <= warmup_steps < total_steps:
        raise UserError(f"a warm-up of {warmup_steps} steps does not end within the {total_steps} steps of the run.")
    try:
        scheduler = get_scheduler(
            name,
            torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=lr),
            num_warmup_steps=warmup_steps,
            num_training_steps=total_steps,
            num_cycles=cycles,
            power=power,
        )
    except ValueError as error:
        raise UserError(f"the schedule {name} refuses its values ({error}): correct it or optimizer.lr.") from error
    factor = scheduler.lr_lambdas[0]
    return lambda step: lr * factor(step)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> float:
    """Sets the learning rate of every parameter group and returns it."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def _optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    module_name, _, class_name = OPTIMIZERS.get(name, name).rpartition(".")
    if not module_name:
        raise UserError(
            f"{name} is not an optimizer{nearest(name, OPTIMIZERS)}: choose from {', '.join(OPTIMIZERS)}, or give the "
            "import path of a class, such as torch.optim.SGD."
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"the optimizer {name} cannot be imported ({error}): install or correct it.") from error
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        classes = [
            key
            for key, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
        ]
        raise UserError(f"{name} is no torch optimizer class{nearest(class_name, classes)}: correct optimizer.name.")
    arguments = list(inspect.signature(found.step).parameters.values())[1:]
    if any(a.default is a.empty and a.kind in (a.POSITIONAL_ONLY, a.POSITIONAL_OR_KEYWORD) for a in arguments):
        raise UserError(f"the step of the optimizer {name} needs arguments (as LBFGS does): choose another one.")
    return found
