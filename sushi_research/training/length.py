"""The length of a run. Imports nothing, so that tools can tell it without torch."""

from __future__ import annotations


def steps_of(steps: int | None, epochs: int | None, items: int, global_batch_size: int) -> int:
    """The optimizer steps of a run: `steps`, or the fewest steps that use every item at least `epochs` times."""
    return steps if steps is not None else -(-epochs * items // global_batch_size)
