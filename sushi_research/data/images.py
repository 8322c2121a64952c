"""Decodes, resizes and crops images: from file bytes to the pixels that the VAE encodes."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps, PngImagePlugin, UnidentifiedImageError

from sushi_research.data import colour, file_parts, heif, png
from sushi_research.data.buckets import CropGeometry

# Pillow's default limit for an error (twice its MAX_IMAGE_PIXELS): 13,377 x 13,377.
MAX_PIXELS = 178_956_970
# Of a file: MAX_PIXELS of 32 bits, uncompressed, take two thirds of that.
MAX_BYTES = 2**30
# The decompressed size of a PNG's colour profile, EXIF or XMP, in bytes. Pillow's own limit for such a chunk is 1 MiB, and for the
# sum of EXIF and XMP 64 MiB.
# An EXIF of 64 MiB in a PNG's text takes Pillow 1.6 GiB.
MAX_METADATA = 16 << 20
# JPEG's own limit. An image of the same area that is one pixel wide takes four times the memory.
MAX_SIDE = 65_535
# The formats used in image datasets. Pillow supports more, some of them (EPS) by starting other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF")


class BadImage(ValueError):
    """An image that cannot be used; `reason` says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Decoded:
    """A decoded RGB image, and what was done to its colours.

    `converted_from` says which colours were converted to sRGB; "" if the values are those of the file. `transparent`: whether
    it was composited over white. `ignored` says what of the file was not used: colour information, frames; or "". `alpha` is the
    opacity of a transparent image, of mode L.
    """

    image: Image.Image
    converted_from: str = ""
    transparent: bool = False
    ignored: str = ""
    alpha: Image.Image | None = None


def decode(data: bytes) -> Image.Image:
    """The image of `decode_and_describe`."""
    return decode_and_describe(data).image


def decode_and_describe(data: bytes) -> Decoded:
    """Decodes an image file to 8-bit sRGB, with its EXIF rotation applied, composited over white if transparent.

    Colours are converted by the ICC profile, or a PNG's own colour information (`colour.to_srgb`). 16-bit grey is scaled to
    8 bits; CMYK, palettes and other modes are converted. Of a phone's multi-picture JPEG (MPO) or HEIC, the main image is used; of
    an animation the first frame. All pixels are decoded; a PNG's text is not. Thread-safe.

    Raises BadImage for anything but an intact image of at most MAX_PIXELS (according to its header).
    """
    if not data:
        raise BadImage("the file is empty")
    if reason := file_parts.problem(data):
        raise BadImage(reason)
    with _strict_pillow():
        try:
            image = open_file(png.without_text(data))
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BadImage(f"decompression bomb: {width}x{height} pixels is over the limit of {MAX_PIXELS} pixels")
            if max(width, height) > MAX_SIDE:
                raise BadImage(f"{width}x{height} pixels, and a side may have at most {MAX_SIDE:,}")
            # The other frames of an MPO or HEIC are previews, or others of a burst.
            several = image.format not in ("MPO", "HEIF") and getattr(image, "is_animated", False)
            if several and image.format == "TIFF":
                raise BadImage(f"it has {image.n_frames} pages: save the one that is meant as a file of its own")
            if image.format == "PNG" and "transparency" in image.info:
                image.info["transparency"] = _in_eight_bits(image.info["transparency"], image.mode, depth=data[24])
            ImageOps.exif_transpose(image, in_place=True)
            decoded = _opaque_srgb(image, _colour_code(data, image))
            ignored = [decoded.ignored] if decoded.ignored else []
            return (
                replace(decoded, ignored="; ".join([*ignored, "animated: the first frame is used"]))
                if several
                else decoded
            )
        except (BadImage, MemoryError):
            raise
        except colour.NoConversion as error:
            raise BadImage(error.reason) from None
        except UnidentifiedImageError:
            raise BadImage("not an image that Pillow can read as JPEG, PNG, WebP, AVIF, BMP, GIF or TIFF") from None
        except Exception as error:  # Pillow's decoders raise nearly any exception on damaged bytes
            if "MAX_TEXT" in str(error):
                raise BadImage(
                    f"its metadata or colour profile is over {MAX_METADATA >> 20} MiB: save it again"
                ) from None
            kind = "truncated" if "truncated" in str(error).lower() else "damaged"
            raise BadImage(f"{kind}: {str(error) or type(error).__name__}") from error


def open_file(data: bytes) -> Image.Image:
    """An image file of one of the formats, with its pixels not yet decoded. Raises BadImage for HEIC without its extra, and what
    Pillow raises for others."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        if not heif.is_heic(data):
            raise
        if not heif.can_read():
            raise BadImage(heif.NEEDS_EXTRA) from None
        return Image.open(io.BytesIO(data), formats=("HEIF",))


def _colour_code(data: bytes, image: Image.Image) -> tuple[int, int, int, int] | None:
    """The code points of a file's colours. Those of AVIF and HEIC count only without a profile, those of PNG even with one."""
    return png.colour_code(data) or (None if image.info.get("icc_profile") else heif.colour_code(data))


