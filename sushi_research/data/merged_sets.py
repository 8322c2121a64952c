"""Several sets of images as one: their samples, problems and notes, with names that say which set they are from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePath

import numpy as np

from sushi_research.config.sets import ResolvedSet
from sushi_research.data import near_search
from sushi_research.data.samples import Samples
from sushi_research.data.scan import Crop, Problem, Scan
from sushi_research.data.uses import uses_of


def merged(scans: Sequence[Scan], sets: Sequence[ResolvedSet]) -> Scan:
    """The scans of the sets as one. That of a single set stays as it is; of several, names begin with the folder of their set."""
    if len(scans) == 1:
        return scans[0]
    folders = folder_names([each.path for each in sets])
    result = Scan(source=", ".join(dict.fromkeys(scan.source for scan in scans)))
    parts = []
    for number, (scan, folder) in enumerate(zip(scans, folders, strict=True)):
        parts.append(Samples.of(scan.samples).in_set(number, folder))
        problems = [Problem(f"{folder}/{each.name}", each.reason) for each in scan.problems]
        # A folder may be in two sets. Its files have the same problems in both.
        result.problems = list(dict.fromkeys([*result.problems, *problems]))
        result.cropped += [Crop(f"{folder}/{each.name}", each.lost, each.bucket) for each in scan.cropped]
        result.notes += [f"{folder}: {note}" for note in scan.notes if f"{folder}: {note}" not in result.notes]
        result.skipped += scan.skipped
        result.ignored += scan.ignored
        result.sets.append({"path": scan.source, "images": len(scan.samples), "problems": len(scan.problems)})
    samples = Samples.concat(parts)
    result.samples = samples.take(samples.by_content())
    result.cropped.sort(key=lambda crop: (-crop.lost, crop.name))
    result.is_table = all(scan.is_table for scan in scans)
    return result


def folder_names(paths: Sequence[str]) -> list[str]:
    """For each path its last part, or as many of its last parts as tell it from the other paths."""
    absolute = [PurePath(os.path.abspath(path)).parts for path in paths]
    found = []
    for parts in absolute:
        others = {other for other in absolute if other != parts}
        length = next(
            (n for n in range(1, len(parts)) if all(other[-n:] != parts[-n:] for other in others)), len(parts)
        )
        found.append("/".join(parts[-length:]).replace("//", "/"))
    return found


def count_uses(scan: Scan, sets: Sequence[ResolvedSet]) -> Samples:
    """The samples with how often an epoch uses each of them (`uses_of`). A note names regularisation images that are not used."""
    samples = Samples.of(scan.samples)
    uses = uses_of(samples, sets)
    for each in sets:
        unused = int(((samples.sets == each.index) & (uses == 0)).sum())
        if unused:
            scan.notes.append(
                f"{unused} of the {int((samples.sets == each.index).sum())} images of {each.place} "
                f"{'is' if unused == 1 else 'are'} not used, because there are fewer training images: "
                "give that set repeats or a weight to use more of them"
            )
    return replace(samples, repeats=uses) if np.any(uses != samples.repeats) else samples


def regularisation_images(scan: Scan, sets: Sequence[ResolvedSet]) -> np.ndarray:
    """The content hashes [n] HASH of the images that are only in sets whose role is regularisation."""
    of_role = [each.index for each in sets if each.is_regularisation]
    samples = Samples.of(scan.samples)
    if not of_role:
        return samples.images[:0]
    inside = np.isin(samples.sets, of_role)
    images = samples.images[inside]
    return images[near_search.rows_of(images, samples.images[~inside]) < 0]
