"""Small versions of pictures for a run's page: of its samples, and of its training images, which thumbnails.json holds."""

from __future__ import annotations

import base64
import functools
import io
import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow.compute
from PIL import Image, ImageOps

from sushi_research.config.sets import ResolvedSet
from sushi_research.data import images, masks
from sushi_research.data.dataset_hash import dataset_hash
from sushi_research.data.items import Items
from sushi_research.data.samples import Sample
from sushi_research.errors import UserError
from sushi_research.files import write_json
from sushi_research.reports.page import Picture
from sushi_research.runs import records
from sushi_research.runs.run_folder import RunFolder

# Of the page's training images, and of each the longer side in pixels.
MOST_IMAGES, SIDE = 60, 256
# A larger colour profile is not copied into a thumbnail: its colours are converted.
MOST_PROFILE_BYTES = 4096
# A PNG file that is not larger than this, in bytes, is on a page as it is.
SMALL_FILE = 60_000


class Thumbnail(records.Record):
    """A training image: `jpeg` is a file in base64, "" if the image could not be read again."""

    name: str
    caption: str
    repeats: int
    jpeg: str


class Thumbnails(records.Record):
    """thumbnails.json: `dataset` is the hash of the training data, `count` the number of its images."""

    dataset: str
    count: records.Count
    images: list[Thumbnail]


def write(run: RunFolder, items: Items, sets: Sequence[ResolvedSet] = ()) -> None:
    """Writes thumbnails.json of a run's training images, unless it is there and of the same data. CannotWrite if that fails.

    The background of masked images has a colour over it. `sets` are those of the run.
    """
    dataset = dataset_hash(items)
    try:
        if os.path.lexists(run.thumbnails) and read(run)["dataset"] == dataset:
            return
    except UserError:
        pass  # damaged: made again
    samples = items.used
    by_name = pyarrow.compute.sort_indices(samples.names).to_numpy()
    shown = [samples[row] for row in spaced(by_name, MOST_IMAGES)]
    found = [
        {"name": each.name, "caption": each.caption, "repeats": each.repeats, "jpeg": _of_sample(each, sets)}
        for each in shown
    ]
    write_json(run.thumbnails, {"dataset": dataset, "count": len(samples), "images": found})


def read(run: RunFolder) -> dict:
    """The content of thumbnails.json (`Thumbnails`). UserError if it is damaged."""
    return records.read_as(run.thumbnails, Thumbnails, "the page is without its training images")


def pictures(run: RunFolder) -> tuple[list[Picture], int]:
    """(the training images with their captions, the number of all of them). UserError if the file is damaged."""
    found = read(run)
    shown = []
    for each in found["images"]:
        repeats = f" (x {each['repeats']})" if each["repeats"] != 1 else ""
        try:
            jpeg = base64.b64decode(each["jpeg"], validate=True)
        except ValueError:
            jpeg = b""
        if jpeg:
            shown.append(Picture(jpeg, (each["caption"] or "(no caption)") + repeats))
    return shown, found["count"]


def spaced(values: Sequence, most: int) -> list:
    """At most `most` of the values, evenly spaced, with the first and the last."""
    if len(values) <= most:
        return list(values)
    return [values[round(place * (len(values) - 1) / (most - 1))] for place in range(most)]


def _of_sample(sample: Sample, sets: Sequence[ResolvedSet]) -> str:
    try:
        small = of_file(sample.load(), SIDE)
        if sample.mask_hash:
            small = with_mask(small, sample, sets[sample.set].masks.invert)
        return base64.b64encode(small).decode()
    except Exception:  # it was read before; a page is no reason to stop a run
        return ""


def with_mask(small: bytes, sample: Sample, invert: bool) -> bytes:
    """A thumbnail of an image with a colour over the background of its mask. Raises UserError if the mask cannot be read."""
    with Image.open(io.BytesIO(small)) as image:
        shown = masks.overlaid(image.convert("RGB"), masks.of_sample(sample), invert=invert)
        return jpeg(shown, max(shown.size), image.info.get("icc_profile") or b"")


def of_file(data: bytes, side: int) -> bytes:
    """An image file as a JPEG whose longer side has at most `side` pixels. The file was decoded before without an error."""
    with images.open_file(data) as image:
        profile = image.info.get("icc_profile") or b""
        if image.format == "JPEG" and image.mode == "RGB" and len(profile) <= MOST_PROFILE_BYTES:
            image.draft("RGB", (2 * side, 2 * side))  # decodes an eighth of a large photo's pixels
            ImageOps.exif_transpose(image, in_place=True)
            return jpeg(image, side, profile)
    return jpeg(images.decode(data), side)


def jpeg(image: Image.Image, side: int, profile: bytes = b"") -> bytes:
    """An image as a JPEG file whose longer side has at most `side` pixels, with a colour profile if one is given."""
    image = image.convert("RGB")
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=86, icc_profile=profile or None)
    return stream.getvalue()


def of_picture(path: Path, side: int) -> bytes:
    """A picture of a run, a whole PNG file, reduced to `side` pixels: its bytes if it is small already."""
    state = path.stat()
    return _of_picture(path, side, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=1024)  # a run's page shows the same pictures at each sample grid
def _of_picture(path: Path, side: int, mtime_ns: int, size: int) -> bytes:
    data = path.read_bytes()
    if size <= SMALL_FILE:
        return data
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        return jpeg(image, side)
