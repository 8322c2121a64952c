"""Builds the optimizer by name, and the learning rate as a function of the optimizer step."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sushi_research.errors import UserError, first_line, nearest
from sushi_research.training.master_weights import MasterWeights
from sushi_research.training.parameter_groups import Group

OPTIMIZERS = {"adamw8bit": "bitsandbytes.optim.AdamW8bit", "adamw": "torch.optim.AdamW"}
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


# Optimizers whose step treats every number by itself, read in their sources (torch 2.13, bitsandbytes 0.48 and 0.50, schedulefree
# 1.4): the package and the class. Not Adafactor, LAMB, LARS and Muon, whose steps depend on a tensor's norm or shape.
# bitsandbytes' AdEMAMix32bit keeps one average too few for its kernel.
_BITSANDBYTES = ("Adagrad", "Adam", "AdamW", "Lion", "RMSprop", "SGD")
_PAGED = ("Adam", "AdamW", "Lion")
ELEMENTWISE = {
    "torch": {*"ASGD Adadelta Adagrad Adam AdamW Adamax NAdam RAdam RMSprop Rprop SGD".split()},
    "bitsandbytes": {
        *(f"{name}{bits}" for name in _BITSANDBYTES for bits in ("", "8bit", "32bit")),
        *(f"Paged{name}{bits}" for name in _PAGED for bits in ("", "8bit", "32bit")),
        *(f"{paged}AdEMAMix{bits}" for paged in ("", "Paged") for bits in ("", "8bit")),
    },
    "schedulefree": {
        *(f"{name}ScheduleFree" for name in ("AdamW", "RAdam", "SGD")),
        *("AdamWScheduleFreePaper", "AdamWScheduleFreeReference", "SGDScheduleFreeReference"),
    },
}
# Arguments that make a step depend on whole tensors, with the values that do not. `min_8bit_size` speaks of single tensors.
PER_TENSOR = {
    "args": (None,),
    "block_wise": (True,),
    "max_unorm": (0, None),
    "min_8bit_size": (),
    "percentile_clipping": (100,),
}


def is_elementwise(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether the optimizer is known to treat every number by itself, so that tensors can be joined into one.

    Decided by `ELEMENTWISE` and the arguments `kwargs`, without importing anything; a class that is not known is not.
    """
    package, _, rest = OPTIMIZERS.get(name, name).partition(".")
    return rest.rpartition(".")[2] in ELEMENTWISE.get(package, ()) and all(
        kwargs[key] in harmless for key, harmless in PER_TENSOR.items() if key in kwargs
    )


