"""What a page about a data set says of its captions: how often each tag or word occurs, and what each use is trained with."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from sushi_research.data.captions.run_captions import RunCaptions

# Epochs whose captions are shown.
EPOCHS = 3
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


def frequencies(captions: Mapping[str, int], separator: str = ",") -> tuple[Counter[str], Counter[str]]:
    """(tags, words) with the number of images of each. `captions` -> the number of images.

    Tags are the parts between the separators of captions that have one; words are those of all other captions. Both in lower case,
    each counted once in a caption.
    """
    tags: Counter[str] = Counter()
    words: Counter[str] = Counter()
    for caption, images in captions.items():
        lower = caption.lower()
        if separator in lower:
            tags.update({tag: images for tag in {part.strip() for part in lower.split(separator)} if tag})
        else:
            words.update({word: images for word in set(_WORD.findall(lower))})
    return tags, words


def in_epochs(captions: RunCaptions, index: int) -> list[str]:
    """The caption of the item `index` in each of the first EPOCHS epochs, as it is trained; what is dropped is said."""
    return [
        "(dropped)" if captions.is_dropped(index, epoch) else captions.text_of(index, epoch) or "(empty)"
        for epoch in range(EPOCHS)
    ]
