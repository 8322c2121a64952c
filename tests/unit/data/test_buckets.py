import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sushi_research.data.buckets import BucketRule, CropGeometry, TooSmall, bucket_shapes, crop_geometry
from sushi_research.errors import UserError

SDXL = BucketRule(resolution=1024, min_side=512, max_side=2048)
SD15 = BucketRule(resolution=512, min_side=256, max_side=1024)
LARGER = BucketRule(resolution=512, min_side=256, max_side=1024, upscale=True)


def transposed(geometry: CropGeometry) -> CropGeometry:
    return CropGeometry(
        original_height=geometry.original_width,
        original_width=geometry.original_height,
        resized_height=geometry.resized_width,
        resized_width=geometry.resized_height,
        crop_top=geometry.crop_left,
        crop_left=geometry.crop_top,
        height=geometry.width,
        width=geometry.height,
    )


@st.composite
def rules(draw):
    step = draw(st.sampled_from([1, 8, 32, 64, 96]))
    resolution = draw(st.integers(step, 1200))
    largest_square = resolution // step * step
    return BucketRule(
        resolution=resolution,
        min_side=draw(st.integers(1, largest_square)),
        max_side=draw(st.integers(largest_square, 2 * resolution + step)),
        step=step,
        upscale=draw(st.booleans()),
    )


sides = st.integers(1, 5000)


# Both sides fit here, and it is the height that sets the scale.
@example(223, 286, BucketRule(resolution=191, min_side=1, max_side=216, step=1))
@given(sides, sides, rules())
def test_a_crop_geometry_keeps_every_promise(width, height, rule):
    try:
        p = crop_geometry(width, height, rule)
    except TooSmall:
        assert not rule.upscale
        return
    assert (p.original_width, p.original_height) == (width, height)
    assert p.width * p.height <= rule.resolution**2
    assert p.width % rule.step == p.height % rule.step == 0
    assert rule.min_side <= min(p.width, p.height) and max(p.width, p.height) <= rule.max_side
    # It covers the bucket, and not by more than needed: one side fits exactly.
    assert p.resized_width >= p.width and p.resized_height >= p.height
    assert p.resized_width == p.width or p.resized_height == p.height
    # The aspect is kept: the other side is the exact one, rounded to the nearest integer. Where both sides fit, either may
    # be the one that set the scale.
    by_width = p.resized_width == p.width and abs(p.resized_height * width - height * p.width) * 2 <= width
    by_height = p.resized_height == p.height and abs(p.resized_width * height - width * p.height) * 2 <= height
    assert by_width or by_height
    if not rule.upscale:
        assert p.resized_width <= width and p.resized_height <= height
    # The cut is in the middle; of an odd rest the smaller half is at the top or left.
    assert p.resized_width - p.width - 2 * p.crop_left in (0, 1)
    assert p.resized_height - p.height - 2 * p.crop_top in (0, 1)


@given(sides, sides, rules())
def test_a_transposed_image_has_the_transposed_crop_geometry(width, height, rule):
    try:
        expected = transposed(crop_geometry(width, height, rule))
    except TooSmall:
        with pytest.raises(TooSmall):
            crop_geometry(height, width, rule)
        return
    assert crop_geometry(height, width, rule) == expected


@given(sides, sides)
def test_with_upscaling_the_bucket_is_the_closest_by_log_aspect(width, height):
    p = crop_geometry(width, height, LARGER)
    assert (p.width, p.height) in bucket_shapes(LARGER)

    def distance(w, h):  # the exponential of the distance, times a constant; exact in integers up to the division
        return max(w * height, h * width) / min(w * height, h * width)

    assert distance(p.width, p.height) == min(distance(w, h) for w, h in bucket_shapes(LARGER))


@given(st.integers(256, 5000), st.integers(256, 5000))
def test_only_images_below_the_smallest_bucket_are_refused_at_ordinary_aspects(width, height):
    if max(width, height) <= 2 * min(width, height):
        crop_geometry(width, height, SD15)


