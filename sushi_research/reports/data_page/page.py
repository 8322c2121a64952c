"""The page about a data set: what a training would do with each image and caption (scripts/inspect_data.py)."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

import numpy as np

from sushi_research.errors import printable, some
from sushi_research.models.truncation import CHUNK, chunks_in
from sushi_research.reports.data_page import captions, sheets
from sushi_research.reports.data_page.pictures import decoded_blocks
from sushi_research.reports.data_page.shown import Shown
from sushi_research.reports.data_page.uses import spread
from sushi_research.reports.page import Block, Card, to_html

# Rows of the table of images, images whose captions are shown, and tags.
MOST_ROWS, MOST_TEXTS, MOST_TAGS = 500, 12, 60
# More problems or notes than these are folded.
MOST_ITEMS = 12


def html(shown: Shown) -> str:
    """The page as one HTML file."""
    return to_html(blocks(shown), f"{printable(shown.title)}: the data")


def blocks(shown: Shown) -> list[Block]:
    """The page."""
    data = shown.data
    written = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    paths = some(list(dict.fromkeys(each.path for each in shown.sets)))
    parts: list[tuple[str, list[Block]]] = [
        ("Problems", _folded(f"{each.name}: {each.reason}" for each in data.problems)),
        ("Notes", _folded(data.notes)),
        ("Sets", _sets(shown)),
        ("Captions", _captions(shown)),
        ("What the network sees", _seen(shown)),
        ("Copies", sheets.copies(shown)),
        ("Buckets", sheets.buckets(shown)),
        ("Held-out images", sheets.held_out(shown)),
        ("Each image", _table(shown)),
    ]
    body = [block for title, found in parts if found for block in [Block("heading", title), *found]]
    return [
        Block("title", printable(shown.title)),
        Block("lead", f"What a training does with the images and captions of {paths}. Written {written}."),
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
    if shown.tokens:
        long, count = sum(shown.cut(tokens) > 0 for tokens in shown.tokens.values()), len(shown.tokens)
        detail = f"the longest has {max(shown.tokens.values())} tokens"
        if long:
            detail = f"of {count:,} are longer than {shown.chunks * CHUNK} tokens"
        cards.append(Card("captions cut" if long else "captions", f"{long or count:,}", detail))
    if data.held_out:
        cards.append(Card("held out", f"{len(data.held_out):,}", "not trained on, for evaluation"))
    return cards


def _sets(shown: Shown) -> list[Block]:
    """A table of the sets, if there are several."""
    if len(shown.sets) < 2:
        return []
    items, total = shown.data.items, len(shown.sets)
    images = np.bincount(items.samples.sets, minlength=total)
    uses = np.bincount(items.samples.sets[items.rows], minlength=total)
    rows = [["set", "images", "uses in an epoch", "share", "role", "target", "loss weight", "crop", "flip", "masks"]]
    for each in shown.sets:
        count = int(uses[each.index])
        rows.append(
            [
                each.path,
                f"{images[each.index]:,}",
                f"{count:,}",
                f"{count / uses.sum():.0%}",
                each.role,
                each.target,
                f"{each.loss_weight:g}",
                each.crop,
                f"{each.flip:g}",
                each.masks.source,
            ]  # fmt: skip
        )
    return [Block("table", rows=rows)]


def _captions(shown: Shown) -> list[Block]:
    """The captions of some images in three epochs, those that are too long, and frequent tags or words."""
    found: list[Block] = []
    if shown.data.captions:
        chosen = [shown.uses[place] for place in spread(len(shown.uses), MOST_TEXTS)]
        rows, several = [], len({use.sample.name for use in chosen}) < len(chosen)  # at several resolutions
        for use in sorted(chosen, key=lambda use: use.sample.name):
            texts = captions.in_epochs(shown.data.captions, use.item)
            same = len(set(texts)) == 1
            lines = texts[:1] if same else [f"epoch {number}: {text}" for number, text in enumerate(texts, 1)]
            name = use.sample.name + (f", {use.bucket}" if several else "")
            rows.append([name, "\n".join(lines)])
        images = "each image" if len(chosen) == len(shown.uses) else "some images"
        text = f"What the first {captions.EPOCHS} epochs train {images} with; one line where it is the same in all of them."
        if len(shown.data.items) > len(shown.uses):
            text += " Where an epoch uses an image several times, the first use is shown."
        found += [Block("text", text), Block("facts", rows=rows)]
    long = sorted((-tokens, caption) for caption, tokens in shown.tokens.items() if shown.cut(tokens))
    if long:
        read = shown.chunks * CHUNK
        are = "are" if len(long) > 1 else "is"
        found.append(Block("text", f"{len(long):,} of {len(shown.tokens):,} captions {are} cut after {read} tokens:"))
        found += _folded(f"{-tokens} tokens, {shown.cut(-tokens)} cut: {caption}" for tokens, caption in long)
    separator = shown.sets[0].captions.tag_separator
    for counted, name in zip(captions.frequencies(shown.captions, separator), ("tag", "word"), strict=True):
        if counted:
            most = counted.most_common(MOST_TAGS)
            total = f"{len(counted):,} different {name}s" if len(counted) > 1 else f"1 {name}"
            if len(counted) > len(most):
                total += f", the {len(most)} most frequent"
            items = [f"{count:>6,}  {text}" for text, count in most]
            found.append(Block("details", f"{total}: images with each", items=items))
    return found


def _seen(shown: Shown) -> list[Block]:
    if not shown.decoded:
        return []
    errors = [each.mean_error for each in shown.decoded]
    text = (
        "The network gets latents, not pixels. Each of these images is encoded and decoded by the base's VAE: what is lost there, "
        f"no training learns. The mean error is {np.mean(errors):.1f} of 255."
    )
    return [Block("text", text), *decoded_blocks(shown.decoded)]


def _table(shown: Shown) -> list[Block]:
    """A row for each image and crop geometry."""
    uses = shown.uses
    found = sorted((uses[place] for place in spread(len(uses), MOST_ROWS)), key=lambda use: use.sample.name)
    head = ["image", "uses", "pixels", "bucket", "scale", "cut away"]
    rows = [head + (["tokens", "chunks", "tokens cut"] if shown.tokens else [])]
    for use in found:
        geometry = use.geometry
        row = [
            use.sample.name, str(use.count), f"{geometry.original_width}x{geometry.original_height}", use.bucket,
            f"{use.scale:.2f}", f"{geometry.cut_away:.1%}",
        ]  # fmt: skip
        if shown.tokens:
            tokens = shown.tokens.get(use.sample.caption, 0)
            row += [f"{tokens}", f"{chunks_in(np.array(tokens))}", f"{shown.cut(tokens) or '-'}"]
        rows.append(row)
    text = [Block("text", f"{len(found):,} of {len(uses):,}, evenly chosen.")] if len(found) < len(uses) else []
    return [*text, Block("table", rows=rows)]


def _folded(items: Iterable[str]) -> list[Block]:
    """A list of sentences, of which all but the first are folded if there are many."""
    items = list(items)
    if not items:
        return []
    found = [Block("list", items=items[:MOST_ITEMS])]
    if items[MOST_ITEMS:]:
        found.append(Block("details", f"{len(items) - MOST_ITEMS:,} more", items=items[MOST_ITEMS:]))
    return found
