"""Image output of a run: labelled sample grids and LoRA scale sweeps."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from sushi_research.files import CannotWrite, write_atomic
from sushi_research.user_files import kind_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

MARGIN = 8
# Smaller images are enlarged to this width in pixels.
SMALLEST_CELL = 160
# Of all pictures of a grid on a page, which embeds them: about 4 MB as PNG.
PAGE_PIXELS = 2_000_000
MISSING = "is missing"


@contextlib.contextmanager
def optional(consequence: str) -> Iterator[None]:
    """A block that writes pictures. If one cannot be written, the block ends with a warning that says so, and the `consequence`."""
    try:
        yield
    except CannotWrite as error:
        logger.warning("%s: %s", error.reason, consequence)
    except OSError as error:  # for example matplotlib's cache of fonts, or a picture that cannot be read again
        logger.warning("%s: %s", error, consequence)


def picture_problem(path: Path) -> str | None:
    """What is wrong with a PNG file, as the rest of a sentence; None if it is whole, by the checksums in it."""
    if not path.is_file():
        return MISSING if not os.path.lexists(path) else f"is {kind_of(path)}"
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()
    except Exception:  # Pillow raises nearly any exception on damaged bytes
        return "is empty" if path.stat().st_size == 0 else "is damaged"
    return None


def for_page(rows: Sequence[Sequence[Image.Image]]) -> list[list[Image.Image]]:
    """The images of a grid on a page, reduced to PAGE_PIXELS in all if they have more, but not below the smallest cell."""
    images = [image for row in rows for image in row]
    share = (PAGE_PIXELS / sum(image.width * image.height for image in images)) ** 0.5
    share = max(share, SMALLEST_CELL / max(image.width for image in images))
    if share >= 1:
        return [list(row) for row in rows]
    size = lambda image: (max(1, int(image.width * share)), max(1, int(image.height * share)))  # noqa: E731
    return [[image.resize(size(image), Image.Resampling.LANCZOS) for image in row] for row in rows]


def grid(rows: Sequence[Sequence[Image.Image]], row_labels: Sequence[str], column_labels: Sequence[str]) -> Image.Image:
    """A grid of images, with row labels on the left and column labels on top.

    Cells are as wide as the widest image (at least 160 pixels), and as high as the highest of their row. Images keep their size.
    """
    assert len(rows) == len(row_labels) and all(len(row) == len(column_labels) for row in rows)
    widest = max(image.width for row in rows for image in row)
    scale = max(1, -(-SMALLEST_CELL // widest))
    cell_width = widest * scale
    heights = [max(image.height for image in row) * scale for row in rows]
    font = ImageFont.load_default(size=max(12, cell_width // 14))
    line = font.size * 5 // 4
    label_width = max(cell_width, 10 * font.size)
    top = 2 * MARGIN + line
    width = label_width + len(column_labels) * (cell_width + MARGIN) + MARGIN
    canvas = Image.new("RGB", (width, top + sum(heights) + len(rows) * MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    for column, label in enumerate(column_labels):
        left = label_width + MARGIN + column * (cell_width + MARGIN)
        draw.text((left + cell_width / 2, MARGIN), label, fill="black", font=font, anchor="ma")
    characters = max(8, int(label_width / (font.size * 0.55)))
    for number, (row, label) in enumerate(zip(rows, row_labels, strict=True)):
        upper = top + sum(heights[:number]) + number * MARGIN
        lines = textwrap.wrap(label, characters)[: max(1, heights[number] // line)]
        draw.multiline_text((MARGIN, upper), "\n".join(lines), fill="black", font=font)
        for column, image in enumerate(row):
            left = label_width + MARGIN + column * (cell_width + MARGIN)
            resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
            canvas.paste(image.resize((image.width * scale, image.height * scale), resample), (left, upper))
    return canvas


def lora_scale_sweep(points: Sequence[tuple[float, dict[str, float]]], path: Path) -> None:
    """Plots validation loss minus the base's, and drift, against the LoRA scale; bars are two standard errors.

    `points` are (LoRA scale, metrics) of one or several adapters; the base is the point at 0.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    titles = {
        "evaluation/loss_over_base": "validation loss, over the base's",
        "evaluation/drift": "drift from the base",
    }
    for axes, (name, title) in zip(figure.subplots(1, 2).flat, titles.items(), strict=True):
        known = [(lora_scale, found) for lora_scale, found in points if name in found]
        errors = [2 * found.get(f"{name}_se", 0.0) for _, found in known]
        axes.errorbar([s for s, _ in known], [found[name] for _, found in known], errors, fmt="o", capsize=3)
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set_title(title)
        axes.set_xlabel("LoRA scale")
        axes.grid(alpha=0.3)
    write_figure(figure, path)


def write_figure(figure: Figure, path: Path) -> None:
    """Writes a matplotlib figure atomically as PNG (`figure_png`). UserError if that fails."""
    write_atomic(path, figure_png(figure))


def figure_image(figure: Figure) -> Image.Image:
    """A matplotlib figure as an image (`figure_png`)."""
    return Image.open(io.BytesIO(figure_png(figure)))


def figure_png(figure: Figure) -> bytes:
    """A matplotlib figure as PNG.

    Names are shown as they are: a "$" in one begins no formula. A letter that the font lacks is a box, without a warning.
    """
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if not text.get_text().startswith("$\\mathdefault"):  # the numbers of a logarithmic axis
            text.set_parse_math(False)
    data = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure.savefig(data, dpi=110)
    return data.getvalue()
