"""What a page about a data set says of its captions: their tokens, and how often each tag or word occurs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# CLIP reads so many tokens at a time, besides the start and end token.
CHUNK = 75
# Captions that are tokenized at a time.
_AT_ONCE = 1000
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


@dataclass(frozen=True)
class Length:
    """The tokens of a caption without start and end token; of two tokenizers the larger number."""

    tokens: int

    @property
    def chunks(self) -> int:
        """The chunks of 75 tokens that hold all of it."""
        return max(1, -(-self.tokens // CHUNK))

    def cut(self, chunks: int) -> int:
        """The tokens that are cut if so many chunks are read."""
        return max(0, self.tokens - chunks * CHUNK)


def lengths_of(texts: Sequence[str], tokenizers: Sequence[Any]) -> dict[str, Length]:
    """The length of each of the distinct texts; {} without tokenizers."""
    found: dict[str, Length] = {}
    for start in range(0, len(texts) if tokenizers else 0, _AT_ONCE):
        part = texts[start : start + _AT_ONCE]
        # verbose=False: the page itself says which captions are long.
        ids = [tokenizer(part, padding=False, truncation=False, verbose=False).input_ids for tokenizer in tokenizers]
        for text, rows in zip(part, zip(*ids, strict=True), strict=True):
            found[text] = Length(max(len(row) - 2 for row in rows))
    return found


def frequencies(captions: Mapping[str, int]) -> tuple[Counter[str], Counter[str]]:
    """(tags, words) with the number of images of each. `captions` -> the number of images.

    Tags are the parts between the commas of captions that have a comma; words are those of all other captions. Both in lower case,
    each counted once in a caption.
    """
    tags: Counter[str] = Counter()
    words: Counter[str] = Counter()
    for caption, images in captions.items():
        lower = caption.lower()
        if "," in lower:
            tags.update({tag: images for tag in {part.strip() for part in lower.split(",")} if tag})
        else:
            words.update({word: images for word in set(_WORD.findall(lower))})
    return tags, words
