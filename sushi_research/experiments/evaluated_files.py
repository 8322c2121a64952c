"""What a comparison must say about adapter files that scripts/evaluate.py measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sushi_research.errors import some
from sushi_research.reports.run_record import RunRecord


def with_distinct_names(records: Sequence[RunRecord]) -> list[RunRecord]:
    """The records, with the folder above in the name of each file that is called like another record.

    The evaluation of a run's adapter file is called like the run.
    """
    counts = Counter(record.name for record in records)
    return [
        replace(record, name=f"{record.path.resolve().parent.name}/{record.name}")
        if record.state == "file" and counts[record.name] > 1
        else record
        for record in records
    ]


def without_chosen(records: Sequence[RunRecord]) -> tuple[list[RunRecord], list[str]]:
    """The records without those files whose step was chosen on images that they were measured on, and a sentence for each of these.

    The best of several steps on some images has a lower loss there than on others, so no test result with it would hold.
    """
    kept, found = [], []
    for record in records:
        chosen = _chosen(record)
        if not chosen.get("on_these_images"):
            kept.append(record)
            continue
        found.append(
            f"{record.path} is excluded: its step {chosen.get('step')} was chosen as the best of the evaluations "
            f"up to it ({chosen.get('among')}) on these validation images, which lowers its loss on them; compare the run's last "
            "adapter, or evaluate both on images that no step was chosen on"
        )
    return kept, found


def _chosen(record: RunRecord) -> dict[str, Any]:
    """How the step of an evaluated file was chosen; {} if it was not."""
    adapter = record.entry.get("adapter")
    found = adapter.get("chosen") if record.state == "file" and isinstance(adapter, dict) else None
    return found if isinstance(found, dict) else {}


def notes_on_files(records: Sequence[RunRecord]) -> list[str]:
    """A sentence if there are files for which it is not known that they were trained on none of the validation images."""
    names = []
    for record in records:
        adapter = record.entry.get("adapter")
        if record.state == "file" and isinstance(adapter, dict) and adapter.get("validation_images_unseen") is not True:
            names.append(record.name)
    if not names:
        return []
    return [
        f"it is not known whether {some(names)} was trained on the validation images, which lowers a loss without a better result"
    ]
