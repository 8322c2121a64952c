"""Contact sheets: the images of each bucket, copies of one another, and held-out images."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from sushi_research.data import near_search
from sushi_research.data.near_duplicates import near_duplicate_groups
from sushi_research.data.samples import Sample
from sushi_research.reports.data_page.pictures import make, picture_of
from sushi_research.reports.data_page.shown import Shown
from sushi_research.reports.data_page.uses import Use, spread
from sushi_research.reports.page import Block, Picture

# Pictures in all, and of one bucket.
MOST_PICTURES, MOST_IN_BUCKET = 240, 24
# Groups of copies, pictures of each, and held-out images.
MOST_GROUPS, MOST_COPIES, MOST_HELD_OUT = 24, 6, 24
# Of more than near_search.MOST_GROUPED images, so many are compared with all others: 20 s among a million.
MOST_COMPARED = 200


def buckets(shown: Shown) -> list[Block]:
    """A table of the buckets, then a contact sheet of each."""
    uses = shown.uses
    found = uses.buckets()
    rows = [["bucket", "images", "uses in an epoch", "share", "enlarged", "most enlarged", "mean cut", "largest cut"]]
    for name, places in found:
        counts, scales, cut = uses.counts[places], uses.scales[places], uses.cut_away[places]
        rows.append(
            [
                name,
                f"{len(counts):,}",
                f"{counts.sum():,}",
                f"{counts.sum() / uses.counts.sum():.0%}",
                f"{(scales > 1).sum():,}",
                f"x {scales.max():.2f}" if scales.max() > 1 else "-",
                f"{cut.mean():.1%}",
                f"{cut.max():.1%}",
            ]  # fmt: skip
        )
    per_bucket = max(2, min(MOST_IN_BUCKET, MOST_PICTURES // max(1, len(found))))
    sheets = found[: MOST_PICTURES // per_bucket]
    chosen = [
        [uses[places.start + place] for place in spread(places.stop - places.start, per_bucket)] for _, places in sheets
    ]
    wanted = [functools.partial(picture_of, use.sample, shown.sets, use.crops) for each in chosen for use in each]
    made = iter(make(wanted, shown.show_progress))
    blocks = [
        Block("text", "The frame is the crop; what is paler is cut away. Tap a picture's text to read all of it."),
        Block("table", rows=rows),
    ]
    if shown.samples.masks is not None:
        blocks.insert(1, Block("text", "What is red is the background of an image's mask."))
    for (name, places), each in zip(sheets, chosen, strict=True):
        count = places.stop - places.start
        words = f"{name}: {count:,} image{'s' if count > 1 else ''}"
        pictures = [(use.sample.name, Picture(next(made), _words(shown, use))) for use in each]
        pictures.sort(key=lambda pair: pair[0])
        blocks.append(
            Block("pictures", words + _shown(len(each), count), pictures=[picture for _, picture in pictures])
        )
    if len(found) > len(sheets):
        blocks.append(Block("text", f"{len(found) - len(sheets):,} smaller buckets are in the table only."))
    return blocks


def _shown(few: int, count: int) -> str:
    """What follows a number of images if only `few` of them are shown."""
    return f", {few:,} of them are shown" if few < count else ""


def _words(shown: Shown, use: Use) -> str:
    """What is said below the picture of an image."""
    geometry = use.geometry
    size = f"{geometry.original_width}x{geometry.original_height}"
    change = f"enlarged to {use.scale:.0%}" if use.scale > 1 else f"reduced to {use.scale:.0%}" if use.scale < 1 else ""
    words = [f"{size} {change}".strip()]
    if use.count > 1:
        words.insert(0, f"{use.count} uses")
    if geometry.cut_away >= 0.0005:
        by_chance = f" by one of {len(use.crops)} random crops" if len(use.crops) > 1 else ""
        words.append(f"{geometry.cut_away:.1%} cut away{by_chance}")
    if use.squeezed >= 0.0005:
        words.append(f"squeezed by {use.squeezed:.1%}")
    if tokens := shown.tokens.get(use.sample.caption):
        words.append(f"{tokens} tokens" + (f", {cut} cut" if (cut := shown.cut(tokens)) else ""))
    return f"{use.sample.name}\n{' · '.join(words)}\n{use.sample.caption}"


def copies(shown: Shown) -> list[Block]:
    """Groups of equal and of similar images."""
    samples = shown.samples
    hashes, first, copy_of, counts = np.unique(
        samples.images, return_index=True, return_inverse=True, return_counts=True
    )
    equal = [np.flatnonzero(copy_of == place) for place in np.flatnonzero(counts > 1)[:MOST_GROUPS]]
    blocks = _groups(shown, equal, int((counts > 1).sum()), "files of the same image")
    fingerprints, note = samples.fingerprints[first], []
    if len(hashes) <= near_search.MOST_GROUPED:
        rows = dict(zip(hashes.astype(str).tolist(), first.tolist(), strict=True))
        numbers = {image: samples[row].fingerprint for image, row in rows.items()}
        alike = [
            np.array([rows[image] for image in group]) for group in near_duplicate_groups(numbers) if len(group) > 1
        ]
    else:
        places = np.array(spread(len(hashes), MOST_COMPARED))
        near = near_search.first_near(fingerprints[places], fingerprints, places)
        alike = [first[[place, other]] for place, other in zip(places, near, strict=True) if other >= 0]
        note = [Block("text", f"{len(places)} of {len(hashes):,} images were compared with all others.")]
    return [*blocks, *note, *_groups(shown, alike, len(alike), "similar images")]


def _groups(shown: Shown, groups: Sequence[np.ndarray], count: int, what: str) -> list[Block]:
    """Pictures of each group of samples, given as row numbers. `count` is the number of groups, of which some may not be given."""
    groups = sorted(groups, key=lambda group: -len(group))[:MOST_GROUPS]
    members = [[shown.samples[row] for row in group[:MOST_COPIES].tolist()] for group in groups]
    made = iter(_pictures(shown, [sample for group in members for sample in group]))
    blocks = [
        Block("series", f"{len(whole)} {what}{_shown(len(group), len(whole))}", pictures=[next(made) for _ in group])
        for whole, group in zip(groups, members, strict=True)
    ]
    if count > len(groups):
        blocks.append(Block("text", f"{count - len(groups):,} more groups of {what} are not shown."))
    return blocks


def held_out(shown: Shown) -> list[Block]:
    """The held-out images, and which of them resemble a training image; [] if none is held out."""
    held = shown.data.held_out
    if not held:
        return []
    chosen = [held[place].sample for place in spread(len(held), MOST_HELD_OUT)]
    count = f"{len(held):,} image{'s' if len(held) > 1 else ''}{_shown(len(chosen), len(held))}."
    text = f"They are not trained on; the validation loss is measured on them: {count}"
    alike = list(shown.data.near_duplicates)
    return [
        Block("text", text),
        *([Block("warning", items=alike)] if alike else []),
        Block("pictures", pictures=_pictures(shown, chosen)),
    ]


def _pictures(shown: Shown, samples: Sequence[Sample]) -> list[Picture]:
    """The pictures of samples, whole."""
    made = make([functools.partial(picture_of, sample, shown.sets) for sample in samples], shown.show_progress)
    return [Picture(data, f"{sample.name}\n{sample.caption}") for data, sample in zip(made, samples, strict=True)]
