"""AVIF, HEIC and other formats of phones and the web: orientation, colours, and what is said of what cannot be read."""

import io

import numpy as np
import pytest
from PIL import Image

from sushi_research.data import heif, images
from sushi_research.data.buckets import BucketRule, CropGeometry, crop_geometries
from sushi_research.data.images import BadImage, decode, decode_and_describe, resize_and_crop
from sushi_research.data.names import IMAGES
from sushi_research.reports.thumbnails import of_file

# Of ITU-T H.273: primaries of BT.709 and Display P3, the curves of sRGB and PQ.
SRGB, P3, PQ = (1, 13), (12, 13), (9, 16)


def saved(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def with_codes(data: bytes, primaries: int, transfer: int) -> bytes:
    """An AVIF file that says that its colours have these codes."""
    at = data.index(b"colrnclx") + 8
    return data[:at] + bytes([0, primaries, 0, transfer]) + data[at + 4 :]


def test_an_avif_is_turned_upright():
    image = Image.new("RGB", (48, 32))
    image.paste((255, 0, 0), (0, 0, 16, 32))  # the left third is red
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = np.asarray(decode(saved(image, "AVIF", exif=exif)))
    assert upright.shape == (48, 32, 3) and (upright[:15, :, 0] > 128).all() and not (upright[18:, :, 0] > 128).any()


def test_the_colour_codes_of_an_avif_count_if_it_has_no_profile():
    plain = saved(Image.new("RGB", (16, 16), (200, 100, 50)), "AVIF", quality=100)
    assert decode_and_describe(with_codes(plain, *SRGB)).converted_from == ""
    wide = decode_and_describe(with_codes(plain, *P3))
    assert wide.converted_from and np.asarray(wide.image)[0, 0, 0] > 205
    with pytest.raises(BadImage, match="high dynamic range"):
        decode(with_codes(plain, *PQ))
    with_profile = saved(Image.new("RGB", (16, 16)), "AVIF", icc_profile=_srgb_profile())
    assert decode_and_describe(with_profile).converted_from == ""


def _srgb_profile() -> bytes:
    from PIL import ImageCms

    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def test_heic_without_its_extra_names_the_extra(monkeypatch):
    monkeypatch.setattr(heif, "can_read", lambda: False)
    header = b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf" + bytes(100)
    with pytest.raises(BadImage, match=r"^HEIC needs an extra: .*\[heic\]'\), or convert the image to jpg$"):
        decode(header)
    assert {".heic", ".avif", ".jfif", ".gif", ".tif", ".bmp"} <= IMAGES


def test_heic_with_its_extra():
    pytest.importorskip("pillow_heif")
    image = Image.new("RGB", (64, 48), (200, 100, 50))
    heif.can_read()
    data = saved(image, "HEIF", quality=90, save_all=True, append_images=[Image.new("RGB", (32, 32))])
    found = decode_and_describe(data)
    assert found.image.size == (64, 48) and found.ignored == ""
    assert np.abs(np.asarray(found.image, int) - (200, 100, 50)).max() < 6
    assert of_file(data, 32).startswith(b"\xff\xd8")
    with pytest.raises(BadImage, match="^(damaged|truncated|not an image)"):
        decode(data[: len(data) // 2])


def test_a_small_box_that_is_enlarged_is_scaled_alone(monkeypatch):
    """The same pixels as from the whole image scaled, up to one level of rounding and at most a tenth of a pixel of position."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    image = coarse.resize((300, 200), Image.Resampling.BICUBIC)
    rule = BucketRule(resolution=128, step=32, min_side=64, max_side=256, upscale=True)
    box = np.array([[201, 60, 241, 101]])
    geometries, _ = crop_geometries(np.array([300]), np.array([200]), rule, boxes=box)
    geometry = CropGeometry(*geometries[0].tolist())
    whole = resize_and_crop(image, geometry, False)
    monkeypatch.setattr(images, "MAX_PIXELS", 60_000)
    alone = resize_and_crop(image, geometry, False)
    assert geometry.resized_width * geometry.resized_height > 60_000
    assert whole.shape == alone.shape == (128, 128, 3)
    assert np.abs(whole.astype(int) - alone).max() <= 1
