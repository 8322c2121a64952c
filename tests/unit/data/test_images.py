import io
import struct
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageFile

from sushi_research.data import images
from sushi_research.data.buckets import BucketRule, CropGeometry, crop_geometry
from sushi_research.data.images import BadImage, decode, resize_and_crop

WHITE, BLACK, RED = (255, 255, 255), (0, 0, 0), (255, 0, 0)


def saved(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, row: bytes, transparent: bytes = b"") -> bytes:
    """A PNG written by hand, for what Pillow reads but does not write. All rows are the same."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + (chunk(b"tRNS", transparent) if transparent else b"")
        + chunk(b"IDAT", zlib.compress((b"\0" + row) * min(height, 4)))
        + chunk(b"IEND", b"")
    )


def noise(width: int = 64, height: int = 48) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pixels_of(data: bytes) -> list[tuple[int, int, int]]:
    """The first row's pixels, of an image that must come out as RGB."""
    image = decode(data)
    assert image.mode == "RGB"
    return [tuple(int(value) for value in pixel) for pixel in np.asarray(image)[0]]


def test_rgb_comes_out_as_it_is_and_lossy_formats_as_pillow_decodes_them():
    image = noise()
    for format in ("PNG", "BMP", "TIFF"):
        assert np.array_equal(np.asarray(decode(saved(image, format))), np.asarray(image)), format
    for format in ("JPEG", "WEBP", "AVIF"):
        data = saved(image, format)
        assert np.array_equal(np.asarray(decode(data)), np.asarray(Image.open(io.BytesIO(data)))), format


def test_greyscale_and_one_bit():
    assert pixels_of(saved(Image.new("L", (1, 1), 77))) == [(77, 77, 77)]
    one_bit = Image.new("1", (2, 1))
    one_bit.putpixel((1, 0), 1)
    assert pixels_of(saved(one_bit)) == [BLACK, WHITE]


def test_transparency_is_laid_over_white():
    image = Image.new("RGBA", (3, 1), (*RED, 255))
    image.putpixel((1, 0), (*BLACK, 0))
    image.putpixel((2, 0), (*BLACK, 128))
    assert pixels_of(saved(image)) == [RED, WHITE, (127, 127, 127)]


def test_grey_with_alpha_is_laid_over_white():
    image = Image.new("LA", (2, 1), (60, 255))
    image.putpixel((1, 0), (60, 0))
    assert pixels_of(saved(image)) == [(60, 60, 60), WHITE]


