"""Converts decoded images to sRGB by their ICC profile, or by a PNG's own colour information, as viewers show them.

Conversions are relative colorimetric with black-point compensation: the default of Photoshop, and for profiles that consist of
three primaries and curves (those of cameras and screens) equal to the perceptual intent of browsers.
"""

from __future__ import annotations

import functools
import io
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageCms, features

# Increment it when converted pixels change. It is part of the cache key of images that are converted, and of no other's.
RECIPE = 1
# A profile whose conversion changes no value by more than this is taken for sRGB's: lcms rounds to 8 bits several times, and
# programs write sRGB's curve as tables of different precision.
SAME = 2
# Mode of the pixels for each colour space of a profile.
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}
# x and y of white, red, green and blue, by the code points of ITU-T H.273 that PNG's cICP chunk uses. 2 is "unspecified".
SRGB = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
PRIMARIES = {
    1: SRGB,
    2: SRGB,
    5: (0.3127, 0.3290, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06),
    6: (0.3127, 0.3290, 0.63, 0.34, 0.31, 0.595, 0.155, 0.07),
    7: (0.3127, 0.3290, 0.63, 0.34, 0.31, 0.595, 0.155, 0.07),
    9: (0.3127, 0.3290, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    12: (0.3127, 0.3290, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
}
# The exponent of the transfer function; None is sRGB's curve, also for BT.709's (1, 6, 14, 15), which is meant for such screens.
_EXPONENTS = {**dict.fromkeys((1, 2, 6, 13, 14, 15)), 4: 2.2, 5: 2.8, 8: 1.0}
_HDR = {16: "PQ", 18: "HLG"}
# libpng takes a gamma within 5 % for equal. Many programs write 1/2.2 and rounded primaries for sRGB.
_GAMMA, _GAMMA_TOLERANCE, _PRIMARY_TOLERANCE = 1 / 2.2, 0.05, 0.01
# libpng ignores a gamma outside of these as impossible.
_GAMMA_MIN, _GAMMA_MAX = 16e-5, 6250


class NoConversion(ValueError):
    """Colours that cannot be converted to sRGB; `reason` says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def to_srgb(
    pixels: Image.Image, profile: bytes | None, colour_code: tuple[int, int, int, int] | None
) -> tuple[Image.Image, str, str]:
    """(RGB pixels, what they were converted from or "", which information could not be used or "").

    `pixels` are RGB, L, CMYK or LAB; their `info` is that of the file. `profile` is the file's ICC profile, b"" if it is
    damaged; `colour_code` is a PNG's cICP chunk, which has priority. Without both, a PNG's gAMA and cHRM chunks count, unless
    it has an sRGB chunk, as in browsers.

    Raises NoConversion for high dynamic range and unknown codes, and if a conversion is needed that this Pillow cannot do.
    """
    ignored = ""
    png_profile, name = _png_profile(pixels.info, colour_code, profile is not None)
    if png_profile is not None:
        profile = png_profile
    elif colour_code is not None:
        profile = None
    if (profile is not None or pixels.mode == "LAB") and not features.check("littlecms2"):
        raise NoConversion("its colours need LittleCMS, which this Pillow was built without: install Pillow with pip")
    if profile is not None:
        try:
            transform, mode, description = _transform(profile, pixels.mode)
        except NoConversion as error:
            ignored = error.reason
        else:
            if transform is None:
                return pixels.convert("RGB"), "", ""
            return ImageCms.applyTransform(pixels.convert(mode), transform), name or description, ""
    if pixels.mode == "LAB":
        lab = ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(pixels, lab, _srgb(), outputMode="RGB"), "Lab", ignored
    if pixels.mode == "CMYK" and not ignored:
        ignored = "CMYK without a colour profile: converted by a plain formula"
    return pixels.convert("RGB"), "", ignored


@functools.lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> tuple[ImageCms.ImageCmsTransform | None, str, str]:
    """(conversion or None if the profile is sRGB's, mode that it takes, description) of an ICC profile for pixels of a mode.

    Raises NoConversion if the profile is damaged or belongs to other pixels. Grey pixels may have an RGB profile.
    """
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = opened.profile.xcolor_space.strip()
        description = "".join(char for char in ImageCms.getProfileDescription(opened) if char.isprintable()).strip()[
            :60
        ]
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        raise NoConversion("a colour profile that cannot be read: the colours are taken for sRGB") from None
    takes = _MODES.get(space)
    if takes is None or (takes != mode and (mode, takes) != ("L", "RGB")):
        raise NoConversion(f"a colour profile for {space} on {mode} pixels: the profile is not used")
    flags = ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.NOCACHE  # without the cache it is safe for threads
    intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
    try:
        transform = ImageCms.buildTransform(opened, _srgb(), takes, "RGB", intent, flags)
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        raise NoConversion("a colour profile that cannot be used: the colours are taken for sRGB") from None
    if takes in ("RGB", "L"):
        samples = _lattice(mode).convert(takes)
        before = np.asarray(samples.convert("RGB")).astype(int)
        if np.abs(np.asarray(ImageCms.applyTransform(samples, transform)) - before).max() <= SAME:
            return None, takes, description
    return transform, takes, f"the colour profile {description or 'without a name'}"


@functools.cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


@functools.cache
def _lattice(mode: str) -> Image.Image:
    """Every grey value, or 17 values per channel in all combinations."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    axis = np.linspace(0, 255, 17).round().astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(1, -1, 3))


def _png_profile(
    info: Mapping[Any, Any], colour_code: tuple[int, int, int, int] | None, has_profile: bool
) -> tuple[bytes | None, str]:
    """(ICC profile equal to a PNG's own colour information, its name), or (None, "") if that is sRGB or does not count."""
    if colour_code is not None:
        primaries, transfer, matrix, full_range = colour_code
        if transfer in _HDR:
            raise NoConversion(f"high dynamic range ({_HDR[transfer]}): save it as an ordinary sRGB image")
        if primaries not in PRIMARIES or transfer not in _EXPONENTS or matrix != 0 or full_range != 1:
            raise NoConversion(
                f"unknown colours (cICP {primaries}, {transfer}, {matrix}, {full_range}): save it as sRGB"
            )
        if PRIMARIES[primaries] == SRGB and _EXPONENTS[transfer] is None:
            return None, ""
        name = f"the colours of its cICP chunk ({primaries}, {transfer})"
        return matrix_profile(PRIMARIES[primaries], _EXPONENTS[transfer]), name
    if has_profile or "srgb" in info:
        return None, ""
    gamma, points = info.get("gamma"), info.get("chromaticity")
    if gamma is None or not _GAMMA_MIN <= gamma <= _GAMMA_MAX or abs(gamma / _GAMMA - 1) <= _GAMMA_TOLERANCE:
        gamma = None
    if points is None or not _are_primaries(points) or max(map(abs, np.subtract(points, SRGB))) <= _PRIMARY_TOLERANCE:
        points = None
    if gamma is None and points is None:
        return None, ""
    chunks = " and ".join(["gAMA"] * (gamma is not None) + ["cHRM"] * (points is not None))
    # Without gAMA, or with that of sRGB, the curve is sRGB's.
    return matrix_profile(
        points or SRGB, None if gamma is None else 1 / gamma
    ), f"the colours of its PNG chunks ({chunks})"


def _are_primaries(points: tuple[float, ...]) -> bool:
    """Whether eight values are x and y of a white and of three primaries that span a triangle."""
    values = np.reshape(points, (4, 2))
    area = np.linalg.det(np.column_stack([values[1:], np.ones(3)]))
    return bool((values[:, 1] > 0).all() and (values.sum(axis=1) <= 1).all() and abs(area) > 1e-3)


def matrix_profile(points: tuple[float, ...], exponent: float | None) -> bytes:
    """An ICC profile (version 4, ICC.1:2010) with these primaries and a curve: a power, or sRGB's if `exponent` is None."""
    white, *primaries = (np.array([x, y, 1 - x - y]) / y for x, y in np.reshape(points, (4, 2)))
    matrix = np.column_stack(primaries)
    matrix = matrix * np.linalg.solve(matrix, white)
    # Bradford's adaptation to the D50 of the profile connection space (annex E).
    cone = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    d50 = np.array([0.9642, 1.0, 0.8249])
    adapted = np.linalg.solve(cone, np.diag(cone @ d50 / (cone @ white)) @ cone @ matrix)

    def fixed(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    if exponent is None:
        curve = b"para" + struct.pack(">IHH", 0, 3, 0) + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    else:
        curve = b"para" + struct.pack(">IHH", 0, 0, 0) + fixed(exponent)
    contents = [b"XYZ \0\0\0\0" + fixed(*column) for column in (d50, *adapted.T)] + [curve]
    names = {b"wtpt": 0, b"rXYZ": 1, b"gXYZ": 2, b"bXYZ": 3, b"rTRC": 4, b"gTRC": 4, b"bTRC": 4}
    starts = np.cumsum([132 + 12 * len(names), *map(len, contents)])
    table = struct.pack(">I", len(names))
    for name, index in names.items():
        table += name + struct.pack(">II", starts[index], len(contents[index]))
    header = struct.pack(">I4xI", starts[-1], 0x04200000) + b"mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28)
    header += fixed(*d50)
    return header.ljust(128, b"\0") + table + b"".join(contents)
