"""Aspect-ratio buckets: the shape at which an image is trained, and how it is resized and cropped. Integer arithmetic only."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from fractions import Fraction
from math import isqrt
from typing import Literal

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


def crop_geometry(width: int, height: int, rule: BucketRule) -> CropGeometry:
    """The bucket and crop geometry of an image of this size: scaled to cover the bucket, then cropped at the center.

    Chooses the bucket with the closest log aspect ratio. A tie goes to the larger bucket, then to the squarer one, so
    that a transposed image gets the transposed geometry. If that would upscale the image and `upscale` is off, the
    image gets its own bucket: its size, reduced to the rule's area and largest side if necessary, with both sides
    rounded down to multiples of `step`.

    Raises TooSmall if a side of that bucket is below `min_side`.
    """
    assert width > 0 and height > 0, (width, height)
    target_width, target_height = min(bucket_shapes(rule), key=lambda shape: _distance(width, height, shape))
    if not rule.upscale and (target_width > width or target_height > height):
        target_width, target_height = _own_side(width, height, rule), _own_side(height, width, rule)
        if min(target_width, target_height) < rule.min_side:
            raise TooSmall(
                f"{width}x{height} pixels is too small: without data.upscale its bucket would be"
                f" {target_width}x{target_height}, and no side may be below {rule.min_side}"
            )
    if target_width * height >= target_height * width:  # the width needs the larger scale
        resized_width, resized_height = target_width, _rounded(height * target_width, width)
    else:
        resized_width, resized_height = _rounded(width * target_height, height), target_height
    return CropGeometry(
        original_height=height,
        original_width=width,
        resized_height=resized_height,
        resized_width=resized_width,
        crop_top=(resized_height - target_height) // 2,
        crop_left=(resized_width - target_width) // 2,
        height=target_height,
        width=target_width,
    )


def _distance(width: int, height: int, shape: tuple[int, int]) -> tuple[Fraction, int, int]:
    """Sort key of a shape by closeness to an image: exp(|difference of log aspect ratios|) as an exact fraction; then ties."""
    one, other = width * shape[1], height * shape[0]
    return Fraction(max(one, other), min(one, other)), -shape[0] * shape[1], max(shape)


def _own_side(side: int, other: int, rule: BucketRule) -> int:
    """`side` of a side x other image, limited to the rule's area and largest side, rounded down to a multiple of `step`."""
    limited = min(side, rule.max_side, isqrt(rule.resolution**2 * side // other))
    return limited // rule.step * rule.step


def _rounded(numerator: int, denominator: int) -> int:
    """numerator / denominator, rounded to the nearest integer, halves up."""
    return (2 * numerator + denominator) // (2 * denominator)
