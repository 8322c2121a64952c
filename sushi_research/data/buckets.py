"""Aspect-ratio buckets: the shape at which an image is trained, and how it is resized and cropped. Integer arithmetic only.

`crop_geometries` works on columns: a million images take about a second.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np

from sushi_research.errors import UserError


class TooSmall(ValueError):
    """An image that is too small for any bucket without upscaling; `reason` says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class BucketRule:
    """Defines the bucket shapes, in pixels, and whether an image may be upscaled to fill one.

    The area is at most resolution squared; both sides are multiples of `step` from `min_side` to `max_side`.
    Raises UserError if there is no such shape.
    """

    resolution: int
    min_side: int
    max_side: int
    step: int = 64
    upscale: bool = False

    def __post_init__(self) -> None:
        assert self.step >= 1 and self.min_side >= 1, self
        if not bucket_shapes(self):
            raise UserError(
                f"no bucket has sides from {self.min_side} to {self.max_side} that are multiples of {self.step}"
                f" within an area of {self.resolution}x{self.resolution}: lower data.bucket_min_side or"
                " data.bucket_step, or raise data.bucket_max_side."
            )


@dataclass(frozen=True)
class CropGeometry:
    """How an image is fitted to its bucket, in pixels: it is resized, then cropped to height x width."""

    original_height: int
    original_width: int
    resized_height: int
    resized_width: int
    crop_top: int
    crop_left: int
    height: int
    width: int

    @property
    def cut_away(self) -> float:
        """The fraction of the resized image that is cropped away."""
        return 1 - self.height * self.width / (self.resized_height * self.resized_width)

    def time_ids(self, flip: bool, convention: Literal["image", "bucket"]) -> tuple[int, int, int, int, int, int]:
        """SDXL's size conditioning: (original h, original w, crop top, crop left, target h, target w).

        "image" gives the true values, as diffusers' train_text_to_image_lora_sdxl.py does. For a mirrored image, crop left
        is the distance from the right edge before mirroring. kohya's train_util.py gives the same original and target sizes,
        but other crop values: `BucketManager.get_crop_ltrb` fits the whole image into the bucket and gives the width of the
        empty margin, which is on the axis that is not cropped (200x150 into 128x128: top 16, left 0; the pixels are cropped
        at top 0, left 21). "bucket" gives the bucket's size twice and no crop.
        """
        if convention == "bucket":
            return (self.height, self.width, 0, 0, self.height, self.width)
        assert convention == "image", convention
        crop_left = self.resized_width - self.width - self.crop_left if flip else self.crop_left
        return (self.original_height, self.original_width, self.crop_top, crop_left, self.height, self.width)


