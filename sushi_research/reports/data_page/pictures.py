"""The pictures of a page about a data set: images with their crop, copies of one another, and what the VAE makes of them."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL import Image, ImageDraw

from sushi_research.config.sets import ResolvedSet
from sushi_research.data.buckets import CropGeometry
from sushi_research.data.samples import Sample
from sushi_research.progress import progress
from sushi_research.reports import thumbnails
from sushi_research.reports.data_page.decoded import ENLARGED, DecodedImage
from sushi_research.reports.page import Block, Picture

# The longer side of a picture on the page, in pixels; of those of the VAE, which show details, a larger one.
SIDE, LARGE_SIDE = 320, 640
# How much of what is cropped away is covered with white, and the frame of the crop.
COVERED, FRAME = 0.65, "#e4573d"
MISSING = Image.new("RGB", (SIDE, SIDE), "#98a4a0")


def picture_of(sample: Sample, sets: Sequence[ResolvedSet], crops: Sequence[CropGeometry] = ()) -> bytes:
    """A JPEG of an image, with its crops framed if it loses something to them; a grey one if it can no longer be read.

    The background of its mask has a colour over it. `sets` are those of the run.
    """
    try:
        data = thumbnails.of_file(sample.read(), SIDE)
        if sample.mask_hash:
            data = thumbnails.with_mask(data, sample, sets[sample.set].masks.invert)
        small = Image.open(io.BytesIO(data))
        small.load()
    except Exception:  # it was read before; one picture is no reason to have no page
        return thumbnails.jpeg(MISSING, SIDE)
    profile = small.info.get("icc_profile") or b""
    if any(crop.cut_away > 0 for crop in crops):
        small = framed(small, crops)
    return thumbnails.jpeg(small, SIDE, profile)


def framed(image: Image.Image, crops: Sequence[CropGeometry]) -> Image.Image:
    """An image of any size with a frame around each crop, and what is in none of them paler."""
    pale = Image.blend(image, Image.new("RGB", image.size, "white"), COVERED)
    boxes = [_box(image, crop) for crop in crops]
    for box in boxes:
        pale.paste(image.crop(box), box[:2])
    for left, top, right, bottom in boxes:
        frame = (left, top, max(left, right - 1), max(top, bottom - 1))
        ImageDraw.Draw(pale).rectangle(frame, outline=FRAME, width=2)
    return pale


def _box(image: Image.Image, crop: CropGeometry) -> tuple[int, int, int, int]:
    """Where a crop is in a picture of its whole image: left, top, right, bottom."""
    across, down = image.width / crop.resized_width, image.height / crop.resized_height
    return (
        round(crop.crop_left * across),
        round(crop.crop_top * down),
        round((crop.crop_left + crop.width) * across),
        round((crop.crop_top + crop.height) * down),
    )


def make(wanted: Sequence[Callable[[], bytes]], shown: bool) -> list[bytes]:
    """Makes pictures, one thread per core, with a progress bar if `shown`."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        found = pool.map(lambda each: each(), wanted)
        return list(progress(found, total=len(wanted), description="pictures", unit="image", disable=not shown))
    finally:
        pool.shutdown(cancel_futures=True)


def decoded_blocks(found: Iterable[DecodedImage]) -> list[Block]:
    """For each image: its crop, what the VAE makes of it, and the difference."""
    blocks = []
    for each in found:
        text = f"{each.use.sample.name}, {each.use.bucket}: {each.mean_error:.1f} of 255 off on average, PSNR {each.psnr:.1f} dB"
        pictures = [
            Picture(thumbnails.jpeg(Image.fromarray(each.crop), LARGE_SIDE), "the crop"),
            Picture(thumbnails.jpeg(Image.fromarray(each.decoded), LARGE_SIDE), "decoded from its latents"),
            Picture(thumbnails.jpeg(each.difference, LARGE_SIDE), f"the difference, x {ENLARGED}"),
        ]
        blocks.append(Block("series", text, pictures=pictures))
    return blocks
