"""Samples that a scan has sorted are not sorted again, and distinct numbers are found without sorting all."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sushi_research.data.columns import distinct_numbers
from sushi_research.data.samples import Sample, Samples

rows = st.lists(st.tuples(st.integers(0, 4), st.sampled_from("ab"), st.sampled_from("xyz")), max_size=12)


@given(rows, st.booleans())
def test_the_order_is_by_image_caption_and_name(rows, is_sorted):
    rows = sorted(rows, key=lambda row: row[0]) if is_sorted else rows
    samples = Samples.of([Sample(name, f"{image:032}", text, 1, 1, 1, bytes) for image, text, name in rows])
    order = samples.by_content()
    assert sorted(order.tolist()) == list(range(len(rows)))
    assert [rows[row] for row in order] == sorted(rows)


@given(st.lists(st.integers(-(2**40), 2**40) | st.integers(0, 3)))
def test_distinct_numbers_are_those_of_numpy(numbers):
    column = np.array(numbers, np.int64)
    for found, expected in zip(distinct_numbers(column), np.unique(column, return_inverse=True), strict=True):
        assert found.tolist() == expected.tolist()