def test_palettes_with_and_without_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLACK])
    image.putpixel((1, 0), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pixels_of(saved(image)) == [RED, BLACK]
        assert pixels_of(saved(image, transparency=0)) == [WHITE, BLACK]
        assert pixels_of(saved(image, transparency=bytes([255, 51]))) == [RED, (204, 204, 204)]


def test_a_colour_that_stands_for_transparent():
    assert pixels_of(png(2, 1, 8, 0, bytes([5, 7]), struct.pack(">H", 5))) == [WHITE, (7, 7, 7)]
    assert pixels_of(png(2, 1, 8, 2, bytes([*RED, *BLACK]), struct.pack(">HHH", 255, 0, 0))) == [WHITE, BLACK]
    for depth, row in ((1, 0x80), (2, 0x40), (4, 0x10)):  # the values 1 and 0
        assert pixels_of(png(2, 1, depth, 0, bytes([row]), struct.pack(">H", 1))) == [WHITE, BLACK], depth
        one = 255 // (2**depth - 1)
        assert pixels_of(png(2, 1, depth, 0, bytes([row]), struct.pack(">H", 0))) == [(one, one, one), WHITE], depth
    deep = struct.pack(">6H", 0x1234, 0xC8, 0, 0xC800, 0x6400, 0)
    assert pixels_of(png(2, 1, 16, 2, deep, struct.pack(">HHH", 0x1234, 0xC8, 0))) == [WHITE, (200, 100, 0)]


def test_16_bit_grey_is_scaled_and_not_cut():
    # 257 steps of 16 bits are one of 8; the halves between are at 128.5.
    values = np.array([[0, 128, 129, 257, 300, 32768, 65406, 65535]], dtype=np.uint16)
    expected = [(v, v, v) for v in (0, 0, 1, 1, 1, 128, 254, 255)]
    assert pixels_of(saved(Image.fromarray(values))) == expected
    assert pixels_of(saved(Image.fromarray(values), "TIFF")) == expected
    assert pixels_of(saved(Image.fromarray(values.astype(np.int32)), "TIFF")) == expected


def test_16_bit_grey_with_a_transparent_value():
    # 300 and 400 would be one value after Pillow's cut at 255.
    row = np.array([300, 400, 0], dtype=">u2").tobytes()
    assert pixels_of(png(3, 1, 16, 0, row, struct.pack(">H", 300))) == [WHITE, (2, 2, 2), BLACK]


def test_16_bit_colour_is_scaled_and_not_cut():
    row = np.array([0, 0x1234, 0xFFFF], dtype=">u2").tobytes()
    assert pixels_of(png(1, 1, 16, 2, row)) == [(0, 0x12, 255)]
    row = np.array([0x8000, 0xFFFF, 0x8000, 0], dtype=">u2").tobytes()
    assert pixels_of(png(2, 1, 16, 4, row)) == [(128, 128, 128), WHITE]


def test_32_bit_pixels_beyond_16_bits_are_refused():
    for value in (-1, 65536):
        with pytest.raises(BadImage, match="more than 16 bits"):
            decode(saved(Image.fromarray(np.array([[value]], dtype=np.int32)), "TIFF"))
            pytest.fail(f"{value} was accepted")


def test_floating_point_pixels_are_refused():
    with pytest.raises(BadImage, match="floating-point"):
        decode(saved(Image.new("F", (1, 1), 0.5), "TIFF"))


def test_cmyk():
    (pixel,) = set(pixels_of(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)))
    assert pixel == RED


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_rotation_is_applied(format):
    image = Image.new("RGB", (48, 32), BLACK)
    image.paste(RED, (0, 0, 16, 32))  # the left third is red
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: the left side comes to the top
    upright = decode(saved(image, format, exif=exif))
    assert upright.size == (32, 48)
    # JPEG and WebP change colours slightly; the threshold only tells red from black.
    red = np.asarray(upright)[:, :, 0] > 128
    assert red[:15].all() and not red[17:].any()


def test_exif_rotation_of_16_bit_grey():
    exif = Image.Exif()
    exif[0x0112] = 3
    values = np.array([[0, 65535]], dtype=np.uint16)
    assert pixels_of(saved(Image.fromarray(values), exif=exif)) == [WHITE, BLACK]


