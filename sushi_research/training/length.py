"""The length of a run, and of parts of it, in steps. Imports no torch, so that tools can tell it without waiting."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from sushi_research.config import TrainingConfig
from sushi_research.config.section import MOST_STEPS, steps_text
from sushi_research.errors import UserError


@dataclass(frozen=True)
class Interval:
    """The steps between two events, which may be a fraction: an epoch of 7 images is 7/2 steps of 2 samples. None = no events."""

    steps: Fraction | None

    def at(self, step: int) -> bool:
        """Whether an event is due after `step` steps: whether a multiple of the interval lies within the last of them.

        Event k is thus at the first step at or after k intervals. With the end of epoch k, each sample has been used k times.
        """
        return self.steps is not None and step // self.steps > (step - 1) // self.steps

    def count(self, after: int, to: int) -> int:
        """How many events are due at the steps from `after` + 1 to `to`."""
        if self.steps is None or to <= after:
            return 0
        steps = max(self.steps, Fraction(1))  # there is at most one event at each step
        return to // steps - after // steps


@dataclass(frozen=True)
class Due:
    """When a run saves, samples, evaluates and keeps snapshots of its averages, besides at its start and end."""

    checkpoint: Interval
    sample: Interval
    evaluation: Interval
    averages: Interval = Interval(None)


def due_of(config: TrainingConfig, steps: int, items: int, global_batch_size: int) -> Due:
    """When a run of `steps` steps of `global_batch_size` samples does these; an epoch has `items` samples."""
    given = (config.checkpoint.every, config.sample.every, config.evaluation.every)
    given += (config.ema.every if config.ema.post_hoc else None,)
    return Due(*(interval_of(every, steps, items, global_batch_size) for every in given))


def interval_of(every: int | float | str | None, steps: int, items: int, global_batch_size: int) -> Interval:
    """The interval that a config key `every` gives in a run of `steps` steps; an epoch has `items` samples."""
    return Interval(None if every is None else _exact(every, steps, items, global_batch_size))


def warmup_steps(warmup: int | float | str, steps: int, items: int, global_batch_size: int) -> int:
    """The steps of a run's warm-up, rounded up. A fraction of the run always ends within it.

    UserError if a number of steps or epochs does not.
    """
    found = math.ceil(_exact(warmup, steps, items, global_batch_size))
    if isinstance(warmup, float):
        return min(found, steps - 1)
    if found >= steps:
        given = f"{warmup}, which is {steps_text(found)}" if isinstance(warmup, str) else steps_text(warmup)
        raise UserError(
            f"schedule.warmup is {given}, and the run has {steps}: the warm-up must end within the run, so lower it (a "
            "fraction such as 0.05 always does) or make the run longer."
        )
    return found


def decay_steps(decay: int | float | str, steps: int, items: int, global_batch_size: int, warmup: int) -> int:
    """The steps of a run's last decay (`schedule.decay`), rounded up, for a run whose warm-up has `warmup` steps.

    UserError if both together are longer than the run.
    """
    found = math.ceil(_exact(decay, steps, items, global_batch_size))
    if warmup + found > steps:
        given = steps_text(decay) if isinstance(decay, int) else f"{decay}, which is {steps_text(found)}"
        raise UserError(
            f"schedule.decay is {given}, and the run has {steps}, {warmup} of them for the warm-up: lower one of the two, or make "
            "the run longer."
        )
    return found


def until_step(until: int | float | str | None, steps: int, items: int, global_batch_size: int) -> int | None:
    """The steps for which the text encoders are trained (`text_encoders.until`), rounded up; None: all.

    UserError for a number of steps or epochs that does not end within the run.
    """
    if until is None:
        return None
    found = math.ceil(_exact(until, steps, items, global_batch_size))
    if found >= steps and not isinstance(until, float):
        given = f"{until}, which is {steps_text(found)}" if isinstance(until, str) else steps_text(until)
        raise UserError(
            f"text_encoders.until is {given}, and the run has {steps}: lower it, or remove it, so that the text encoders are "
            "trained to the end."
        )
    return found if found < steps else None


def steps_of(steps: int | None, epochs: int | None, items: int, global_batch_size: int) -> int:
    """The optimizer steps of a run: `steps`, or the fewest steps that use every item at least `epochs` times.

    UserError if they are more than any run has.
    """
    if steps is not None:
        return steps
    found = -(-epochs * items // global_batch_size)
    if found > MOST_STEPS:
        raise UserError(
            f"train.epochs is {epochs:,}, which is {found:,} steps with these {items:,} items, and a run has at most "
            f"{MOST_STEPS:,}: lower it."
        )
    return found


def _exact(part: int | float | str, steps: int, items: int, global_batch_size: int) -> Fraction:
    """A part of a run in steps: a number of steps, a fraction of the run, or a text such as "0.5 epochs".

    A float is taken as the decimal number that it is written as: 0.07 of 100 steps is 7 steps, not a little more.
    """
    if isinstance(part, str):
        return Fraction(part.split()[0]) * items / global_batch_size
    return Fraction(repr(part)) * steps if isinstance(part, float) else Fraction(part)
