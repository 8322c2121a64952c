"""Colours: every image comes out in sRGB as viewers show it, or it says what of its colour information was not used."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin, features

from sushi_research.data import colour, images
from sushi_research.data.images import BadImage, Decoded, decode_and_describe

COLOUR = (200, 100, 50)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
P3 = colour.matrix_profile(colour.PRIMARIES[12], None)
# From linear Display P3 to linear sRGB, as in CSS Color 4, rounded.
P3_TO_SRGB = np.array([[1.2249, -0.2247, 0], [-0.0420, 1.0419, 0], [-0.0197, -0.0786, 1.0979]])


def plain(mode: str = "RGB", value: object = COLOUR) -> Image.Image:
    return Image.new(mode, (16, 16), value)


def saved(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def with_chunk(kind: bytes, content: bytes, data: bytes | None = None) -> bytes:
    """A PNG with one more chunk before its pixels."""
    data = data or saved(plain())
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return data[:33] + chunk + data[33:]


def pixel(decoded: Decoded) -> list[int]:
    assert decoded.image.mode == "RGB"
    return np.asarray(decoded.image)[0, 0].tolist()


def from_curve(value: np.ndarray) -> np.ndarray:
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def to_curve(value: np.ndarray) -> np.ndarray:
    """sRGB's 8-bit values of linear ones."""
    value = np.clip(value, 0, 1)
    return 255 * np.where(value <= 0.0031308, 12.92 * value, 1.055 * value ** (1 / 2.4) - 0.055)


def profile(space: bytes, kind: bytes, tag: bytes, connection: bytes = b"XYZ ") -> bytes:
    """An ICC profile of one tag, besides the white point."""
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    table = struct.pack(">I4sII4sII", 2, b"wtpt", 156, 20, kind, 176, len(tag))
    header = struct.pack(">I4xI", 176 + len(tag), 0x02400000) + b"prtr" + space + connection + bytes(12) + b"acsp"
    return (header + bytes(28) + white[8:]).ljust(128, b"\0") + table + white + tag


# Grey values that are linear light, and inks of which only the first, at most, makes a difference: Lab of white and of black.
LINEAR_GREY = profile(b"GRAY", b"kTRC", b"curv\0\0\0\0" + struct.pack(">I", 0))
RAMP = bytes(range(256))
INKS = profile(
    b"CMYK",
    b"A2B0",
    b"mft1\0\0\0\0\x04\x03\x02\0"
    + struct.pack(">9i", *(65536 * (row == column) for row in range(3) for column in range(3)))
    + RAMP * 4
    + bytes([255, 128, 128]) * 8
    + bytes([0, 128, 128]) * 8
    + RAMP * 3,
    b"Lab ",
)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_wide_gamut_image_is_converted(format):
    options = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}}.get(format, {})
    decoded = decode_and_describe(saved(plain(), format, icc_profile=P3, **options))
    right = to_curve(P3_TO_SRGB @ from_curve(np.array(COLOUR) / 255))
    # One level for the rounding to 8 bits, and one for JPEG's.
    assert np.abs(np.array(pixel(decoded)) - right).max() < (2 if format == "JPEG" else 1)
    assert decoded.converted_from == "the colour profile without a name"


def test_colours_are_converted_before_transparency_and_in_palettes():
    (converted,) = {tuple(pixel(decode_and_describe(saved(plain(), icc_profile=P3))))}
    assert tuple(pixel(decode_and_describe(saved(plain().quantize(2), icc_profile=P3)))) == converted
    half = decode_and_describe(saved(plain("RGBA", (*COLOUR, 51)), icc_profile=P3))
    assert half.transparent and pixel(half) == [round(255 + (value - 255) * 0.2) for value in converted]
    opaque = decode_and_describe(saved(plain("RGBA", (*COLOUR, 255))))
    assert not opaque.transparent and pixel(opaque) == list(COLOUR)


def test_an_srgb_profile_changes_nothing():
    every = Image.fromarray(np.arange(256 * 3, dtype=np.uint16).reshape(1, 256, 3).astype(np.uint8))
    for own in (SRGB, colour.matrix_profile(colour.SRGB, None)):
        for image in (every, every.convert("L")):
            decoded = decode_and_describe(saved(image, icc_profile=own))
            assert np.array_equal(np.asarray(decoded.image), np.asarray(image.convert("RGB")))
            assert (decoded.converted_from, decoded.ignored) == ("", "")


def test_grey_and_cmyk_profiles():
    grey = decode_and_describe(saved(plain("L", 55), icc_profile=LINEAR_GREY))
    assert abs(pixel(grey)[0] - to_curve(np.array(55 / 255))) < 1 and grey.converted_from
    dark = decode_and_describe(saved(plain("RGBA", (55, 55, 55, 255)).convert("LA"), icc_profile=LINEAR_GREY))
    assert pixel(dark) == pixel(grey)
    for inks, right in (((0, 255, 255, 255), 255), ((255, 0, 0, 0), 0)):
        decoded = decode_and_describe(saved(plain("CMYK", inks), "TIFF", icc_profile=INKS))
        assert pixel(decoded) == [right] * 3 and decoded.converted_from and not decoded.ignored


def test_lab_pixels_are_converted():
    decoded = decode_and_describe(saved(plain("LAB", (255, 128, 128)), "TIFF"))
    assert min(pixel(decoded)) >= 254 and decoded.converted_from == "Lab"  # lcms rounds white's a and b


