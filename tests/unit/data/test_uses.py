"""How often an epoch uses the images of several sets."""

from pathlib import Path

import numpy as np
import pytest

from sushi_research.config import SDXLTraining
from sushi_research.config.sets import sets_of
from sushi_research.data.samples import Sample, Samples
from sushi_research.data.uses import uses_of


def uses(sets: list[dict], counts: list[int], repeats: int = 1) -> list[list[int]]:
    """The uses of the images of each set, in the order of their content."""
    config = SDXLTraining.model_validate(
        {"model": {"base": "b"}, "data": {"sets": [{"path": "p"} | each for each in sets]}, "train": {"steps": 9}}
    )
    samples = [
        Sample(
            f"{number}/{image}.png", f"{image:016x}{number:016x}", "a", 64, 64, repeats, Path().read_bytes, set=number
        )
        for number, count in enumerate(counts)
        for image in reversed(range(count))
    ]
    found = uses_of(Samples.of(samples), sets_of(config))
    return [found[np.array([sample.set == number for sample in samples])][::-1].tolist() for number in range(len(sets))]


@pytest.mark.parametrize(
    ("sets", "counts", "expected"),
    [
        ([{}, {}], [3, 2], [[1, 1, 1], [1, 1]]),
        ([{"repeats": 3}, {}], [1, 2], [[3], [1, 1]]),
        # As often as each other: 5 of each, the set of 2 images 2.5 times each.
        ([{"weight": 1}, {"weight": 1}], [5, 2], [[1] * 5, [3, 2]]),
        # 3:1. The second set has the most images for its weight; the first then has 6 uses.
        ([{"weight": 3}, {"weight": 1.0}], [4, 2], [[2, 2, 1, 1], [1, 1]]),
        ([{"weight": 1}, {"weight": 1}], [3, 3], [[1] * 3, [1] * 3]),
        # A weight is of what is shown: two resolutions are two items per use.
        ([{"weight": 1}, {"weight": 1, "resolutions": [512, 1024]}], [4, 2], [[1] * 4, [1, 1]]),
        # A resolution that is given twice is one.
        ([{"weight": 1}, {"weight": 1, "resolutions": [512, 512]}], [2, 2], [[1, 1], [1, 1]]),
        # Regularisation images are used as often as the training images, all sets of them together.
        ([{}, {"role": "regularisation"}], [4, 2], [[1] * 4, [2, 2]]),
        ([{"repeats": 5}, {"role": "regularisation"}, {"role": "regularisation"}], [1, 1, 2], [[5], [2], [2, 1]]),
        ([{}, {"role": "regularisation"}], [2, 3], [[1, 1], [1, 1, 0]]),
        ([{}, {"role": "regularisation", "repeats": 2}], [4, 1], [[1] * 4, [2]]),
        ([{"weight": 1}, {"weight": 0.5, "role": "regularisation"}], [4, 1], [[1] * 4, [2]]),
    ],
)
def test_uses_of_sets(sets, counts, expected):
    found = uses(sets, counts)
    assert [sorted(each, reverse=True) for each in found] == expected
    # The remaining uses go to the first images by content; in two regularisation sets, to those of both.
    assert all(each == sorted(each, reverse=True) for each in found)


def test_numbers_of_folders_count_within_a_set():
    assert uses([{"repeats": 2}, {}], [1, 1], repeats=10) == [[20], [10]]
    assert uses([{"weight": 1}, {"weight": 2}], [1, 1], repeats=10) == [[10], [20]]
