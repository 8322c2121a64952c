"""The length of a run. Imports no torch, so that tools can tell it without waiting."""

from __future__ import annotations

from sushi_research.config.section import MOST_STEPS
from sushi_research.errors import UserError


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
