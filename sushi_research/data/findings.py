"""What was found in the data besides usable images, as lines for the terminal. data_report.json has all of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from sushi_research.data.scan import Problem, Scan
from sushi_research.errors import some

# How many entries each list of data_report.json has at most: a person reads no more, and a million would be written at every start.
LISTED = 10_000
# How many notes of one kind, how many problems and how many cropped images are shown.
SHOWN_NOTES, SHOWN_PROBLEMS, SHOWN_CROPS = 3, 10, 5
# An image that loses more of its area is named: neighbouring buckets differ less, so its shape is outside of them all.
LARGE_CROP = 0.2


def lines(problems: Sequence[Problem], notes: Sequence[str]) -> list[str]:
    """The problems of files that are skipped, and the notes as `summary` returns them, as lines of a plan."""
    found = [f"skipped      {len(problems)}:"] if problems else []
    found += [f"{'':<13}{problem.name}: {problem.reason}" for problem in problems[:SHOWN_PROBLEMS]]
    if len(problems) > SHOWN_PROBLEMS:
        found.append(f"{'':<13}and {len(problems) - SHOWN_PROBLEMS} more (a run's data_report.json lists them)")
    return found + [f"{'' if number else 'notes':<13}{note}" for number, note in enumerate(notes)]


def summary(scan: Scan) -> list[str]:
    """The notes of a scan, at most SHOWN_NOTES of each kind, with the number of the others; then what is cropped and ignored.

    A note is `NAME: sentence` or a sentence. Notes are of one kind if their sentences differ only in numbers.
    """
    found = []
    for notes in _by_kind(scan.notes):
        found += notes[:SHOWN_NOTES]
        if len(notes) > SHOWN_NOTES:
            found.append(f"and {len(notes) - SHOWN_NOTES} more like the last (a run's data_report.json lists them)")
    if scan.cropped:
        count = "1 image loses" if len(scan.cropped) == 1 else f"{len(scan.cropped)} images lose"
        names = [f"{crop.name} ({crop.lost:.0%}, to {crop.bucket})" for crop in scan.cropped]
        all_of_them = " (a run's data_report.json lists them)" if len(names) > SHOWN_CROPS else ""
        found.append(
            f"{count} more than {LARGE_CROP:.0%} to the crop that fits a bucket: {some(names, SHOWN_CROPS)}{all_of_them}"
        )
    if scan.ignored:
        what = "1 other file is" if scan.ignored == 1 else f"{scan.ignored} other files are"
        found.append(f"{what} ignored (neither images nor captions)")
    return found


def capped(notes: list[str]) -> list[str]:
    """The notes of a scan, at most LISTED of each kind, and a note with the number of the others."""
    if len(notes) <= LISTED:
        return notes
    found = []
    for of_kind in _by_kind(notes):
        found += of_kind[:LISTED]
        if len(of_kind) > LISTED:
            found.append(f"and {len(of_kind) - LISTED:,} more like: {of_kind[LISTED]}")
    return found


def _by_kind(notes: Iterable[str]) -> Iterable[list[str]]:
    """The notes whose sentences differ in numbers only, together."""
    kinds: dict[str, list[str]] = {}
    for note in notes:
        kinds.setdefault(re.sub(r"[0-9]+", "0", note.rpartition(": ")[2]), []).append(note)
    return kinds.values()
