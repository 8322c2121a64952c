"""The text that each sample of a run is trained with, and all texts that the run needs.

An image's uses are numbered over the whole run: use n = epoch x (its uses per epoch) + its use within the epoch. Rules that are not
random make one text of each line; random ones make K variants of a caption at most (`variants`; None: one for each use). Use n
takes variant n of the first K uses, and then the K variants in a new random order each time, so that all come equally often. So
every text is known before the run, and the cache can hold all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute

from sushi_research import randomness
from sushi_research.config.captions import CaptionRules
from sushi_research.data.captions.rules import VERSION, Rules, line_of, lines_of
from sushi_research.data.items import Items
from sushi_research.errors import UserError
from sushi_research.fingerprints import content_hash
from sushi_research.remembered import Remembered, columns_hash

# Chunks of 75 tokens that random rules may add to a cache unasked: 9.7 GiB of SDXL's embeddings at fp16, and a quarter of an hour
# of encoding at 30 ms each.
MOST_CHUNKS = 32_768
# What the identity has for `variants` None.
ONE_PER_USE = "one per use"
_AS_WRITTEN = (Rules(CaptionRules()),)


@dataclass(frozen=True, eq=False)
class RunCaptions:
    """The captions of a run's items. `rules[s]` are those of the data set s.

    The run uses each item `epochs` times, and the items with the numbers `rest` once more, in the epoch that follows.
    `variants` is K above. `in_step`: the captions are encoded in each step, so that nothing need be known beforehand. `remembered`
    has texts that were made before.
    """

    items: Items
    rules: tuple[Rules, ...] = _AS_WRITTEN
    seed: int = 0
    epochs: int = 1
    rest: np.ndarray = field(default_factory=partial(np.zeros, 0, np.int64))
    variants: int | None = None
    in_step: bool = False
    remembered: Remembered | None = None

    def text_of(self, index: int, epoch: int) -> str:
        """The text of the item `index` in an epoch; "" if the caption is dropped there."""
        row = int(self.items.rows[index])
        if self.is_dropped(index, epoch):
            return ""
        if not self._several[row]:
            return self.items.samples.first_captions[row].as_py()
        return self._text(row, int(epoch * self._uses[row] + self._places[index]))

    def is_dropped(self, index: int, epoch: int) -> bool:
        """Whether the item `index` is trained without its caption in an epoch."""
        row = int(self.items.rows[index])
        rate = self._rules_of(row).config.dropout
        if not rate:
            return False
        image, instance = self.items.samples.images[row].decode(), int(self.items.instances[index])
        return randomness.uniform(self.seed, "caption-dropout", epoch, image, instance) < rate

    @cached_property
    def texts(self) -> pyarrow.Array:
        """Every distinct text of the training that the cache must have but "", as sorted large_string."""
        if self.in_step:
            return pyarrow.array([], pyarrow.large_string())
        if self.remembered is None:
            return self._made_texts()["texts"]
        of_items = columns_hash(self.items.rows, self.rest, self.items.samples.first_captions)
        key = self._digest(self.seed, self.epochs, self.variants, of_items)
        return self.remembered.arrays("caption-texts", key, self._made_texts)["texts"]

    def _made_texts(self) -> dict[str, pyarrow.Array]:
        plain = self.items.samples.first_captions.take(pyarrow.array(np.flatnonzero((self._uses > 0) & ~self._several)))
        several = {self._variant(row, number) for row, number in self._variants_in_use()}
        found = pyarrow.array(sorted(several), pyarrow.large_string())
        distinct = pyarrow.compute.unique(pyarrow.chunked_array([plain, found]))
        return {"texts": distinct.take(pyarrow.compute.sort_indices(distinct))}

    def with_variants(self, variants: int | None) -> RunCaptions:
        """The same with another number of variants."""
        return replace(self, variants=variants)

    @property
    def is_random(self) -> bool:
        """Whether `variants` matters: rules of a data set give more than one text of a line."""
        return bool(self._random.any())

    @property
    def is_limited(self) -> bool:
        """Whether an image with random rules has more uses than variants."""
        return self.variants is not None and bool((self.all_uses > self.variants)[self._random].any())

    @property
    def largest(self) -> int:
        """The most variants of an image that are used."""
        return int(self._limited(self.all_uses).max(initial=1))

    def facts(self) -> dict[str, Any] | None:
        """What identifies the texts of the run beside its data's hash; None if each image has one text, which that hash covers."""
        if not self._several.any():
            return None
        facts: dict[str, Any] = {"texts": self._digest()}
        return facts | ({"variants": self.variants or ONE_PER_USE} if self.is_random else {})

    def _digest(self, *others: int | str | None) -> str:
        """A hash of all that determines the texts of the images with several, and of `others`."""
        samples, rows = self.items.samples, np.flatnonzero(self._several & (self._uses > 0))
        columns = samples.images[rows], samples.captions.take(pyarrow.array(rows)), samples.sets[rows]
        rules = [each.settings for each in self.rules]
        return content_hash(repr((VERSION, columns_hash(*columns), rules, others)).encode())

    def _variants_in_use(self) -> Iterator[tuple[int, int]]:
        """(row, number) of each variant that the run uses, of rows with several; some may come twice."""
        uses = self._uses * self.epochs  # those of the whole epochs are the first
        rows = np.flatnonzero(self._several & (uses > 0))
        for row, count in zip(rows.tolist(), self._limited(uses)[rows].tolist(), strict=True):
            yield from ((row, number) for number in range(count))
        rest = self.rest[self._several[self.items.rows[self.rest]]]
        for row, place in zip(self.items.rows[rest].tolist(), self._places[rest].tolist(), strict=True):
            use, most = int(uses[row]) + place, self._most(row)
            # Of a later round, in which the variants have another order, any may be used.
            yield from ((row, number) for number in ([use] if most is None or use < most else range(most)))

    def _text(self, row: int, use: int) -> str:
        """The text of an image at use `use` of the run."""
        most = self._most(row)
        if most is None or use < most:
            return self._variant(row, use)
        image = self.items.samples.images[row].decode()
        order = randomness.key(self.seed, "caption-variant", image, use // most).permutation(most)
        return self._variant(row, int(order[use % most]))

    def _most(self, row: int) -> int | None:
        """The number of variants of an image: that of its lines if the rules are not random."""
        return self.variants if self._random[row] else len(self._lines(row))

    def _variant(self, row: int, number: int) -> str:
        rules, image = self._rules_of(row), self.items.samples.images[row].decode()
        line = line_of(self._lines(row), self.seed, image, number)
        return rules.variant(line, self.seed, image, number)

    def _rules_of(self, row: int) -> Rules:
        return self.rules[int(self.items.samples.sets[row])]

    def _lines(self, row: int) -> Sequence[str]:
        return lines_of(self.items.samples.captions[row].as_py(), self._rules_of(row))

    @cached_property
    def _uses(self) -> np.ndarray:
        """[N] int64: the uses of each sample in an epoch."""
        return np.bincount(self.items.rows, minlength=len(self.items.samples))

    @cached_property
    def _places(self) -> np.ndarray:
        """[n] int64: which of its sample's uses in an epoch an item is."""
        order = np.argsort(self.items.rows, kind="stable")
        rows = self.items.rows[order]
        starts = np.flatnonzero(np.r_[True, rows[1:] != rows[:-1]])
        places = np.empty(len(rows), np.int64)
        places[order] = np.arange(len(rows)) - np.repeat(starts, np.diff(np.r_[starts, len(rows)]))
        return places

    @cached_property
    def _random(self) -> np.ndarray:
        """[N] bool: the rules of the sample's data set are random."""
        return np.array([rules.is_random for rules in self.rules])[self.items.samples.sets]

    @cached_property
    def _line_counts(self) -> np.ndarray:
        """[N] int64: the lines that are used of each sample's caption."""
        counts = pyarrow.compute.list_value_length(self.items.samples.captions).to_numpy(zero_copy_only=False)
        first = np.array([rules.config.lines == "first" for rules in self.rules])[self.items.samples.sets]
        return np.where(first, 1, counts).astype(np.int64)

    @cached_property
    def _several(self) -> np.ndarray:
        """[N] bool: the sample may have different texts in the run."""
        return self._random | (self._line_counts > 1)

    @cached_property
    def all_uses(self) -> np.ndarray:
        """[N] int64: the uses of each sample in the run."""
        return self._uses * self.epochs + np.bincount(self.items.rows[self.rest], minlength=len(self.items.samples))

    def _limited(self, uses: np.ndarray) -> np.ndarray:
        """[N]: the variants of each sample that so many uses have."""
        return np.minimum(uses, np.where(self._random, self.variants or np.iinfo(np.int64).max, self._line_counts))


def chosen_variants(captions: RunCaptions, asked: int | None, chunks: int, kept: int | str | None = None) -> int | None:
    """K of a run (`RunCaptions.variants`), which None leaves at one for each use.

    `asked` is `captions.variants`. Without it a run that goes on keeps its own, `kept` (a value of `facts`). Otherwise each use has
    one of its own if all of them have at most MOST_CHUNKS chunks, `chunks` each; else as many as fit, but at least one.
    """
    if asked is not None or kept is not None:
        return asked if asked is not None else None if kept == ONE_PER_USE else int(kept)
    uses = np.sort(captions.all_uses[captions._random])
    most = MOST_CHUNKS // chunks
    if uses.sum() <= most:
        return None
    # With K variants, images with fewer uses have as many as uses: the largest K whose sum fits.
    low, high = 1, int(uses[-1])
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if np.minimum(uses, middle).sum() <= most else (low, middle - 1)
    return low


def require_effect(rules: Sequence[Rules], variants: int | None = None) -> None:
    """UserError if keys about tags, or `captions.variants`, are given, and no data set has a rule that they are for."""
    if variants is not None and not any(each.is_random for each in rules):
        raise UserError(
            "captions.variants has no effect because no rule is random: set captions.shuffle, captions.tag_dropout, "
            "captions.tag_categories or captions.alternatives, or remove it."
        )
    if any(each.config.has_tag_rules for each in rules):
        return
    default = CaptionRules()
    for name in ("keep_tags", "keep_separator"):
        if any(getattr(each.config, name) != getattr(default, name) for each in rules):
            raise UserError(
                f"captions.{name} has no effect because no tag is moved or dropped: set captions.shuffle or captions.tag_dropout, "
                "or remove it."
            )
