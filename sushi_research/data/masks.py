"""Masks: pictures that say how much each part of an image counts in the loss. White counts, black does not. Pure functions."""

from __future__ import annotations

import posixpath
from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageOps

from sushi_research.data import images
from sushi_research.data.buckets import CropGeometry
from sushi_research.data.images import BadImage
from sushi_research.data.names import IMAGES, composed
from sushi_research.data.samples import Sample

# Increment it when `decode`, `alpha` or `to_latents` gives other values. It is part of every key in the cache.
RECIPE = 1
# What follows the image's name in that of its mask: OneTrainer's, then two of image editors and segmentation tools.
ENDINGS = ("-masklabel", ".mask", "_mask")
_ALPHA = b"alpha:"
# Over the background, where masks are shown.
OVERLAY = "#e4573d"
# Pixels of the image per latent, in each direction.
SCALE = 8


def decode(data: bytes) -> Image.Image:
    """A mask file as 8-bit grey. Raises BadImage for what is no single intact image, or is transparent.

    A transparent mask is refused because nobody can tell whether its transparency or its colours are meant.
    """
    found = images.decode_and_describe(data)
    if found.transparent:
        raise BadImage("is transparent: save it in black and white, without transparency")
    return found.image.convert("L")


def alpha(data: bytes) -> Image.Image:
    """The opacity of an image file as 8-bit grey: white if it has no transparency. Raises BadImage as `images.decode` does."""
    found = images.decode_and_describe(data)
    return found.alpha or Image.new("L", found.image.size, 255)


def alpha_hashes(images: np.ndarray) -> np.ndarray:
    """The hashes of images' own transparencies as masks, from the images' content hashes [N] of 32 hex digits.

    They begin with "alpha:", so that none is that of a mask file.
    """
    found = np.array(images, "S32")
    found.view(np.uint8).reshape(-1, 32)[:, : len(_ALPHA)] = np.frombuffer(_ALPHA, np.uint8)
    return found


def to_latents(mask: Image.Image, geometry: CropGeometry) -> np.ndarray:
    """A mask (grey, of the image's size) on the grid of the image's latents: float16 [1, h, w] from 0 to 1.

    It is resized and cropped as the image is (`images.resize_and_crop`), but each value is the mean over the area it covers, so
    that none is outside of the mask's own range. That of the mirrored image is its mirror image, because buckets are whole latents.
    """
    assert mask.mode == "L", mask
    pixels = np.asarray(images.cropped(mask, geometry, Image.Resampling.BOX))
    height, width = geometry.height // SCALE, geometry.width // SCALE
    means = pixels.reshape(height, SCALE, width, SCALE).mean((1, 3), dtype=np.float64) / 255
    return means.astype(np.float16)[None]


def loss_weights(mask: np.ndarray, background: float, *, invert: bool, flip: bool) -> np.ndarray:
    """The weight of each latent in the loss, float32 [1, h, w], from a mask of `to_latents`: black has weight `background`."""
    white = 1 - mask.astype(np.float32) if invert else mask.astype(np.float32)
    return np.ascontiguousarray((background + (1 - background) * white)[..., :: -1 if flip else 1], np.float32)


def of_sample(sample: Sample) -> Image.Image:
    """The mask of a sample that has one, as grey of its image's size. Raises UserError if its file changed since it was checked."""
    return (alpha if sample.load_mask is None else decode)(sample.read_mask())


def overlaid(image: Image.Image, mask: Image.Image, *, invert: bool) -> Image.Image:
    """An RGB image of any size with a colour over what its mask says is background."""
    mask = mask.resize(image.size, Image.Resampling.BOX)
    mask = ImageOps.invert(mask) if invert else mask
    return Image.composite(image, Image.blend(image, Image.new("RGB", image.size, OVERLAY), 0.6), mask)


def masks_beside(names: Iterable[str]) -> dict[str, list[str]]:
    """Which of these image files are masks of others: image -> its masks, sorted. Names are paths with /, in any Unicode form.

    cat-masklabel.png, cat.mask.png and cat_mask.png are masks of cat.jpg if there is one, and images of their own if not.
    """
    of_stem: dict[str, list[str]] = defaultdict(list)
    ending = []
    for name in names:
        stem = posixpath.splitext(name)[0]
        of_stem[composed(stem)].append(name)
        if stem.endswith(ENDINGS):
            ending.append((name, stem))
    found: dict[str, list[str]] = defaultdict(list)
    for name, stem in sorted(ending):
        # A mask of a mask is none: cat_mask_mask.png with cat_mask.png is a mask only if there is no cat.jpg.
        for image in of_stem.get(composed(_without_ending(stem)), ()):
            found[image].append(name)
    masks = {name for names in found.values() for name in names}
    return {image: names for image, names in found.items() if image not in masks}


def masks_in_folder(names: Iterable[str], stems: Iterable[str]) -> dict[str, list[str]]:
    """The masks in a folder of their own, by the stem (path without suffix) of their image: for a/cat, a/cat.png or the like."""
    wanted = {composed(stem): stem for stem in stems}
    found: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names):
        stem, suffix = posixpath.splitext(name)
        if suffix.lower() not in IMAGES:
            continue
        for candidate in map(composed, (stem, _without_ending(stem))):
            if candidate in wanted:
                found[wanted[candidate]].append(name)
                break
    return dict(found)


def _without_ending(stem: str) -> str:
    """The stem of the image whose mask has this stem; the same stem if it has none of `ENDINGS`."""
    return next((stem.removesuffix(ending) for ending in ENDINGS if stem.endswith(ending)), stem)
