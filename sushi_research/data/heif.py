"""AVIF and HEIC, two kinds of one container (ISO/IEC 23008-12): reads the colours of both; HEIC itself needs an extra."""

from __future__ import annotations

import functools

# Major brands of HEIC, and those of containers that may hold it too.
_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
# A box "colr" of the kind "nclx" has three codes of 16 bits, and a byte whose first bit says whether the range is full.
_NCLX = b"colrnclx"
NEEDS_EXTRA = "HEIC needs an extra: install it (pip install --editable '.[heic]'), or convert the image to jpg"


def is_heic(data: bytes) -> bool:
    """Whether a file that Pillow cannot read is HEIC by its brand."""
    return data[4:8] == b"ftyp" and data[8:12] in _BRANDS


@functools.cache
def can_read() -> bool:
    """Whether HEIC can be read: the extra is installed. Pillow then knows the format HEIF."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def colour_code(data: bytes) -> tuple[int, int, int, int] | None:
    """(primaries, transfer function, 0, 1) of an AVIF or HEIC file, code points of ITU-T H.273 for its pixels as RGB, as
    `png.colour_code`; None if it has none, or is another file."""
    at = data.find(_NCLX) if data[4:8] == b"ftyp" else -1
    if at < 0 or at + len(_NCLX) + 4 > len(data):
        return None
    primaries, transfer = (int.from_bytes(data[start : start + 2], "big") for start in (at + 8, at + 10))
    return primaries, transfer, 0, 1
