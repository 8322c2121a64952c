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


def record(step: int, **changes: float | None) -> dict[str, float | None]:
    timestep_bins = {f"loss_by_timestep/{timestep_bin}": float(timestep_bin) for timestep_bin in range(4)}
    return {"step": step, "loss": 1.0 / step, "lr": 1e-4, "grad_norm": 0.5, **timestep_bins, **changes}


def test_curves_of_a_run_with_holes(tmp_path):
    """A step may have no sample in a quarter, and no norm; a run may be one step long."""
    holes = {"loss_by_timestep/2": None, "grad_norm": None}
    for name, records in {"long": [record(1), record(2, **holes), record(3)], "short": [record(1, **holes)]}.items():
        plots.training_curves(records, tmp_path / f"{name}.png", name)
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.size == (1100, 770)


def test_points_skip_what_has_no_value():
    records = [record(1), record(2, grad_norm=None), record(3, grad_norm=0.25)]
    assert plots._points(records, "grad_norm") == ([1, 3], [0.5, 0.25])


def test_smoothing_has_no_bias_at_its_start():
    # Of a constant it is that constant from the first value on: Adam's correction. The tolerance is rounding in float64.
    assert plots.smooth([3.0] * 50) == pytest.approx([3.0] * 50, rel=1e-12)
    # By hand, factor 0.5: 4; (0.5 * 2 + 0.5 * 8) / 0.75; (0.5 * 5 + 0.5 * 1) / 0.875.
    assert plots.smooth([4.0, 8.0, 1.0], factor=0.5) == pytest.approx([4.0, 5 / 0.75, 3 / 0.875], rel=1e-12)
    assert plots.smooth([]) == []
