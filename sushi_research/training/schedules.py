"""The learning rate as a function of the optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from sushi_research.config import TrainingConfig
from sushi_research.config.section import steps_text
from sushi_research.errors import UserError, nearest

# Those of diffusers' get_scheduler, and ours.
OF_DIFFUSERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
SCHEDULES = (*OF_DIFFUSERS, "rex", "wsd", "inverse_sqrt", "range_test")
Factor = Callable[[int], float]


def of_run(config: TrainingConfig, steps: int, warmup: int, decay: int = 0) -> Callable[[int], float]:
    """The learning rate of a run of `steps` steps by its config (`make_schedule`). `warmup` and `decay` are in steps."""
    return make_schedule(
        config.schedule.name,
        lr=config.optimizer.lr,
        total_steps=steps,
        warmup=warmup,
        cycles=config.schedule.cycles,
        power=config.schedule.power,
        decay=decay,
        timescale=config.schedule.timescale,
        span=config.schedule.span,
    )


def make_schedule(
    name: str,
    *,
    lr: float,
    total_steps: int,
    warmup: int,
    cycles: int = 1,
    power: float = 1.0,
    decay: int = 0,
    timescale: int | None = None,
    span: float = 1.0,
) -> Callable[[int], float]:
    """The learning rate as a function of the optimizer step (0 to total_steps - 1).

    The values equal those of diffusers' `get_scheduler`, for wsd and inverse_sqrt those of transformers' `get_wsd_schedule` and
    `get_inverse_sqrt_schedule`, when these are stepped once per optimizer step. But the function has no state: there is nothing to
    save, and the number of processes does not matter (accelerate steps a prepared scheduler once per process).

    `warmup` is in steps and ends within the run (`length.warmup_steps`); it must be 0 for constant and range_test. `cycles` is for
    cosine_with_restarts, `power` for polynomial, `decay` in steps for wsd, `timescale` in steps for inverse_sqrt (None: the
    warm-up), `span` for range_test.

    Raises UserError for an unknown name or invalid values.
    """
    if name not in SCHEDULES:
        raise UserError(f"{name} is not a schedule{nearest(name, SCHEDULES)}: choose from {', '.join(SCHEDULES)}.")
    assert name not in ("constant", "range_test") or warmup == 0, "the warm-up would silently be ignored"
    assert 0 <= warmup < total_steps, f"a warm-up of {warmup} steps in a run of {total_steps}"
    if name == "rex":
        factor: Factor = partial(_rex, total_steps=total_steps, warmup=warmup)
    elif name == "wsd":
        factor = _wsd(total_steps, warmup, decay)
    elif name == "inverse_sqrt":
        factor = _inverse_sqrt(warmup, timescale)
    elif name == "range_test":
        factor = partial(_range_test, total_steps=total_steps, span=span)
    else:
        factor = _of_diffusers(name, lr, total_steps, warmup, cycles, power)
    return lambda step: lr * factor(step)


def _of_diffusers(name: str, lr: float, total_steps: int, warmup: int, cycles: int, power: float) -> Factor:
    from diffusers.optimization import get_scheduler

    try:
        scheduler = get_scheduler(
            name,
            _no_optimizer(lr),
            num_warmup_steps=warmup,
            num_training_steps=total_steps,
            num_cycles=cycles,
            power=power,
        )
    except ValueError as error:
        raise UserError(f"the schedule {name} refuses its values ({error}): correct it or optimizer.lr.") from error
    return scheduler.lr_lambdas[0]


def _rex(step: int, *, total_steps: int, warmup: int) -> float:
    """REX (arXiv 2107.04197, section 4): (1 - z) / (1/2 + 1/2 (1 - z)), z the share of the steps after a linear warm-up."""
    if step < warmup:
        return step / warmup
    rest = 1 - (step - warmup) / (total_steps - warmup)
    return rest / (0.5 + 0.5 * rest)


def _wsd(total_steps: int, warmup: int, decay: int) -> Factor:
    """Linear warm-up, the whole rate, and a decay by 1 - sqrt(its share) (arXiv 2405.18392, equation 1 and section 3.2).

    That shape, there "(1-sqrt)", is the best of those that the paper compares (appendix B.1).
    """
    from transformers.optimization import get_wsd_schedule

    assert decay > 0 and warmup + decay <= total_steps, f"{warmup} + {decay} steps in a run of {total_steps}"
    scheduler = get_wsd_schedule(
        _no_optimizer(1.0),
        num_warmup_steps=warmup,
        num_decay_steps=decay,
        num_training_steps=total_steps,
        decay_type="1-sqrt",
    )
    return scheduler.lr_lambdas[0]


def _inverse_sqrt(warmup: int, timescale: int | None) -> Factor:
    """Linear warm-up, then 1 / sqrt(1 + (steps after it) / timescale), in transformers from big_vision (arXiv 2106.04560)."""
    from transformers.optimization import get_inverse_sqrt_schedule

    if timescale is None and warmup == 0:
        raise UserError(
            "schedule.timescale is not set, and inverse_sqrt has no warm-up that it could be as long as: set schedule.timescale "
            "(the rate is optimizer.lr / sqrt(2) after so many steps) or schedule.warmup."
        )
    scheduler = get_inverse_sqrt_schedule(_no_optimizer(1.0), num_warmup_steps=warmup, timescale=timescale or warmup)
    return scheduler.lr_lambdas[0]


def _range_test(step: int, *, total_steps: int, span: float) -> float:
    """An exponential rise from 1 / span to 1 (arXiv 1506.01186, section 3.3, which raises it linearly)."""
    if total_steps < 2:
        raise UserError(f"the schedule range_test has no range in {steps_text(total_steps)}: make the run longer.")
    return span ** (step / (total_steps - 1) - 1)


def _no_optimizer(lr: float) -> torch.optim.Optimizer:
    """One for the functions that ask for an optimizer."""
    return torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=lr)