def build_optimizer(
    name: str, master_weights: MasterWeights, lr: float, kwargs: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """The optimizer of the master weights: `make_optimizer` with one flat tensor per parameter group if it is elementwise.

    Its step is then a few kernels for all tensors together. Others (Adafactor, LAMB, Prodigy, Muon, a user's class) get the
    single tensors, as does bitsandbytes' with a `min_8bit_size`, which speaks of single tensors.
    """
    if is_elementwise(name, kwargs):
        groups = [[flat] for flat in master_weights.flat_parameters()]
    else:
        singles = iter(master_weights.parameters())
        groups = [[next(singles) for _ in group] for group in master_weights.groups()]
    parameters = groups[0] if len(groups) == 1 else [{"params": group} for group in groups]
    return make_optimizer(name, parameters, lr, kwargs)


def make_optimizer(
    name: str, parameters: Sequence[nn.Parameter] | Sequence[dict[str, Any]], lr: float, kwargs: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """The optimizer `adamw8bit`, `adamw` or `module.Class` of `parameters`, with the further arguments `kwargs`.

    AdamW uses its fused kernel on CUDA and the foreach implementation elsewhere. AdamW8bit keeps fp32 state for parameters
    with fewer than 4,096 numbers. An optimizer with `train()` and `eval()` is in training mode.

    Raises UserError for an unknown optimizer, for an unknown argument (naming the nearest one), and for values or tensors that
    it refuses. `optimizer_check.require_usable` finds what only a step shows.
    """
    made = optimizer_class(name)
    known = _arguments(made)
    takes_any = any(argument.kind is argument.VAR_KEYWORD for argument in known.values())
    if "lr" not in known and not takes_any:
        raise UserError(f"the optimizer {name} takes no lr: choose another one.")
    if not takes_any:
        allowed = [argument for argument in known if argument not in ("params", "lr")]
        for argument in kwargs:
            if argument not in allowed:
                raise UserError(
                    f"the optimizer {name} has no argument {argument}{nearest(argument, allowed)}: "
                    f"it takes {', '.join(allowed)}."
                )
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in kwargs.items()}
    if name == "adamw" and not {"fused", "foreach"} & set(arguments):
        first = parameters[0]["params"][0] if isinstance(parameters[0], dict) else parameters[0]
        on_cuda = first.device.type == "cuda"
        arguments["fused" if on_cuda else "foreach"] = True
    try:
        optimizer = made(parameters, lr=lr, **arguments)
        if averages_weights(optimizer):
            optimizer.train()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # each library raises its own
        raise UserError(
            f"the optimizer {name} refuses its arguments ({first_line(error)}): correct optimizer.lr and optimizer.kwargs, or "
            "choose another optimizer.name or other lora.targets."
        ) from error
    return optimizer


def averages_weights(optimizer: torch.optim.Optimizer | type[torch.optim.Optimizer]) -> bool:
    """Whether the optimizer or the class has `train()` and `eval()`, as those of the package schedulefree have.

    In training mode the weights are where gradients are to be computed; `eval()` puts the averaged weights, the result, in
    their place (arXiv 2405.15682).
    """
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


@contextlib.contextmanager
def averaged_weights(optimizer: torch.optim.Optimizer, master_weights: MasterWeights) -> Iterator[None]:
    """A block in which the weights are those to evaluate, sample and export.

    They differ from the trained ones for an optimizer that averages them. At the end of the block the trained ones are restored
    from a copy, because computing them back from the averages would round them.
    """
    if not averages_weights(optimizer):
        yield
        return
    with master_weights.preserved():
        optimizer.eval()
        try:
            master_weights.refresh()
            yield
        finally:
            optimizer.train()


def make_schedule(
    name: str, *, lr: float, total_steps: int, warmup: int, cycles: int = 1, power: float = 1.0
) -> Callable[[int], float]:
    """The learning rate as a function of the optimizer step (0 to total_steps - 1), with the schedules of diffusers.

    The values equal those of diffusers' `get_scheduler` when it is stepped once per optimizer step. But the function has
    no state: there is nothing to save, and the number of processes does not matter (accelerate steps a prepared
    scheduler once per process). `warmup` is in steps and ends within the run (`length.warmup_steps`); it must be 0 for constant.
    `cycles` is for cosine_with_restarts, `power` for polynomial.

    Raises UserError for an unknown name or invalid values.
    """
    from diffusers.optimization import get_scheduler

    if name not in SCHEDULES:
        raise UserError(f"{name} is not a schedule{nearest(name, SCHEDULES)}: choose from {', '.join(SCHEDULES)}.")
    assert name != "constant" or warmup == 0, "get_scheduler would silently ignore the warm-up"
    assert 0 <= warmup < total_steps, f"a warm-up of {warmup} steps in a run of {total_steps}"
    try:
        scheduler = get_scheduler(
            name,
            torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=lr),
            num_warmup_steps=warmup,
            num_training_steps=total_steps,
            num_cycles=cycles,
            power=power,
        )
    except ValueError as error:
        raise UserError(f"the schedule {name} refuses its values ({error}): correct it or optimizer.lr.") from error
    factor = scheduler.lr_lambdas[0]
    return lambda step: lr * factor(step)


def set_learning_rate(
    optimizer: torch.optim.Optimizer, rate: float, groups: Sequence[Group] = (), step: int = 0
) -> float:
    """Sets the learning rate of every parameter group to `rate`, or to what its group of `groups` makes of it in this step.

    Returns the rate of the next step, with the optimizer's own factor, but without that of the groups. Prodigy and D-Adaptation
    multiply the rate by their estimate `d` (`step_size_estimate`). `step` counts from 0.
    """
    rates = [group.rate(rate, step) for group in groups] or [rate] * len(optimizer.param_groups)
    for group, value in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = value
    estimate = step_size_estimate(optimizer)
    return rate if estimate is None else rate * estimate


def step_size_estimate(optimizer: torch.optim.Optimizer) -> float | None:
    """The factor of the learning rate that Prodigy (arXiv 2306.06101) and D-Adaptation estimate; None for other optimizers."""
    estimate = optimizer.param_groups[0].get("d")
    is_number = type(estimate) in (int, float) or (isinstance(estimate, torch.Tensor) and estimate.numel() == 1)
    return float(estimate) if is_number else None


def _arguments(function: Any) -> Mapping[str, inspect.Parameter]:
    """The arguments by name. A function without a readable signature may take any."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {"kwargs": inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)}


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class of this name. UserError if there is none, or none that can be used."""
    module_name, _, class_name = OPTIMIZERS.get(name, name).rpartition(".")
    if not module_name:
        raise UserError(
            f"{name} is not an optimizer{nearest(name, OPTIMIZERS)}: choose from {', '.join(OPTIMIZERS)}, or give the "
            "import path of a class, such as torch.optim.SGD."
        )
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the module is the user's: running it may raise anything
        raise UserError(
            f"the optimizer {name} cannot be imported ({first_line(error)}): install or correct it."
        ) from error
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        classes = [
            key
            for key, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
        ]
        raise UserError(f"{name} is no torch optimizer class{nearest(class_name, classes)}: correct optimizer.name.")
    arguments = list(_arguments(found.step).values())[1:]
    if any(a.default is a.empty and a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD) for a in arguments):
        raise UserError(f"the step of the optimizer {name} needs arguments (as LBFGS does): choose another one.")
    return found