def test_the_shapes_at_512_are_those_of_kohya():
    # What make_bucket_resolutions((512, 512), 256, 1024, 64) of kohya-ss/sd-scripts lists.
    landscape = [(576, 448), (640, 384), (704, 320), (768, 320), (832, 256), (896, 256), (960, 256), (1024, 256)]
    portrait = [(height, width) for width, height in landscape]
    assert bucket_shapes(SD15) == tuple(sorted([(512, 512), *landscape, *portrait]))


def test_a_square_is_a_shape_even_when_the_resolution_is_no_multiple_of_the_step():
    # 960 wide leaves room for 1024, so the plain list has no square.
    assert (960, 960) in bucket_shapes(BucketRule(resolution=1000, min_side=512, max_side=1536))


BY_HAND = [
    ((1024, 1024), (1024, 1024), (1024, 1024), (0, 0)),
    ((4000, 3000), (1152, 896), (1195, 896), (21, 0)),
    ((3000, 4000), (896, 1152), (896, 1195), (0, 21)),
    ((1500, 1024), (1216, 832), (1219, 832), (1, 0)),
    # Enlarging by 1024/1020 is still enlarging: the image's own size, rounded down.
    ((1030, 1020), (1024, 960), (1024, 1014), (0, 27)),
    ((700, 700), (640, 640), (640, 640), (0, 0)),
    ((1000, 520), (960, 512), (985, 512), (12, 0)),
    # Far from every bucket's aspect: the ends are cut off.
    ((6000, 600), (2048, 512), (5120, 512), (1536, 0)),
]


def test_crop_geometries_computed_by_hand():
    for size, *expected in BY_HAND:
        p = crop_geometry(*size, SDXL)
        found = [(p.width, p.height), (p.resized_width, p.resized_height), (p.crop_left, p.crop_top)]
        assert found == expected, size


def test_of_two_shapes_as_close_the_larger_is_taken():
    rule = BucketRule(resolution=256, min_side=64, max_side=1024, upscale=True)
    # 1:6 is as far from 1:4 (128x512) as from 1:9 (64x576).
    assert {(128, 512), (64, 576)} <= set(bucket_shapes(rule))
    assert (crop_geometry(8, 48, rule).width, crop_geometry(8, 48, rule).height) == (128, 512)
    assert (crop_geometry(48, 8, rule).width, crop_geometry(48, 8, rule).height) == (512, 128)


def test_a_small_image_is_refused_with_its_size_or_enlarged():
    with pytest.raises(TooSmall) as caught:
        crop_geometry(300, 200, SD15)
    assert caught.value.reason == str(caught.value)
    assert "300x200" in caught.value.reason and "256x192" in caught.value.reason and "256" in caught.value.reason
    p = crop_geometry(300, 200, LARGER)
    assert (p.width, p.height, p.resized_width, p.resized_height) == (640, 384, 640, 427)


def test_the_smallest_image_that_is_not_too_small():
    assert (crop_geometry(256, 256, SD15).width, crop_geometry(256, 256, SD15).height) == (256, 256)
    with pytest.raises(TooSmall):
        crop_geometry(256, 255, SD15)


def test_a_rule_without_shapes_is_refused():
    with pytest.raises(UserError, match=r"sides from 600 to 700 .* 512x512"):
        BucketRule(resolution=512, min_side=600, max_side=700)


def test_time_ids_hold_the_true_sizes_and_the_crop_mirrored_when_flipped():
    p = crop_geometry(4001, 3000, SDXL)
    assert (p.resized_width, p.width, p.crop_left) == (1195, 1152, 21)
    assert p.time_ids(flip=False, convention="image") == (3000, 4001, 0, 21, 896, 1152)
    # 43 columns are cut off: 21 on the left, 22 on the right, which is left in the mirrored picture.
    assert p.time_ids(flip=True, convention="image") == (3000, 4001, 0, 22, 896, 1152)


def test_time_ids_by_the_bucket_hold_its_size_alone():
    for flip in (False, True):
        assert crop_geometry(3000, 4000, SDXL).time_ids(flip, "bucket") == (1152, 896, 0, 0, 1152, 896), flip
