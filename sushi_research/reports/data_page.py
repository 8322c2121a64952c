"""The page about a data set: what a training would do with each image and caption (scripts/inspect_data.py)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute

from sushi_research.data import near_duplicates
from sushi_research.data.samples import Samples
from sushi_research.data.training_data import Data
from sushi_research.errors import printable
from sushi_research.reports import data_captions, data_pictures
from sushi_research.reports.data_captions import Length
from sushi_research.reports.data_uses import Use, Uses, spread, uses_of
from sushi_research.reports.decoded_images import DecodedImage
from sushi_research.reports.page import Block, Card, Picture, to_html

# What is shown of a large data set: pictures in all and of one bucket, rows of the table, groups of copies, tags.
MOST_PICTURES, MOST_IN_BUCKET, MOST_ROWS, MOST_GROUPS, MOST_TAGS = 240, 24, 500, 24, 60
# Of one group of copies, and of held-out images.
MOST_COPIES, MOST_HELD_OUT = 6, 24
# More problems or notes than these are folded.
MOST_ITEMS = 12
# Each image is compared with all others: seconds for so many.
MOST_COMPARED = 8_000
# Of the distinct captions, so many are counted and tokenized: about a minute.
MOST_CAPTIONS = 100_000


@dataclass(frozen=True)
class Shown:
    """What the page is made of. `decoded` is empty without a base, `tokenizers` if there are none; `without` says it."""

    title: str
    data: Data
    tokenizers: Sequence[Any] = ()
    decoded: Sequence[DecodedImage] = ()
    without: Sequence[str] = ()
    show_progress: bool = False

    @functools.cached_property
    def uses(self) -> Uses:
        return uses_of(self.data.items)

    @property
    def samples(self) -> Samples:
        """The samples that are trained on."""
        return self.data.items.samples

    @functools.cached_property
    def captions(self) -> dict[str, int]:
        """Every distinct caption that is trained on -> its number of images; of very many, the first MOST_CAPTIONS."""
        counts = pyarrow.compute.value_counts(self.samples.first_captions).flatten()
        return dict(zip(*(column[:MOST_CAPTIONS].to_pylist() for column in counts), strict=True))

    @functools.cached_property
    def lengths(self) -> dict[str, Length]:
        """The length of each of `captions`; {} without tokenizers."""
        return data_captions.lengths_of(list(self.captions), self.tokenizers)


def html(shown: Shown) -> str:
    """The page as one HTML file."""
    return to_html(blocks(shown), f"{printable(shown.title)}: the data")


def blocks(shown: Shown) -> list[Block]:
    """The page."""
    data = shown.data
    written = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    parts: list[tuple[str, list[Block]]] = [
        ("Problems", _folded(f"{each.name}: {each.reason}" for each in data.problems)),
        ("Notes", _folded(data.notes)),
        ("Buckets", _buckets(shown)),
        ("Copies", _copies(shown)),
        ("Captions", _captions(shown)),
        ("What the network sees", _seen(shown)),
        ("Held-out images", _held_out(shown)),
        ("Each image", _table(shown)),
    ]
    body = [block for title, found in parts if found for block in [Block("heading", title), *found]]
    return [
        Block("title", printable(shown.title)),
        Block("lead", f"What a training does with the images and captions of {data.scan.source}. Written {written}."),
        Block("cards", cards=_cards(shown)),
        *([Block("warning", items=list(shown.without))] if shown.without else []),
        Block("contents"),
        *body,
    ]


def _cards(shown: Shown) -> list[Card]:
    data, uses = shown.data, shown.uses
    images, count = len(np.unique(shown.samples.images)), len(data.items)
    cards = [
        Card("images", f"{images:,}", f"used {count:,} times in an epoch"),
        Card(
            "problems",
            f"{len(data.problems):,}",
            "files or rows that are not used" if data.problems else "all are used",
        ),
        Card("buckets", f"{len(uses.buckets()):,}", f"{int((uses.scales > 1).sum()):,} images are enlarged"),
    ]
    if shown.lengths:
        long = sum(length.chunks > 1 for length in shown.lengths.values())
        most = max(length.tokens for length in shown.lengths.values())
        detail = (
            f"of {len(shown.lengths):,} are longer than 75 tokens" if long else f"the longest has {most} tokens of 75"
        )
        cards.append(Card("captions cut" if long else "captions", f"{long or len(shown.lengths):,}", detail))
    if data.held_out:
        cards.append(Card("held out", f"{len(data.held_out):,}", "not trained on, for evaluation"))
    return cards


def _buckets(shown: Shown) -> list[Block]:
    """A table of the buckets, then a contact sheet of each."""
    uses = shown.uses
    buckets = uses.buckets()
    rows = [["bucket", "images", "uses in an epoch", "share", "enlarged", "most enlarged", "mean cut", "largest cut"]]
    for name, places in buckets:
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
    per_bucket = max(2, min(MOST_IN_BUCKET, MOST_PICTURES // max(1, len(buckets))))
    sheets = buckets[: MOST_PICTURES // per_bucket]
    chosen = {
        name: [uses[places.start + place] for place in spread(places.stop - places.start, per_bucket)]
        for name, places in sheets
    }
    wanted = [use for found in chosen.values() for use in found]
    made = data_pictures.make(
        [functools.partial(data_pictures.picture_of, use.sample, use.geometry) for use in wanted], shown.show_progress
    )
    pictures = iter(made)
    found = [
        Block("text", "The frame is the crop; what is paler is cut away. Tap a picture's text to read all of it."),
        Block("table", rows=rows),
    ]
    for name, places in sheets:
        count = places.stop - places.start
        some_of_them = f", {len(chosen[name])} of them are shown" if count > len(chosen[name]) else ""
        captions = [(use, next(pictures)) for use in chosen[name]]
        captions.sort(key=lambda pair: pair[0].sample.name)
        text = f"{name}: {count:,} image{'s' if count > 1 else ''}{some_of_them}"
        found.append(
            Block("pictures", text, pictures=[Picture(source, _words(shown, use)) for use, source in captions])
        )
    if len(buckets) > len(sheets):
        found.append(Block("text", f"{len(buckets) - len(sheets):,} smaller buckets are in the table only."))
    return found


def _words(shown: Shown, use: Use) -> str:
    """What is said below the picture of an image."""
    geometry = use.geometry
    size = f"{geometry.original_width}x{geometry.original_height}"
    change = f"enlarged to {use.scale:.0%}" if use.scale > 1 else f"reduced to {use.scale:.0%}" if use.scale < 1 else ""
    words = [f"{size} {change}".strip()]
    if use.count > 1:
        words.insert(0, f"{use.count} uses")
    if geometry.cut_away >= 0.0005:
        words.append(f"{geometry.cut_away:.1%} cut away")
    if length := shown.lengths.get(use.sample.caption):
        words.append(f"{length.tokens} tokens" + (f", {length.cut(1)} cut" if length.cut(1) else ""))
    return f"{use.sample.name}\n{' · '.join(words)}\n{use.sample.caption}"


def _copies(shown: Shown) -> list[Block]:
    """Groups of equal and of similar images."""
    samples = shown.samples
    hashes, first, copy_of, counts = np.unique(
        samples.images, return_index=True, return_inverse=True, return_counts=True
    )
    equal = [np.flatnonzero(copy_of == place) for place in np.flatnonzero(counts > 1)[:MOST_GROUPS]]
    blocks = _groups(shown, equal, int((counts > 1).sum()), "files of the same image")
    if len(hashes) > MOST_COMPARED:
        text = f"Similar images are searched for among at most {MOST_COMPARED:,} images, and these are {len(hashes):,}."
        return [*blocks, Block("text", text)]
    rows = dict(zip(hashes.astype(str).tolist(), first.tolist(), strict=True))
    fingerprints = {image: samples[row].fingerprint for image, row in rows.items()}
    groups = near_duplicates.near_duplicate_groups(fingerprints)
    alike = [np.array([rows[image] for image in group]) for group in groups if len(group) > 1]
    return [*blocks, *_groups(shown, alike, len(alike), "similar images")]


def _groups(shown: Shown, groups: Sequence[np.ndarray], count: int, what: str) -> list[Block]:
    """Pictures of each group of samples, given as row numbers. `count` is the number of groups, of which some may not be given."""
    groups = sorted(groups, key=lambda group: -len(group))[:MOST_GROUPS]
    members = [[shown.samples[row] for row in group[:MOST_COPIES].tolist()] for group in groups]
    wanted = [functools.partial(data_pictures.picture_of, sample) for group in members for sample in group]
    pictures = iter(data_pictures.make(wanted, shown.show_progress))
    found = []
    for whole, group in zip(groups, members, strict=True):
        more = f", {len(group)} of them are shown" if len(whole) > len(group) else ""
        shown_here = [Picture(next(pictures), f"{sample.name}: {sample.caption}") for sample in group]
        found.append(Block("series", f"{len(whole)} {what}{more}", pictures=shown_here))
    if count > len(groups):
        found.append(Block("text", f"{count - len(groups):,} more groups of {what} are not shown."))
    return found


def _captions(shown: Shown) -> list[Block]:
    """Frequent tags or words, and the captions that are too long."""
    tags, words = data_captions.frequencies(shown.captions)
    found: list[Block] = []
    long = sorted(
        ((length, caption) for caption, length in shown.lengths.items() if length.chunks > 1),
        key=lambda pair: (-pair[0].tokens, pair[1]),
    )
    if long:
        found.append(Block("text", f"{len(long):,} of {len(shown.lengths):,} captions are cut after 75 tokens:"))
        items = [f"{length.tokens} tokens, {length.chunks} chunks: {caption}" for length, caption in long]
        found += _folded(items)
    for counted, name in ((tags, "tag"), (words, "word")):
        if counted:
            most = counted.most_common(MOST_TAGS)
            total = f"{len(counted):,} different {name}s"
            if len(counted) > len(most):
                total += f", the {len(most)} most frequent"
            found.append(
                Block("details", f"{total}: images with each", items=[f"{count:>6,}  {text}" for text, count in most])
            )
    return found


def _seen(shown: Shown) -> list[Block]:
    if not shown.decoded:
        return []
    errors = [each.mean_error for each in shown.decoded]
    text = (
        "The network gets latents, not pixels. Each image is encoded and decoded by the base's VAE: what is lost there, no "
        f"training learns. The mean error is {np.mean(errors):.1f} of 255."
    )
    return [Block("text", text), *data_pictures.decoded_blocks(shown.decoded)]


def _held_out(shown: Shown) -> list[Block]:
    held = shown.data.held_out
    if not held:
        return []
    chosen = [held[place] for place in spread(len(held), MOST_HELD_OUT)]
    wanted = [functools.partial(data_pictures.picture_of, item.sample, item.geometry) for item in chosen]
    pictures = [
        Picture(source, f"{item.sample.name}\n{item.sample.caption}")
        for item, source in zip(chosen, data_pictures.make(wanted, shown.show_progress), strict=True)
    ]
    some_of_them = f" {len(chosen)} of {len(held):,} are shown." if len(held) > len(chosen) else ""
    return [
        Block("text", f"They are not trained on; the validation loss is measured on them.{some_of_them}"),
        *([Block("warning", items=list(shown.data.near_duplicates))] if shown.data.near_duplicates else []),
        Block("pictures", pictures=pictures),
    ]


def _table(shown: Shown) -> list[Block]:
    """A row for each image and crop geometry."""
    uses = shown.uses
    found = sorted((uses[place] for place in spread(len(uses), MOST_ROWS)), key=lambda use: use.sample.name)
    head = ["image", "uses", "pixels", "bucket", "scale", "cut away"]
    rows = [head + (["tokens", "chunks", "tokens cut"] if shown.lengths else [])]
    for use in found:
        geometry = use.geometry
        row = [
            use.sample.name, str(use.count), f"{geometry.original_width}x{geometry.original_height}", use.bucket,
            f"{use.scale:.2f}", f"{geometry.cut_away:.1%}",
        ]  # fmt: skip
        if shown.lengths:
            length = shown.lengths.get(use.sample.caption)
            row += [str(length.tokens), str(length.chunks), str(length.cut(1) or "-")] if length else ["?"] * 3
        rows.append(row)
    text = [Block("text", f"{len(found):,} of {len(uses):,}, evenly chosen.")] if len(found) < len(uses) else []
    return [*text, Block("table", rows=rows)]


def _folded(items: Any) -> list[Block]:
    """A list of sentences, of which all but the first are folded if there are many."""
    items = list(items)
    if not items:
        return []
    found = [Block("list", items=items[:MOST_ITEMS])]
    if items[MOST_ITEMS:]:
        found.append(Block("details", f"{len(items) - MOST_ITEMS:,} more", items=items[MOST_ITEMS:]))
    return found