def test_the_main_picture_of_a_phones_multi_picture_jpeg():
    data = saved(noise(), "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert decode(data).size == (64, 48)


def test_the_first_frame_of_an_animation_is_used_and_said():
    frames = [Image.new("RGB", (8, 8), RED), Image.new("RGB", (8, 8), BLACK)]
    for format in ("PNG", "WEBP", "GIF", "AVIF"):
        data = saved(frames[0], format, save_all=True, append_images=frames[1:])
        found = images.decode_and_describe(data)
        assert found.ignored == "animated: the first frame is used", format
        assert np.abs(np.asarray(found.image, int) - RED).max() <= 4, format
        assert images.decode_and_describe(saved(frames[0], format)).ignored == ""


def test_a_tiff_of_several_pages_is_refused():
    page = Image.new("RGB", (8, 8), RED)
    with pytest.raises(BadImage, match="^it has 2 pages: save the one that is meant as a file of its own$"):
        decode(saved(page, "TIFF", save_all=True, append_images=[page]))


def test_a_gif_of_one_frame_is_an_image():
    assert pixels_of(saved(Image.new("RGB", (1, 1), RED), "GIF")) == [RED]


def test_an_empty_file():
    with pytest.raises(BadImage) as caught:
        decode(b"")
    assert caught.value.reason == str(caught.value) == "the file is empty"


def test_other_bytes():
    # The last is a PPM, which Pillow would read: only FORMATS are tried, so that no file can reach the others.
    for data in (b"hello", b"\0" * 1000, b"<svg/>", b"P6 1 1 255\n\0\0\0"):
        with pytest.raises(BadImage, match="^not an image that Pillow can read"):
            decode(data)
            pytest.fail(f"{data[:12]!r} was accepted")


def test_a_truncated_file():
    for format in ("JPEG", "PNG"):
        data = saved(noise(), format)
        for part in (0.5, 0.9):
            with pytest.raises(BadImage, match="^truncated: "):
                decode(data[: int(len(data) * part)])
                pytest.fail(f"{part} of a {format} was accepted")


def test_a_truncated_webp_is_refused_too():
    data = saved(noise(), "WEBP")
    with pytest.raises(BadImage, match="^damaged: "):
        decode(data[: len(data) // 2])


def test_damage_within_a_png():
    data = bytearray(saved(noise()))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(BadImage, match="^(damaged|truncated): "):
        decode(bytes(data))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damaged EXIF and TIFF tags
def test_any_cut_and_any_flipped_byte_ends_in_an_image_or_a_reason():
    for format in ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "TIFF", "BMP"):
        data = saved(noise(12, 9), format)
        generator = np.random.default_rng(1)
        for position in generator.integers(0, len(data), 60):
            flipped = bytearray(data)
            flipped[position] ^= int(generator.integers(1, 256))
            for broken in (bytes(flipped), data[:position]):
                try:
                    assert decode(broken).mode == "RGB"
                except BadImage as error:
                    assert error.reason


def test_a_bomb_is_refused_by_its_header(monkeypatch):
    def must_not_decode(self):
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", must_not_decode)
    for width, height in ((30000, 30000), (13378, 13378)):
        with pytest.raises(BadImage) as caught:
            decode(png(width, height, 8, 2, b""))
        limit = "178956970"
        assert caught.value.reason == f"decompression bomb: {width}x{height} pixels is over the limit of {limit} pixels"


def test_the_limit_itself_is_allowed(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 12)
    assert decode(saved(Image.new("RGB", (4, 3)))).size == (4, 3)
    with pytest.raises(BadImage, match="5x3 pixels is over the limit of 12"):
        decode(saved(Image.new("RGB", (5, 3))))


def test_pillows_settings_count_for_nothing_and_are_put_back(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    data = saved(noise(), "JPEG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(data).size == (64, 48)
        with pytest.raises(BadImage, match="^truncated"):
            decode(data[: len(data) // 2])
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True
    assert Image.MAX_IMAGE_PIXELS == 10


def test_the_settings_hold_until_the_last_thread_is_done(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    inside, leave = threading.Event(), threading.Event()

    def stay():
        with images._strict_pillow():
            inside.set()
            leave.wait()

    with ThreadPoolExecutor(1) as pool:
        staying = pool.submit(stay)
        inside.wait()
        with images._strict_pillow():
            pass
        try:
            assert ImageFile.LOAD_TRUNCATED_IMAGES is False
        finally:
            leave.set()
        staying.result()
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_resize_and_crop_is_lanczos_then_the_cut_then_the_mirror():
    image = noise(100, 60)
    geometry = CropGeometry(
        original_height=60,
        original_width=100,
        resized_height=32,
        resized_width=53,
        crop_top=0,
        crop_left=2,
        height=32,
        width=48,
    )
    whole = np.asarray(image.resize((53, 32), Image.Resampling.LANCZOS))
    pixels = resize_and_crop(image, geometry, flip=False)
    assert pixels.dtype == np.uint8 and pixels.shape == (32, 48, 3)
    assert np.array_equal(pixels, whole[:, 2:50])
    mirrored = resize_and_crop(image, geometry, flip=True)
    assert np.array_equal(mirrored, whole[:, 2:50][:, ::-1])
    assert mirrored.flags["C_CONTIGUOUS"] and mirrored.flags["WRITEABLE"]


def test_an_image_of_its_buckets_size_is_not_touched():
    image = noise(64, 64)
    geometry = crop_geometry(64, 64, BucketRule(resolution=64, min_side=64, max_side=64))
    assert np.array_equal(resize_and_crop(image, geometry, flip=False), np.asarray(image))


def test_a_crop_geometry_of_another_image_is_refused():
    geometry = crop_geometry(64, 64, BucketRule(resolution=64, min_side=64, max_side=64))
    with pytest.raises(AssertionError):
        resize_and_crop(noise(64, 48), geometry, flip=False)
