"""Images that were found at a data path, before their check, and the rule by which their captions are found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow

from sushi_research.data.checking import Place

CAPTIONS = pyarrow.large_list(pyarrow.large_string())


@dataclass(frozen=True)
class CaptionRule:
    """How the captions of images are found: in files or a `column`, or as the name of the image's folder or of its file.

    `allow_empty`: an image without a caption, or with an empty one, is used with the empty caption.
    """

    column: str
    source: Literal["files", "folder", "name"] = "files"
    allow_empty: bool = False


@dataclass(frozen=True)
class Found:
    """N images. `captions` is null where an image has none that can be used; that problem is already recorded.

    `names` and `captions` are Arrow arrays, `repeats` is [N] int32, and row i is read at row i of `place`. `lasting`: whether files
    in the same state give the same. `boxes` [N, 4] int32 are the parts that are used (`Sample.box`), None for whole images.
    """

    names: pyarrow.Array
    captions: pyarrow.Array
    repeats: np.ndarray
    place: Place
    lasting: bool = True
    boxes: np.ndarray | None = None
