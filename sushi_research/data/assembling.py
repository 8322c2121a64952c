"""Joins the images that were found with what was learned of them: samples in order of their content, problems, and notes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

import numpy as np
import pyarrow
import pyarrow.compute as pc

from sushi_research import caption_text
from sushi_research.data import findings
from sushi_research.data.boxes import beyond
from sushi_research.data.checking import Facts
from sushi_research.data.found import Found
from sushi_research.data.samples import Samples
from sushi_research.data.scan import Problem, Problems, Scan
from sushi_research.errors import some
from sushi_research.remembered import Array

# What notes say of transparent images.
TRANSPARENT = "transparent, and laid over white"
# The columns of samples that are remembered. The others are the same for all, or come from the source.
_COLUMNS = ("names", "images", "captions", "widths", "heights", "repeats", "fingerprints", "converted", "rows")


def assemble(result: Scan, found: Found, facts: Facts) -> None:
    """Sets the samples of a scan, and adds its problems and notes."""
    names = found.names
    result.problems = Problems.of(
        result.problems, [Problem(names[row].as_py(), reason) for row, reason in facts.texts["problem"].items()]
    )
    used = facts.usable & found.captions.is_valid().to_numpy(zero_copy_only=False)
    rows = np.flatnonzero(used)
    kept = pyarrow.array(rows)
    converted = np.zeros(len(names), bool)
    converted[list(facts.texts["converted_from"])] = True
    samples = Samples(
        names=names.take(kept),
        images=facts.images[rows],
        captions=found.captions.take(kept),
        widths=facts.widths[rows],
        heights=facts.heights[rows],
        repeats=found.repeats[rows],
        fingerprints=facts.fingerprints[rows],
        converted=converted[rows],
        sets=np.zeros(len(rows), np.int16),
        rows=rows.astype(np.int64),
        sources=(found.place.read,),
        boxes=None if found.boxes is None else found.boxes[rows],
    )
    samples = _within(result, samples)
    samples = samples.take(samples.by_content())
    result.samples = samples
    result.notes += findings.capped(_colour_notes(found, facts, used))
    result.notes += _several_lines(samples)
    result.notes += caption_text.note_replaced(_suspect_captions(samples))
    result.notes += findings.capped(_copies(samples))


def _within(result: Scan, samples: Samples) -> Samples:
    """The samples whose boxes are within their images. Of the others each is a problem."""
    if samples.boxes is None:
        return samples
    outside = beyond(samples.boxes, samples.widths, samples.heights)
    problems = []
    for row in np.flatnonzero(outside).tolist():
        size = f"{samples.widths[row]}x{samples.heights[row]}"
        left, top, right, bottom = box = samples.boxes[row].tolist()
        wrong = "has no area" if right <= left or bottom <= top else f"is not within its {size} pixels"
        reason = f"its box {box} {wrong}: left, top, right, bottom"
        problems.append(Problem(samples.names[row].as_py(), reason))
    result.problems = Problems.of(result.problems, problems)
    return samples.take(~outside)


def to_columns(result: Scan) -> dict[str, Array]:
    """The samples, problems and notes of a scan as columns; `from_columns` reads them."""
    problems = Problems.of(result.problems)
    return {
        **{name: getattr(result.samples, name) for name in _COLUMNS},
        "fingerprints": np.asarray(result.samples.fingerprints),
        **({} if result.samples.boxes is None else {"boxes": result.samples.boxes}),
        "problem_names": problems.names,
        "problem_reasons": problems.reasons,
        "notes": pyarrow.array(result.notes, pyarrow.large_string()),
    }


def from_columns(result: Scan, columns: Mapping[str, Array], read: Callable[[int], bytes]) -> None:
    """Takes up what `to_columns` gave; `read` reads the bytes of an image by its row. Problems and notes are added."""
    size = len(columns["images"])
    result.samples = Samples(
        **{name: columns[name] for name in _COLUMNS},
        sets=np.zeros(size, np.int16),
        sources=(read,),
        boxes=columns.get("boxes"),
    )
    result.problems = Problems.of(result.problems, Problems(columns["problem_names"], columns["problem_reasons"]))
    result.notes += columns["notes"].to_pylist()


def _colour_notes(found: Found, facts: Facts, used: np.ndarray) -> list[str]:
    """Notes on what was done to the colours of the used images."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for row, text in facts.texts["converted_from"].items():
        if used[row]:
            kinds[f"converted to sRGB from {text}"].append(found.names[row].as_py())
    transparent = np.flatnonzero(facts.transparent & used)
    if len(transparent):
        names = found.names.take(pyarrow.array(transparent))
        kinds[TRANSPARENT] = names.to_pylist()
    notes = [
        f"{len(names)} {'image is' if len(names) == 1 else 'images are'} {kind} (first: {min(names)})"
        for kind, names in sorted(kinds.items())
    ]
    ignored = {found.names[row].as_py(): text for row, text in facts.texts["ignored"].items() if used[row]}
    return notes + [f"{name}: {text}" for name, text in sorted(ignored.items())]


def _several_lines(samples: Samples) -> list[str]:
    """A note with the number of images that have several captions."""
    several = np.flatnonzero(pc.list_value_length(samples.captions).to_numpy() > 1)
    if not len(several):
        return []
    have = "1 image has" if len(several) == 1 else f"{len(several)} images have"
    first = pc.min(samples.names.take(pyarrow.array(several))).as_py()
    return [f"{have} several captions (first: {first}): captions.lines says which of them are used"]


def _suspect_captions(samples: Samples) -> list[tuple[str, str]]:
    """(name, caption), by name, of those captions that `caption_text.note_replaced` may have something to say about."""
    texts = samples.captions.flatten()
    suspect = pc.match_substring_regex(texts, "[^\\x00-\\x7F]|&")
    rows = pc.list_parent_indices(samples.captions).filter(suspect)
    return sorted(zip(samples.names.take(rows).to_pylist(), texts.filter(suspect).to_pylist(), strict=True))


def _copies(samples: Samples) -> list[str]:
    """A note on each image that is there several times with the same captions. Samples are sorted by image and first caption."""
    if len(samples) < 2:
        return []
    same = samples.images[1:] == samples.images[:-1]
    for row in np.flatnonzero(same).tolist():
        same[row] = samples.captions[row].as_py() == samples.captions[row + 1].as_py()
    notes = []
    # Where runs of equal neighbours start and end.
    edges = np.flatnonzero(np.diff(np.r_[0, same.astype(np.int8), 0]))
    for start, end in edges.reshape(-1, 2).tolist():
        names = samples.names[start : end + 1].to_pylist()
        notes.append(f"{some(names, 3)}: the same image with the same caption; all are used")
    return notes
