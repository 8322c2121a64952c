"""Counts the parts of PNG and JPEG files, before a decoder handles each of them: far too many take minutes or gigabytes.

An ordinary file has a few of each. libpng and libjpeg-turbo leave such limits to their callers (libjpeg-turbo: "Two Issues with the
JPEG Standard", about scans without end).
"""

from __future__ import annotations

from sushi_research.data import png

# Of a PNG: 1 GiB in the smallest chunks that encoders write, 8 KiB, has half as many.
_MOST_CHUNKS = 250_000
# Colour profiles, EXIF and XMP of a PNG, each of which is decompressed; Exif segments of a JPEG, which Pillow joins one by one.
_MOST_METADATA = 8
# Of a JPEG: encoders write about 10, optimizers up to 100. Each takes as long as the whole image.
_MOST_SCANS = 200


def problem(data: bytes) -> str | None:
    """Why a file has too many parts to be decoded; None if it has not, or is neither PNG nor JPEG."""
    if data.startswith(png.SIGNATURE):
        return _problem_of_png(data)
    if data.startswith(b"\xff\xd8"):
        return _problem_of_jpeg(data)
    return None


def _problem_of_png(data: bytes) -> str | None:
    count = metadata = 0
    for kind, start, _ in png.chunks(data):
        count += 1
        metadata += kind in (b"iCCP", b"eXIf") or png.is_kept_text(data, kind, start)
        if count > _MOST_CHUNKS:
            return f"it has more than {_MOST_CHUNKS:,} chunks: save it again"
        if metadata > _MOST_METADATA:
            return f"it has more than {_MOST_METADATA} colour profiles, EXIF and XMP: save it again"
    return None


def _problem_of_jpeg(data: bytes) -> str | None:
    # In coded pixels no byte FF is followed by DA. A file of several pictures (MPO) has the scans of each.
    if data.count(b"\xff\xda") > _MOST_SCANS:
        return f"it has more than {_MOST_SCANS} scans: save it again"
    position, exif = 2, 0
    while position + 4 <= len(data) and data[position] == 0xFF and data[position + 1] != 0xDA:
        exif += data.startswith(b"Exif\0\0", position + 4)
        if exif > _MOST_METADATA:
            return f"it has more than {_MOST_METADATA} Exif segments: save it again"
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return None
