"""Image files with far too many parts are refused before they are decoded; sound ones are not."""

import io
import struct
import zlib

import pytest
from PIL import Image

from sushi_research.data.images import BadImage, decode


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def saved(format: str, **options: object) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(data, format, **options)
    return data.getvalue()


def with_chunks(*chunks: bytes) -> bytes:
    png = saved("PNG")
    return png[:33] + b"".join(chunks) + png[33:]


def with_segments(count: int) -> bytes:
    jpeg = saved("JPEG")
    return jpeg[:2] + (b"\xff\xe1\0\x0aExif\0\0MM") * count + jpeg[2:]


def with_scans(count: int) -> bytes:
    jpeg = saved("JPEG", progressive=True)
    last = jpeg.rindex(b"\xff\xda")
    return jpeg[:-2] + jpeg[last:-2] * count + b"\xff\xd9"


PROFILE = chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(1000)))
TOO_MANY = {
    "more than 250,000 chunks": with_chunks(chunk(b"prVt", b"") * 250_001),
    "more than 8 colour profiles": with_chunks(PROFILE * 9),
    "more than 8 colour profiles, EXIF": with_chunks(chunk(b"zTXt", b"Raw profile type exif\0\0") * 9),
    "more than 8 Exif segments": with_segments(9),
    "more than 200 scans": with_scans(200),
    "a side may have at most 65,535": b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 65_536, 8, 2, 0, 0, 0))
    + chunk(b"IDAT", zlib.compress(bytes(4 * 65_536)))
    + chunk(b"IEND", b""),
}


def test_a_file_of_too_many_parts_is_refused() -> None:
    for reason, data in TOO_MANY.items():
        with pytest.raises(BadImage, match=reason):
            decode(data)


def test_many_parts_of_a_sound_file_are_decoded() -> None:
    for data in (
        with_chunks(chunk(b"prVt", b"") * 1000),
        with_scans(100),
        saved("JPEG", exif=b"Exif\0\0" + b"MM\0*\0\0\0\x08\0\0\0\0\0\0"),
    ):
        assert decode(data).size == (16, 16)