def resize_and_crop(image: Image.Image, geometry: CropGeometry, flip: bool) -> np.ndarray:
    """A decoded image at its bucket's size, uint8 [height, width, 3]: resized (Lanczos), cropped, mirrored if `flip`."""
    assert image.mode == "RGB", image.mode
    pixels = np.asarray(cropped(image, geometry, Image.Resampling.LANCZOS))
    return np.ascontiguousarray(pixels[:, ::-1] if flip else pixels)


def cropped(image: Image.Image, geometry: CropGeometry, filter: Image.Resampling) -> Image.Image:
    """An image of the geometry's original size in any mode, resized and cropped to height x width."""
    assert image.size == (geometry.original_width, geometry.original_height), (image.size, geometry)
    size = (geometry.resized_width, geometry.resized_height)
    left, top = geometry.crop_left, geometry.crop_top
    crop = (left, top, left + geometry.width, top + geometry.height)
    if size[0] * size[1] <= MAX_PIXELS:
        return image.resize(size, filter, reducing_gap=None).crop(crop)
    # A small box that is enlarged: scale only what is used.
    scales = (image.width / size[0], image.height / size[1]) * 2
    box = tuple(edge * scale for edge, scale in zip(crop, scales, strict=True))
    return image.resize((geometry.width, geometry.height), filter, box=box, reducing_gap=None)


def _opaque_srgb(image: Image.Image, colour_code: tuple[int, int, int, int] | None) -> Decoded:
    """An image of any mode in sRGB, composited over white. Decodes the image if necessary."""
    image.load()  # a PNG's EXIF and others' profiles may stand behind the pixels
    info = image.info
    if image.mode == "F":
        raise BadImage("floating-point pixels: save it with 8 bits per channel")
    if image.mode.startswith("I"):
        image = _eight_bit_grey(image)
    alpha, mode = None, image.mode
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.getchannel("R") if mode in ("L", "LA", "La", "1") else image.convert("RGB")
    elif mode not in ("L", "RGB", "CMYK", "LAB"):
        image = image.convert("L" if mode == "1" else "RGB")
    image.info = info
    profile = (info["icc_profile"] or b"") if "icc_profile" in info else None  # Pillow gives None for a damaged one
    rgb, converted_from, ignored = colour.to_srgb(image, profile, colour_code)
    # DCF's mark of Adobe RGB, which cameras write with or without a profile.
    if profile is None and not ignored and b"R03\0" in (info.get("exif") or b""):
        ignored = "marked as Adobe RGB (EXIF), without a colour profile: the colours are taken for sRGB"
    if alpha is None or alpha.getextrema()[0] == 255:
        return Decoded(rgb, converted_from, False, ignored)
    rgb.putalpha(alpha)
    white = Image.new("RGBA", rgb.size, "white")
    white.alpha_composite(rgb)
    return Decoded(white.convert("RGB"), converted_from, True, ignored, alpha)


def _in_eight_bits(transparent: Any, mode: str, depth: int) -> Any:
    """A PNG's transparent colour on the scale of the pixels. Pillow scales those of 2, 4 and 16 bits to 8, but not this value."""
    if mode == "L":
        return transparent * 255 // ((1 << depth) - 1)
    if mode == "RGB" and depth == 16:
        return tuple(value >> 8 for value in transparent)
    return transparent


def _eight_bit_grey(image: Image.Image) -> Image.Image:
    """A 16-bit grey image as L, or as LA if one grey value is marked as transparent.

    Each value becomes round(value * 255 / 65535), the PNG specification's sample depth rescaling. Pillow's `convert`
    would clip at 255.
    """
    values = np.asarray(image).astype(np.int32)
    if values.min() < 0 or values.max() > 65535:
        raise BadImage("pixels of more than 16 bits: save it with 8 bits per channel")
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if "transparency" not in image.info:
        return grey
    alpha = np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)
    return Image.merge("LA", (grey, Image.fromarray(alpha)))


_lock = threading.Lock()
_users = 0
_settings_before: tuple[bool, int | None, int] = (False, None, 0)


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Makes Pillow reject truncated files, disables its own size limit and warning, and allows metadata of MAX_METADATA.

    These settings of Pillow are process-wide: the first thread to enter changes them, the last one to leave restores them.
    """
    global _users, _settings_before
    with _lock:
        if _users == 0:
            _settings_before = _settings()
            _set(False, None, MAX_METADATA)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _set(*_settings_before)


def _settings() -> tuple[bool, int | None, int]:
    return ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK


def _set(truncated: bool, pixels: int | None, metadata: int) -> None:
    ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = truncated, pixels, metadata
