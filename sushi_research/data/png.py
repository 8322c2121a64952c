"""The chunks of PNG files: leaves out text, and reads the colour information that Pillow does not give."""

from __future__ import annotations

from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXT = (b"tEXt", b"zTXt", b"iTXt")
# Text in which programs keep EXIF and XMP, where Pillow looks for the orientation.
_KEPT = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")


def without_text(data: bytes) -> bytes:
    """A PNG file without its text, such as the workflow that made the image; other files as they are.

    Pillow would decompress all of it and refuse more than 1 MiB.
    """
    kept, position, end = [], len(SIGNATURE), 0
    for kind, start, stop in chunks(data):
        if kind in _TEXT and not is_kept_text(data, kind, start):
            kept.append(data[end:position])
            end = stop + 4  # its checksum
        position = stop + 4
    return b"".join([*kept, data[end:]]) if kept else data


def is_kept_text(data: bytes, kind: bytes, start: int) -> bool:
    """Whether a chunk is text that may hold EXIF or XMP."""
    return kind in _TEXT and data.startswith(_KEPT, start)


def colour_code(data: bytes) -> tuple[int, int, int, int] | None:
    """(primaries, transfer function, matrix, full range) of the cICP chunk, code points of ITU-T H.273; None without one."""
    for kind, start, stop in chunks(data):
        if kind == b"IDAT":
            break
        if kind == b"cICP" and stop - start == 4:
            primaries, transfer, matrix, full_range = data[start:stop]
            return primaries, transfer, matrix, full_range
    return None


def chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yields (type, start, end) of the contents of each whole chunk. Nothing for a file that is no PNG."""
    position = len(SIGNATURE)
    while data.startswith(SIGNATURE) and position + 12 <= len(data):
        start = position + 8
        stop = start + int.from_bytes(data[position : position + 4], "big")
        if stop + 4 > len(data):
            break
        yield data[position + 4 : start], start, stop
        position = stop + 4
