"""Aspect-ratio buckets: the shape an image is trained at, and the way it gets there. Whole numbers throughout."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from fractions import Fraction
from math import isqrt
from typing import Literal

from sushi_research.errors import UserError


class TooSmall(ValueError):
    """An image that fills no bucket without being enlarged; `reason` says so in a few words."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class BucketRule:
    """Which bucket shapes there are, in pixels, and whether an image may be enlarged to fill one.

    The area is at most resolution squared; both sides are multiples of `step` from `min_side` to `max_side`.
    Raises UserError when there is no such shape.
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
    """How one image gets into its bucket, in pixels: it is resized, then height x width are cut out of it."""

    original_height: int
    original_width: int
    resized_height: int
    resized_width: int
    crop_top: int
    crop_left: int
    height: int
    width: int

    def time_ids(self, flip: bool, convention: Literal["image", "bucket"]) -> tuple[int, int, int, int, int, int]:
        """SDXL's size conditioning: (original h, original w, crop top, crop left, target h, target w).

        "image" holds the true values, as diffusers' train_text_to_image_lora_sdxl.py and kohya's train_util.py
        do; in a mirrored image the crop is as far from the left as it was from the right. "bucket" holds the
        bucket's size twice and no crop.
        """
        if convention == "bucket":
            return (self.height, self.width, 0, 0, self.height, self.width)
        assert convention == "image", convention
        crop_left = self.resized_width - self.width - self.crop_left if flip else self.crop_left
        return (self.original_height, self.original_width, self.crop_top, crop_left, self.height, self.width)


@functools.lru_cache
def bucket_shapes(rule: BucketRule) -> tuple[tuple[int, int], ...]:
    """All shapes (width, height) that images share, sorted, as kohya's `make_bucket_resolutions` lists them.

    For every width the largest height and the transposed shape; and the largest square.
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
    """The bucket of an image of this size and its way there: scaled to cover the bucket, cut in the middle.

    The bucket is the one whose aspect ratio is closest by its logarithm; of two, the larger, then the squarer,
    so that a transposed image gets the transposed crop geometry. Where that would enlarge the image and `upscale`
    is off, it gets a bucket of its own: its size, brought down to the rule's area and largest side where it is
    beyond them, with both sides rounded down to multiples of `step`.

    Raises TooSmall when a side of that own bucket is below `min_side`.
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
    """Orders shapes by closeness to an image: the exponential of |log aspect - log aspect| is a fraction."""
    one, other = width * shape[1], height * shape[0]
    return Fraction(max(one, other), min(one, other)), -shape[0] * shape[1], max(shape)


def _own_side(side: int, other: int, rule: BucketRule) -> int:
    """`side` of a side x other image within the rule's area and largest side, down to a multiple of `step`."""
    limited = min(side, rule.max_side, isqrt(rule.resolution**2 * side // other))
    return limited // rule.step * rule.step


def _rounded(numerator: int, denominator: int) -> int:
    """numerator / denominator to the nearest integer, halves up."""
    return (2 * numerator + denominator) // (2 * denominator)