@pytest.mark.parametrize(
    ("data", "ignored"),
    [
        (saved(plain(), icc_profile=b"no profile"), "a colour profile that cannot be read"),
        (saved(plain(), icc_profile=SRGB[:300]), "a colour profile that cannot be used"),
        (with_chunk(b"iCCP", b"x\0\0not compressed"), "a colour profile that cannot be read"),
        (saved(plain(), icc_profile=LAB), "a colour profile for Lab on RGB pixels"),
        (saved(plain(), icc_profile=LINEAR_GREY), "a colour profile for GRAY on RGB pixels"),
        (saved(plain("CMYK", (0, 255, 255, 0)), "JPEG", icc_profile=SRGB), "a colour profile for RGB on CMYK pixels"),
        (saved(plain("CMYK", (0, 255, 255, 0)), "JPEG"), "CMYK without a colour profile"),
    ],
    ids=["no-profile", "cut", "not-compressed", "lab", "grey", "rgb-on-cmyk", "cmyk"],
)
def test_colour_information_that_cannot_be_used_is_named(data, ignored):
    decoded = decode_and_describe(data)
    assert decoded.ignored.startswith(ignored) and decoded.converted_from == ""
    assert pixel(decoded) in (list(COLOUR), [255, 0, 0])


def test_a_cameras_mark_of_adobe_rgb_without_a_profile_is_named():
    exif = Image.Exif()
    exif[0x0112] = 3
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    for format in ("JPEG", "PNG"):
        assert "marked as Adobe RGB" in decode_and_describe(saved(plain(), format, exif=exif)).ignored
        assert decode_and_describe(saved(plain(), format, exif=exif, icc_profile=P3)).ignored == ""


def test_a_png_without_a_profile_is_converted_by_its_own_chunks():
    points = struct.pack(">8I", *(round(value * 100_000) for value in colour.PRIMARIES[12]))
    of_srgb = struct.pack(">8I", *(round(value * 100_000) for value in colour.SRGB))
    converted = pixel(decode_and_describe(saved(plain(), icc_profile=P3)))
    linear = to_curve(np.array(COLOUR) / 255).round().tolist()
    gamma = struct.pack(">I", 100_000)
    assert pixel(decode_and_describe(with_chunk(b"cHRM", points))) == converted
    assert pixel(decode_and_describe(with_chunk(b"cICP", bytes([12, 13, 0, 1])))) == converted
    assert pixel(decode_and_describe(with_chunk(b"gAMA", gamma))) == linear
    assert "(gAMA)" in decode_and_describe(with_chunk(b"gAMA", gamma)).converted_from
    for same in (
        with_chunk(b"gAMA", struct.pack(">I", 45455), with_chunk(b"cHRM", of_srgb)),
        with_chunk(b"gAMA", struct.pack(">I", 1)),
        with_chunk(b"gAMA", b"\xff" * 4),
        with_chunk(b"gAMA", bytes(4), with_chunk(b"cHRM", bytes(32))),
        with_chunk(b"gAMA", gamma, with_chunk(b"sRGB", b"\0")),
        with_chunk(b"gAMA", gamma, saved(plain(), icc_profile=SRGB)),
        with_chunk(b"cICP", bytes([1, 13, 0, 1]), saved(plain(), icc_profile=P3)),
    ):
        decoded = decode_and_describe(same)
        assert (pixel(decoded), decoded.converted_from, decoded.ignored) == (list(COLOUR), "", "")


def test_colours_that_no_srgb_image_has_are_refused():
    for code, reason in (
        ((9, 16, 0, 1), "PQ"),
        ((9, 18, 0, 1), "HLG"),
        ((1, 99, 0, 1), "cICP 1, 99"),
        ((1, 13, 0, 0), "cICP"),
    ):
        with pytest.raises(BadImage, match=reason):
            decode_and_describe(with_chunk(b"cICP", bytes(code)))


def test_a_pillow_without_littlecms_refuses_what_it_cannot_convert(monkeypatch):
    monkeypatch.setattr(features, "check", lambda name: name != "littlecms2")
    for data in (saved(plain(), icc_profile=P3), saved(plain("LAB", (255, 128, 128)), "TIFF")):
        with pytest.raises(BadImage, match="LittleCMS.*install Pillow"):
            decode_and_describe(data)
    assert pixel(decode_and_describe(saved(plain()))) == list(COLOUR)


# --- text and metadata of any size ---


def test_a_png_with_much_text_or_a_large_profile_is_read(monkeypatch):
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * (3 << 20), zip=True)
    info.add_itxt("workflow", "x" * (3 << 20), zip=True)
    info.add_text("workflow", "x" * (3 << 20))
    info.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>' + " " * (3 << 20), zip=True)
    image = Image.new("RGB", (16, 8), COLOUR)
    data = saved(image, icc_profile=P3 + bytes(3 << 20), pnginfo=info)
    before = PngImagePlugin.MAX_TEXT_CHUNK
    decoded = decode_and_describe(data)
    assert decoded.converted_from and decoded.image.size == (8, 16), "the orientation in XMP counts as before"
    assert PngImagePlugin.MAX_TEXT_CHUNK == before
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 1)
    assert decode_and_describe(data).image.size == (8, 16)


def test_metadata_that_grows_without_bound_is_refused(monkeypatch):
    monkeypatch.setattr(images, "MAX_METADATA", 2 << 20)
    bomb = with_chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(3 << 20)))
    with pytest.raises(BadImage, match="^its metadata or colour profile is over 2 MiB"):
        decode_and_describe(bomb)
