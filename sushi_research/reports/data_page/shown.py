"""What a page about a data set is made of."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow.compute

from sushi_research.config.sets import ResolvedSet
from sushi_research.data.samples import Samples
from sushi_research.data.training_data import Data
from sushi_research.errors import some
from sushi_research.models.truncation import CHUNK, count_tokens
from sushi_research.reports.data_page.decoded import DecodedImage
from sushi_research.reports.data_page.uses import Uses, uses_of

# Of the distinct captions, so many are counted and tokenized: about a minute.
MOST_CAPTIONS = 100_000


@dataclass(frozen=True)
class Shown:
    """What the page is made of. `decoded` is empty without a base, `tokenizers` if there are none; `without` says it.

    `chunks` is how many chunks of 75 tokens are read of a caption.
    """

    sets: Sequence[ResolvedSet]
    data: Data
    chunks: int = 1
    tokenizers: Sequence[Any] = ()
    decoded: Sequence[DecodedImage] = ()
    without: Sequence[str] = ()
    show_progress: bool = False

    @property
    def title(self) -> str:
        """The names of the folders of the sets."""
        return some([os.path.basename(os.path.abspath(each.path)) or each.path for each in self.sets])

    @cached_property
    def samples(self) -> Samples:
        """The samples that are trained on."""
        return self.data.items.used

    @cached_property
    def uses(self) -> Uses:
        return uses_of(self.data.items)

    @cached_property
    def captions(self) -> dict[str, int]:
        """Every distinct caption -> its number of images; of very many, the first MOST_CAPTIONS. Without what is random in them."""
        counts = pyarrow.compute.value_counts(self.samples.first_captions).flatten()
        return dict(zip(*(column[:MOST_CAPTIONS].to_pylist() for column in counts), strict=True))

    @cached_property
    def tokens(self) -> dict[str, int]:
        """The tokens of each of `captions`, without start and end token; {} without tokenizers."""
        if not self.tokenizers:
            return {}
        return dict(zip(self.captions, count_tokens(self.tokenizers, list(self.captions)).tolist(), strict=True))

    def cut(self, tokens: int) -> int:
        """How many of so many tokens of a caption are not read."""
        return max(0, tokens - self.chunks * CHUNK)
