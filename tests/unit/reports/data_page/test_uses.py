"""The page about a data set counts how an epoch uses its images."""

import numpy as np
import pytest
from PIL import Image

from sushi_research.data.buckets import CropGeometry
from sushi_research.data.items import Items
from sushi_research.data.samples import Sample, Samples
from sushi_research.reports.data_page.captions import frequencies
from sushi_research.reports.data_page.pictures import framed
from sushi_research.reports.data_page.uses import spread, uses_of

# original, resized, crop and bucket: (height, width) or (top, left)
WHOLE = (64, 64, 32, 32, 0, 0, 32, 32)
ENLARGED = (32, 64, 64, 128, 0, 32, 64, 64)


def items(*found):
    """Items of two images, from (row, geometry)."""
    samples = [Sample(name, str(number) * 32, name, 64, 64, 1, bytes) for number, name in enumerate("ab")]
    rows, geometries = zip(*found, strict=True)
    instances = np.zeros(len(rows), np.int32)
    return Items(Samples.of(samples), np.array(rows), instances, np.array(geometries, np.int32))


def test_uses_are_counted_by_image_and_geometry():
    uses = uses_of(items((0, WHOLE), (0, ENLARGED), (0, WHOLE), (1, WHOLE), (1, ENLARGED), (0, WHOLE)))
    found = [(use.sample.name, use.bucket, use.count) for use in uses]
    assert found == [("a", "32x32", 3), ("b", "32x32", 1), ("a", "64x64", 1), ("b", "64x64", 1)]
    assert uses.buckets() == [("32x32", slice(0, 2)), ("64x64", slice(2, 4))]
    assert uses.scales.tolist() == [0.5, 0.5, 2, 2] and uses.cut_away.tolist() == [0, 0, 0.5, 0.5]
    assert [use.scale for use in uses] == uses.scales.tolist()


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 1000])
def test_a_choice_is_spread_over_all(count):
    places = spread(count, 8)
    assert len(places) == min(count, 8) == len(set(places))
    assert not places or (places[0], places[-1]) == (0, count - 1)


def test_the_frame_is_where_the_crop_is():
    geometry = CropGeometry(100, 200, 50, 100, 10, 30, 30, 60)
    drawn = np.asarray(framed(Image.new("RGB", (400, 200)), [geometry])).astype(int)
    frame = (drawn == drawn[40, 120]).all(axis=2)
    down, across = np.nonzero(frame)
    assert (down.min(), down.max(), across.min(), across.max()) == (40, 159, 120, 359)
    assert (drawn[50:150, 130:350] == 0).all() and (drawn[:40] > 100).all(), "only what is cut away is paler"


def test_tags_are_those_of_captions_with_commas():
    tags, words = frequencies({"1cat, Sitting,1cat ,": 2, "a cat's tail": 3, "a dog": 1})
    assert tags == {"1cat": 2, "sitting": 2} and words == {"a": 4, "cat's": 3, "tail": 3, "dog": 1}
