"""Which images an adapter file was trained on, in its metadata: so that it is not measured on them by mistake.

Each image is recorded by the beginning of its content hash, which neither the resolution nor captions, repeats or names change. A
run that starts from a file records the images of that file too.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from sushi_research.errors import UserError
from sushi_research.models.header import read_header

KEY = "sushi_research.images"
DATASET_KEY = "sushi_research.dataset_hash"
# In files of runs that started from a file that does not say its images.
OTHERS_KEY = "sushi_research.other_images"
# 48 bits: among 10,000 images one of 100 others is found by chance in 1 of 280 million cases.
DIGITS = 12
# The list of more images, 12 bytes each, is not written: programs read the metadata of all adapters that they show.
MAX_IMAGES = 10_000


@dataclass(frozen=True)
class TrainedOn:
    """What a file says about the images that it was trained on; None for what it does not say.

    `dataset_hash` covers images, captions, repeats and crop geometry. `images` are beginnings of content hashes; there may be
    others unless `is_complete`.
    """

    dataset_hash: str | None
    images: frozenset[str] | None
    is_complete: bool

    def seen(self, image_hashes: Collection[str]) -> set[str] | None:
        """Those of the images that the file was trained on; None if it does not say."""
        if self.images is None:
            return None
        return {image_hash for image_hash in image_hashes if image_hash[:DIGITS] in self.images}


def metadata_of(image_hashes: Collection[str], start: TrainedOn | None = None) -> dict[str, str]:
    """The metadata entries for the images that an adapter was trained on, also before if it started from a file; empty if there are
    more than MAX_IMAGES."""
    images = {image_hash[:DIGITS] for image_hash in image_hashes}
    others = {} if start is None or start.is_complete else {OTHERS_KEY: "unknown"}
    images |= (start and start.images) or frozenset()
    return {KEY: "".join(sorted(images)), **others} if len(images) <= MAX_IMAGES else {}


def trained_on(path: Path) -> TrainedOn:
    """What the adapter file at `path` says. A file that cannot be read says nothing; loading it gives the error."""
    try:
        metadata = read_header(Path(path)).metadata
    except UserError:
        metadata = {}
    text = metadata.get(KEY)
    # Without what a stranger's file has at its end: it would shift the images after it in a file that starts from this one.
    whole = range(0, len(text or "") - DIGITS + 1, DIGITS)
    images = None if text is None else frozenset(text[at : at + DIGITS] for at in whole)
    return TrainedOn(metadata.get(DATASET_KEY), images, images is not None and OTHERS_KEY not in metadata)
