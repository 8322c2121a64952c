"""The pictures of a model card: samples of a run's adapter next to those of its base."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sushi_research.errors import printable
from sushi_research.reports import sample_series
from sushi_research.runs.run_folder import RunFolder
from sushi_research.sampling import plots, sample_grids

MOST_PICTURES = 6
# What would begin markup in a line of Markdown or a cell of a table.
_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|~&])")


@dataclass(frozen=True)
class Pair:
    """A sample of the adapter and, if there is one, of the base with the same prompt and seed: their paths in the repository."""

    prompt: str
    adapter: str
    base: str | None
    files: dict[str, Path]


def pairs_of(run: RunFolder, step: int) -> list[Pair]:
    """The run's samples of a step, with those of step 0, which are the base's; [] if there are none of that step.

    At most MOST_PICTURES; damaged ones are left out.
    """
    found = []
    with_adapter, base = (sample_grids.step_folder(run.samples, each) for each in (step, 0))
    has_base = step > 0 and not run.starts_from_file()
    for path in sorted(with_adapter.glob("*.png"))[:MOST_PICTURES]:
        if plots.picture_problem(path):
            continue
        prompt = sample_series.label_of(path)
        files = {f"images/{path.name}": path}
        before = base / path.name
        is_there = has_base and not plots.picture_problem(before) and sample_series.label_of(before) == prompt
        if is_there:
            files[f"images/base/{path.name}"] = before
        found.append(Pair(prompt, f"images/{path.name}", f"images/base/{path.name}" if is_there else None, files))
    return found


def picture_table(pairs: Sequence[Pair], step: int | None, sample: Mapping[str, Any]) -> str:
    """The section with the pictures; `sample` is that section of the run's config."""
    rows = ["| prompt | the base | with the adapter |", "|---|---|---|"]
    for each in pairs:
        base = f"![]({each.base})" if each.base else "-"
        rows.append(f"| {plain(each.prompt)} | {base} | ![]({each.adapter}) |")
    how = f"{sample.get('steps')} steps, guidance {sample.get('guidance')}, LoRA scale 1, the same noise in a row"
    return "\n".join(["## Pictures", "", f"Sampled at step {step} of the training: {how}.", "", *rows])


def plain(text: str, keep_lines: bool = False) -> str:
    """A text as Markdown that shows it as it is: no markup, and one line unless `keep_lines`."""
    escaped = [_MARKUP.sub(r"\\\1", printable(line)) for line in str(text).splitlines()]
    return ("\n\n" if keep_lines else " ").join(escaped)
