"""`crop_geometries` on columns gives exactly what exact fractions give, image by image."""

from fractions import Fraction
from math import isqrt

import numpy as np
import pytest

from sushi_research.data.buckets import BucketRule, bucket_shapes, crop_geometries, crop_geometry, distortion

RULES = [
    BucketRule(resolution=1024, min_side=512, max_side=2048),
    BucketRule(resolution=512, min_side=256, max_side=1024, upscale=True),
    BucketRule(resolution=191, min_side=1, max_side=216, step=1),
    BucketRule(resolution=400, min_side=8, max_side=3200, step=8, upscale=True),
    BucketRule(resolution=8192, min_side=4096, max_side=16384),
]


def by_fractions(width: int, height: int, rule: BucketRule) -> tuple[tuple[int, ...], bool]:
    """The geometry of one image and whether it is too small, with Python's exact numbers."""

    def own(side: int, other: int) -> int:
        return min(side, rule.max_side, isqrt(rule.resolution**2 * side // other)) // rule.step * rule.step

    def rounded(numerator: int, denominator: int) -> int:
        return (2 * numerator + denominator) // (2 * denominator)

    def distance(shape: tuple[int, int]) -> tuple[Fraction, int, int]:
        one, other = width * shape[1], height * shape[0]
        return Fraction(max(one, other), min(one, other)), -shape[0] * shape[1], max(shape)

    w, h = min(bucket_shapes(rule), key=distance)
    too_small = False
    if not rule.upscale and (w > width or h > height):
        w, h = own(width, height), own(height, width)
        too_small = min(w, h) < rule.min_side
    if w * height >= h * width:
        resized = w, rounded(height * w, width)
    else:
        resized = rounded(width * h, height), h
    return (height, width, resized[1], resized[0], (resized[1] - h) // 2, (resized[0] - w) // 2, h, w), too_small


def some_sizes(rule: BucketRule) -> np.ndarray:
    """Sizes of all magnitudes, of the shapes themselves, and on and around the borders between them."""
    rng = np.random.default_rng(0)
    sizes = [rng.integers(1, high, (150, 2)) for high in (40, 700, 5000, 65_536)]
    shapes = np.array(bucket_shapes(rule))[:60]
    sizes += [shapes, shapes * 3, shapes + [1, 0], np.maximum(shapes - [0, 1], 1), [[8, 48], [48, 8], [65_535, 1]]]
    return np.minimum(np.concatenate(sizes), 65_535)


@pytest.mark.parametrize("rule", RULES)
def test_columns_give_what_exact_fractions_give(rule):
    sizes = some_sizes(rule)
    geometries, too_small = crop_geometries(sizes[:, 0], sizes[:, 1], rule)
    assert geometries.dtype == np.int32
    for number, (width, height) in enumerate(sizes.tolist()):
        expected, small = by_fractions(width, height, rule)
        assert bool(too_small[number]) == small, (width, height)
        if not small:
            assert tuple(geometries[number].tolist()) == expected, (width, height)


def test_a_squeezed_image_fills_its_bucket_and_nothing_is_cut():
    rule = RULES[0]
    geometries, _ = crop_geometries(np.array([4000, 1024]), np.array([3000, 1024]), rule, squeeze=True)
    assert geometries[:, 2:].tolist() == [[896, 1152, 0, 0, 896, 1152], [1024, 1024, 0, 0, 1024, 1024]]
    # 4:3 becomes 9:7.
    assert distortion(geometries).tolist() == pytest.approx([(4 / 3) / (9 / 7) - 1, 0])
    assert distortion(crop_geometries(np.array([1024]), np.array([1024]), rule)[0]).tolist() == [0]


def test_a_box_is_fitted_as_an_image_of_its_size_would_be():
    """And the crop is where the box is in the scaled image: at most a pixel off, by rounding, and never beyond its edge."""
    rng = np.random.default_rng(1)
    rule = BucketRule(resolution=256, min_side=64, max_side=512, upscale=True)
    sizes = rng.integers(40, 3000, (500, 2))
    corners = np.sort((rng.random((500, 2, 2)) * (sizes[:, None] - 20)).astype(int), axis=1)
    boxes = np.concatenate([corners[:, 0], corners[:, 1] + 20], 1)
    geometries, _ = crop_geometries(sizes[:, 0], sizes[:, 1], rule, boxes=boxes)
    for size, (left, top, right, bottom), row in zip(sizes, boxes, geometries.tolist(), strict=True):
        alone = crop_geometry(right - left, bottom - top, rule)
        assert (row[6], row[7]) == (alone.height, alone.width)
        scale = alone.resized_width / (right - left), alone.resized_height / (bottom - top)
        assert row[3] >= row[5] + row[7] and row[2] >= row[4] + row[6] and min(row[4:6]) >= 0
        # One of the two scales is the exact one; the other is rounded to a pixel of the box.
        exact = max(scale, key=lambda each: abs(each * (right - left) - round(each * (right - left))) < 1e-9)
        assert abs(row[5] - (left * exact + alone.crop_left)) <= 2 + left * abs(scale[0] - scale[1])
        assert abs(row[3] - size[0] * exact) <= 1 + size[0] * abs(scale[0] - scale[1])
    whole = np.concatenate([np.zeros_like(sizes), sizes], 1)
    assert (crop_geometries(*sizes.T, rule, boxes=whole)[0] == crop_geometries(*sizes.T, rule)[0]).all()
