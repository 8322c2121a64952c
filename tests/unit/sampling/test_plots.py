"""Grids and curves: every picture in its place, every curve through its own points."""

import numpy as np
import pytest
from PIL import Image

from sushi_research.sampling import plots


def plain(colour: tuple[int, int, int], size: tuple[int, int] = (200, 100)) -> Image.Image:
    return Image.new("RGB", size, colour)


def corner(image: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """(left, top, number of pixels) of what has a colour in a sheet."""
    found = (np.asarray(image) == colour).all(axis=-1)
    rows, columns = np.nonzero(found)
    return int(columns.min()), int(rows.min()), int(found.sum())


def test_a_grid_has_every_picture_whole_and_in_its_place():
    colours = [[(250, 0, 0), (0, 250, 0), (0, 0, 250)], [(250, 250, 0), (0, 250, 250), (250, 0, 250)]]
    image = plots.grid([[plain(c) for c in row] for row in colours], ["one", "two"], ["a", "b", "c"])
    corners = [[corner(image, colour) for colour in row] for row in colours]
    assert {pixels for row in corners for *_, pixels in row} == {200 * 100}
    for row in corners:  # a row shares its top; columns are a picture and a margin apart
        assert len({top for _, top, _ in row}) == 1
        assert [left - row[0][0] for left, _, _ in row] == [0, 208, 416]
    assert corners[1][0][1] - corners[0][0][1] == 108
    assert corners[0][0][0] == corners[1][0][0]
    assert image.size == (corners[0][2][0] + 208, corners[1][0][1] + 108)


def test_labels_are_drawn_in_the_margins():
    cells = [[plain((250, 0, 0))]]
    blank, labelled = (np.asarray(plots.grid(cells, [row], [column])) for row, column in (("", ""), ("row", "column")))
    changed = np.argwhere((blank != labelled).any(axis=-1))
    left, top, _ = corner(plots.grid(cells, [""], [""]), (250, 0, 0))
    over, left_of = changed[changed[:, 0] < top], changed[changed[:, 1] < left]
    assert len(over) and len(left_of) and len(over) + len(left_of) == len(changed)


def test_small_pictures_are_enlarged_pixel_by_pixel():
    picture = Image.fromarray(np.arange(64 * 32 * 3, dtype=np.uint8).reshape(32, 64, 3))
    image = np.asarray(plots.grid([[picture]], [""], [""]))
    # 64 pixels become 192: the least multiple that reaches 160.
    inside = image[-96 - 8 : -8, -192 - 8 : -8]
    assert np.array_equal(inside[::3, ::3], np.asarray(picture))
    assert np.array_equal(inside, np.asarray(picture.resize((192, 96), Image.Resampling.NEAREST)))


def test_pictures_of_other_shapes_keep_theirs():
    image = plots.grid([[plain((250, 0, 0)), plain((0, 250, 0), (100, 180))]], [""], ["", ""])
    assert corner(image, (250, 0, 0))[2] == 200 * 100
    assert corner(image, (0, 250, 0))[2] == 100 * 180


def test_each_row_is_as_high_as_its_highest_picture():
    rows = [[plain((250, 0, 0), (200, 300))], [plain((0, 250, 0), (160, 80))], [plain((0, 0, 250))]]
    image = plots.grid(rows, [""] * 3, [""])
    tops = [corner(image, colour)[1] for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    assert [top - tops[0] for top in tops] == [0, 308, 308 + 88] and image.height == tops[2] + 108


def test_many_large_pictures_are_reduced_for_a_page():
    picture = plain((250, 0, 0), (1024, 512))
    [row] = plots.for_page([[picture] * 9])
    assert 0.95 * plots.PAGE_PIXELS < sum(image.width * image.height for image in row) <= plots.PAGE_PIXELS
    assert {image.width / image.height for image in row} == {2.0} and row[0].getpixel((0, 0)) == (250, 0, 0)
    assert plots.for_page([[picture] * 3]) == [[picture] * 3]
    rows = plots.for_page([[picture] * 12] * 12)
    assert plots.grid(rows, [""] * 12, [""] * 12).width < 14 * (plots.SMALLEST_CELL + plots.MARGIN)


def test_a_row_without_its_label_is_a_mistake():
    with pytest.raises(AssertionError):
        plots.grid([[plain((0, 0, 0))]], [], ["a"])
