"""Synthetic data sets of any size for `benchmarking.data`: small images, each with a caption of its own."""

from __future__ import annotations

import functools
import shutil
import zlib
from pathlib import Path

import numpy as np

# Eight shapes (width, height), so that there are several buckets.
SIDES = ((64, 64), (72, 56), (56, 72), (80, 48), (48, 80), (96, 40), (40, 96), (64, 64))
ROWS_PER_PART = 10_000


def image(number: int) -> bytes:
    """A PNG of 8x8 coloured squares. The images of different numbers differ, and none resembles another."""
    width, height = SIDES[number % len(SIDES)]
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes((8, 3, 0, 0, 0))  # 8 bits, with a palette
    colours = np.random.Generator(np.random.Philox(key=number)).bytes(3 * 64)
    chunks = ((b"IHDR", header), (b"PLTE", colours), (b"IDAT", _squares(width, height)), (b"IEND", b""))
    parts = [
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big") for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@functools.cache
def _squares(width: int, height: int) -> bytes:
    """The compressed pixels: the number of the square that each is in, 0 to 63."""
    squares = np.arange(height)[:, None] * 8 // height * 8 + np.arange(width) * 8 // width
    return zlib.compress(np.pad(squares.astype(np.uint8), ((0, 0), (1, 0))).tobytes())  # filter 0 before each row


def caption(number: int) -> str:
    return f"number {number}, squares, {('red', 'green', 'blue')[number % 3]}, photo"


def save_rows(folder: Path, count: int) -> Path:
    """An HF data set as `save_to_disk` writes it, with the columns image and text; one that is there is kept."""
    import datasets
    import pyarrow as pa
    from datasets.arrow_writer import ArrowWriter

    if (folder / "state.json").exists():
        return folder
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    folder.parent.mkdir(parents=True, exist_ok=True)
    rows = folder.with_suffix(".arrow")
    with ArrowWriter(path=str(rows), features=features) as writer:
        for start in range(0, count, ROWS_PER_PART):
            numbers = range(start, min(count, start + ROWS_PER_PART))
            cells = pa.array([{"bytes": image(number), "path": None} for number in numbers], features["image"].pa_type)
            writer.write_table(pa.table({"image": cells, "text": [caption(number) for number in numbers]}))
        writer.finalize()
    datasets.Dataset.from_file(str(rows)).save_to_disk(str(folder), max_shard_size="500MB")
    rows.unlink()
    return folder


def save_files(folder: Path, count: int) -> Path:
    """A folder of image files with captions, 1,000 images in each folder below it; one that is there is kept."""
    if folder.exists():
        return folder
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    for number in range(count):
        inside = part / f"{number // 1000:04}"
        if number % 1000 == 0:
            inside.mkdir(parents=True)
        (inside / f"{number}.png").write_bytes(image(number))
        (inside / f"{number}.txt").write_text(caption(number))
    return part.rename(folder)