@functools.lru_cache
def bucket_shapes(rule: BucketRule) -> tuple[tuple[int, int], ...]:
    """All bucket shapes (width, height), sorted, as in kohya's `make_bucket_resolutions`.

    For every width: the shape with the largest height, and its transpose. Also the largest square.
    """
    largest = rule.max_side // rule.step * rule.step
    shapes = set()
    for width in range(-(-rule.min_side // rule.step) * rule.step, largest + 1, rule.step):
        height = min(largest, rule.resolution**2 // width // rule.step * rule.step)
        if height >= rule.min_side:
            shapes |= {(width, height), (height, width)}
    square = min(largest, rule.resolution // rule.step * rule.step)
    if square >= rule.min_side:
        shapes.add((square, square))
    return tuple(sorted(shapes))


@dataclass(frozen=True)
class Fitting:
    """How the images of a set are fitted to buckets: at each of the `rules`, which differ in resolution, by the `crop` of that name
    (config/data_set.CROP). With "random" each image has `crops` crops."""

    rules: tuple[BucketRule, ...]
    crop: Literal["center", "random", "box", "none"] = "center"
    crops: int = 1


# The columns of `crop_geometries`: the fields of CropGeometry.
ORIGINAL_HEIGHT, ORIGINAL_WIDTH, RESIZED_HEIGHT, RESIZED_WIDTH, CROP_TOP, CROP_LEFT, HEIGHT, WIDTH = range(8)
# The products that are compared stay below 2^63 for sides up to this (JPEG's own limit, `images.MAX_SIDE`).
_MOST_SIDE = 65_535


def crop_geometry(width: int, height: int, rule: BucketRule) -> CropGeometry:
    """The bucket and crop geometry of one image of this size, cropped at the center (`crop_geometries`). Raises TooSmall."""
    geometries, too_small = crop_geometries(np.array([width]), np.array([height]), rule)
    if too_small[0]:
        raise TooSmall(too_small_reason(width, height, geometries[0], rule))
    return CropGeometry(*geometries[0].tolist())


def crop_geometries(
    widths: np.ndarray,
    heights: np.ndarray,
    rule: BucketRule,
    *,
    squeeze: bool = False,
    boxes: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The geometries of N images of these sizes, [N, 8] int32 in the order of CropGeometry's fields, and a mask [N] of those that
    are too small.

    Chooses the bucket with the closest log aspect ratio. A tie goes to the larger bucket, then to the squarer one, so
    that a transposed image gets the transposed geometry. If that would upscale the image and `rule.upscale` is off, the
    image gets its own bucket: its size, reduced to the rule's area and largest side if necessary, with both sides
    rounded down to multiples of `step`. An image is too small if a side of that bucket is below `min_side`.

    The image is scaled to cover the bucket, then cropped at the center. With `squeeze` it is scaled to exactly the bucket, which
    changes its aspect ratio, and nothing is cropped. `boxes` [N, 4], as left, top, right, bottom in pixels within the image, are
    the parts that are used: they choose the bucket and the scale, and each is cropped as an image of its size would be.
    """
    full_w, full_h = (np.asarray(side, np.int64) for side in (widths, heights))
    left, top = (np.zeros_like(full_w), np.zeros_like(full_h)) if boxes is None else boxes[:, :2].T.astype(np.int64)
    width, height = (full_w, full_h) if boxes is None else (boxes[:, 2:].T.astype(np.int64) - [left, top])
    if len(width):
        assert width.min() > 0 and height.min() > 0 and max(full_w.max(), full_h.max()) <= _MOST_SIDE
    target_w, target_h = _closest(width, height, rule)
    too_small = np.zeros(len(width), bool)
    if not rule.upscale:
        own = (target_w > width) | (target_h > height)
        target_w = np.where(own, _own_side(width, height, rule), target_w)
        target_h = np.where(own, _own_side(height, width, rule), target_h)
        too_small = np.minimum(target_w, target_h) < rule.min_side
    # The scale is numerator / denominator: that of the side which needs the larger one.
    by_width = target_w * height >= target_h * width
    numerator, denominator = np.where(by_width, target_w, target_h), np.where(by_width, width, height)

    def scaled(pixels: np.ndarray) -> np.ndarray:
        return _rounded(pixels * numerator, denominator)

    resized_w, resized_h = scaled(full_w), scaled(full_h)
    crop_l = scaled(left) + (scaled(width) - target_w) // 2
    crop_t = scaled(top) + (scaled(height) - target_h) // 2
    if squeeze:
        resized_w, resized_h, crop_l, crop_t = target_w, target_h, np.zeros_like(left), np.zeros_like(top)
    # The roundings of a box at the edge may add up to a pixel beyond it.
    crop_l, crop_t = np.minimum(crop_l, resized_w - target_w), np.minimum(crop_t, resized_h - target_h)
    columns = full_h, full_w, resized_h, resized_w, crop_t, crop_l, target_h, target_w
    return np.stack(columns, 1).astype(np.int32), too_small


def too_small_reason(width: int, height: int, geometry: np.ndarray, rule: BucketRule) -> str:
    """Why an image (or box) of this size, with this row of `crop_geometries`, is too small."""
    bucket = f"{geometry[WIDTH]}x{geometry[HEIGHT]}"
    return (
        f"{width}x{height} pixels is too small: without data.upscale its bucket would be {bucket}, and no side may be below "
        f"{rule.min_side}"
    )


def random_crops(geometries: np.ndarray, images: np.ndarray, numbers: np.ndarray, count: int) -> np.ndarray:
    """The geometries [N, 8] with random crops: crop `numbers` [N] of `count` of the images with these hashes [N] (S32).

    The crops of an image depend on its content and size alone, so that runs with different seeds share their cache entries. They
    are spread evenly: crop k is at a random place within part k of what can be cut away.
    """
    digits = np.ascontiguousarray(images).view(np.uint8).reshape(-1, 32)[:, :8].astype(np.int64)
    values = np.where(digits < ord("a"), digits - ord("0"), digits - ord("a") + 10)
    within = values @ (16 ** np.arange(8)[::-1])  # [N], below 2^32
    found = geometries.copy()
    for crop, resized, size in ((CROP_TOP, RESIZED_HEIGHT, HEIGHT), (CROP_LEFT, RESIZED_WIDTH, WIDTH)):
        places = geometries[:, resized].astype(np.int64) - geometries[:, size] + 1
        found[:, crop] = ((numbers.astype(np.int64) << 32) + within) * places // (count << 32)
    return found


def distortion(geometries: np.ndarray) -> np.ndarray:
    """By what fraction the aspect ratio of each image is changed, [N] float64: 0 if it is kept."""
    columns = geometries.astype(np.float64).T
    one = columns[ORIGINAL_WIDTH] * columns[RESIZED_HEIGHT]
    other = columns[ORIGINAL_HEIGHT] * columns[RESIZED_WIDTH]
    return np.maximum(one, other) / np.minimum(one, other) - 1


def _closest(width: np.ndarray, height: np.ndarray, rule: BucketRule) -> tuple[np.ndarray, np.ndarray]:
    """(width, height) of the shape closest to each image by log aspect ratio: [N] int64 each.

    The closest is one of the two neighbours in the order of aspect ratios. Floats find the place to within one shape, and integers
    decide.
    """
    shapes = _shapes_by_ratio(rule)
    place = np.searchsorted(shapes[:, 0] / shapes[:, 1], width / height)
    best = np.clip(place - 2, 0, len(shapes) - 1)
    for step in (-1, 0, 1):
        other = np.clip(place + step, 0, len(shapes) - 1)
        best = np.where(_is_closer(width, height, shapes[other], shapes[best]), other, best)
    return shapes[best, 0], shapes[best, 1]


@functools.lru_cache
def _shapes_by_ratio(rule: BucketRule) -> np.ndarray:
    """[S, 2] int64: bucket shapes (width, height) in the order of their aspect ratios; of one ratio the largest alone."""
    largest: dict[tuple[int, int], tuple[int, int]] = {}
    for width, height in bucket_shapes(rule):
        divisor = math.gcd(width, height)
        ratio = width // divisor, height // divisor
        largest[ratio] = max(largest.get(ratio, (0, 0)), (width, height))
    return np.array(sorted(largest.values(), key=lambda shape: Fraction(*shape)), np.int64)


def _is_closer(width: np.ndarray, height: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether the shapes `one` [N, 2] are to be preferred to the shapes `other` [N, 2] for images of these sizes: [N] bool."""

    def ratio(shape: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """exp(|difference of log aspect ratios|) as numerator and denominator."""
        across = width * shape[:, 1], height * shape[:, 0]
        return np.maximum(*across), np.minimum(*across)

    (high, low), (other_high, other_low) = ratio(one), ratio(other)
    ours, theirs = high * other_low, other_high * low
    area, other_area = one[:, 0] * one[:, 1], other[:, 0] * other[:, 1]
    squarer = one.max(1) < other.max(1)
    return (ours < theirs) | ((ours == theirs) & ((area > other_area) | ((area == other_area) & squarer)))


def _own_side(side: np.ndarray, other: np.ndarray, rule: BucketRule) -> np.ndarray:
    """`side` of side x other images, limited to the rule's area and largest side, rounded down to a multiple of `step`."""
    square = rule.resolution**2 * side // other  # its root is the side of an image with the rule's area
    root = np.sqrt(square).astype(np.int64)
    root -= root * root > square
    root += (root + 1) ** 2 <= square
    return np.minimum(np.minimum(side, rule.max_side), root) // rule.step * rule.step


def _rounded(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """numerator / denominator, rounded to the nearest integer, halves up."""
    return (2 * numerator + denominator) // (2 * denominator)
