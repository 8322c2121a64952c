"""Decodes one image file and describes it: what the scan has to know of every image. Worker processes import this module."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sushi_research.data.images import MAX_BYTES, BadImage, decode_and_describe
from sushi_research.data.near_duplicates import fingerprint
from sushi_research.data.samples import FINGERPRINT_BYTES
from sushi_research.fingerprints import content_hash
from sushi_research.user_files import UnreadableFile, read_regular


class ImageFacts(NamedTuple):
    """What is known of an image after it was decoded once; width and height in pixels are after the EXIF rotation.

    `hash` is that of the file's bytes, `fingerprint` that of `near_duplicates`, as FINGERPRINT_BYTES bytes. The others are those of
    `images.Decoded`.
    """

    hash: str
    width: int
    height: int
    fingerprint: bytes
    converted_from: str
    transparent: bool
    ignored: str


@dataclass(frozen=True)
class Unusable:
    """Why an image cannot be used. `lasting`: as long as its bytes stay what they are; otherwise it may be readable later."""

    reason: str
    lasting: bool


def inspect(image: bytes | str) -> ImageFacts | Unusable:
    """The facts about an image, given as its bytes or as the path of its file."""
    try:
        data = image if isinstance(image, bytes) else read_regular(Path(image), MAX_BYTES)
        decoded = decode_and_describe(data)
    except BadImage as error:
        return Unusable(error.reason, lasting=True)
    except UnreadableFile as error:
        return Unusable(error.reason, lasting=False)
    return ImageFacts(
        content_hash(data),
        decoded.image.width,
        decoded.image.height,
        fingerprint(np.asarray(decoded.image)).to_bytes(FINGERPRINT_BYTES, "big"),
        decoded.converted_from,
        decoded.transparent,
        decoded.ignored,
    )
