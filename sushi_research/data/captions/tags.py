"""Tags of a caption: which are kept, in which order the others come, and which are left out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sushi_research import caption_text
from sushi_research.config.captions import CaptionRules
from sushi_research.errors import UserError
from sushi_research.user_files import UnreadableFile, read_regular

# Of a file of tags. The largest published list, Danbooru's, has about 500,000 in 12 MB.
_MOST_BYTES = 2**26


class Tags(NamedTuple):
    """The tags of a caption in their order: only `free` ones are moved or dropped."""

    first: list[str]
    free: list[str]
    last: list[str]

    def joined(self, separator: str) -> str:
        """All of them as a caption."""
        between = f"{separator} " if separator != " " else separator
        return between.join([*self.first, *self.free, *self.last])


def split(caption: str, rules: CaptionRules) -> Tags:
    """The tags of a caption, without empty ones.

    With `keep_separator` in it, the tags before the first one and after the second one are kept, as in kohya's sd-scripts; without,
    the first `keep_tags` are.
    """
    parts = [_tags(part, rules.tag_separator) for part in caption.split(rules.keep_separator, 2)]
    if len(parts) > 1:
        return Tags(parts[0], parts[1], parts[2] if len(parts) > 2 else [])
    return Tags(parts[0][: rules.keep_tags], parts[0][rules.keep_tags :], [])


def varied(tags: Tags, rules: CaptionRules, rates: Mapping[str, float], generator: np.random.Generator) -> Tags:
    """The tags with the free ones in a random order, if `rules.shuffle`, and without those that are dropped.

    `rates` has the dropout probability of tags that are in a category, by `normal` tag. Which random numbers a tag gets does not
    depend on the rates, so that another rate changes no order.
    """
    order = generator.permutation(len(tags.free)).tolist() if rules.shuffle else range(len(tags.free))
    chances = generator.random(len(tags.free)).tolist()
    free = [tags.free[n] for n in order if chances[n] >= rates.get(normal(tags.free[n]), rules.tag_dropout)]
    return tags._replace(free=free)


def normal(tag: str) -> str:
    """A tag as it is compared: in lower case, with single spaces for underscores and spaces."""
    return " ".join(tag.replace("_", " ").lower().split())


def category_rates(rules: CaptionRules, section: str) -> dict[str, float]:
    """The dropout probability of each tag that a category lists, by `normal` tag. Of several categories, the first counts.

    `section` is the one that has the rules, for messages.

    Raises UserError if a file cannot be read, or has no tag.
    """
    rates: dict[str, float] = {}
    for name, category in rules.tag_categories.items():
        place = f"{section}.tag_categories.{name}: {category.file}"
        try:
            text = caption_text.decode(read_regular(Path(category.file), _MOST_BYTES))
        except UnreadableFile as error:
            raise UserError(f"{place} {error.reason}: give a text file with one tag on each line.") from None
        except caption_text.NotText as error:
            raise UserError(f"{place} {error.reason}: save it as UTF-8.") from None
        except OSError as error:
            raise UserError(f"{place} cannot be read ({error.strerror or error}): check the path.") from None
        found = {tag: category.dropout for line in text.splitlines() if (tag := normal(line))}
        if not found:
            raise UserError(f"{place} has no tag: write one on each line.")
        rates = found | rates
    return rates


def _tags(text: str, separator: str) -> list[str]:
    return [tag for each in text.split(separator) if (tag := each.strip())]
