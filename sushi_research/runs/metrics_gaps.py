"""Steps whose lines metrics.jsonl has lost, and the line that marks them.

`{"step": 5, "missing_from": 3}` stands where the lines of the optimizer steps 3 to 5 were. It is written when a run continues, or
goes on, with a file that lost lines. Readers then know that the file is otherwise whole: curves have a gap, and what is summed over
the steps is not known from there on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MARK = "missing_from"


def is_trained(line: dict[str, Any]) -> bool:
    """Whether an optimizer step wrote the line; the others are evaluations and marks."""
    return "images_per_second" in line or "loss" in line


def marked(lines: Sequence[dict[str, Any]]) -> list[range]:
    """The steps that the marks in `lines` name."""
    return [range(line[MARK], line["step"] + 1) for line in lines if MARK in line]


def unmarked(lines: Sequence[dict[str, Any]], last: int) -> list[range]:
    """The steps from 1 to `last` that have neither the line of an optimizer step nor a mark, as ranges."""
    known = {line["step"] for line in lines if is_trained(line)}
    known = known.union(*(range(gap.start, min(gap.stop, last + 1)) for gap in marked(lines)))
    found: list[range] = []
    for step in range(1, last + 1):
        if step in known:
            continue
        if found and found[-1].stop == step:
            found[-1] = range(found[-1].start, step + 1)
        else:
            found.append(range(step, step + 1))
    return found


def with_marks(lines: Sequence[dict[str, Any]], gaps: Sequence[range]) -> list[dict[str, Any]]:
    """`lines` with a mark for each of `gaps`, before the lines of later steps."""
    marks = [{"step": gap[-1], MARK: gap[0]} for gap in gaps]
    return sorted([*lines, *marks], key=lambda line: line["step"])  # a stable sort


def describe(gaps: Sequence[range]) -> str:
    """The steps in words: "step 3" or "steps 3 to 5, 8"."""
    parts = [str(gap[0]) if len(gap) == 1 else f"{gap[0]} to {gap[-1]}" for gap in gaps]
    more = f" and {len(parts) - 4} more gaps" if len(parts) > 4 else ""
    return f"step{'s' if sum(map(len, gaps)) > 1 else ''} {', '.join(parts[:4])}{more}"
