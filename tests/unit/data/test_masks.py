"""Masks on the grid of the latents, against values worked out by hand and against the image's own pixels."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sushi_research.data import images, masks
from sushi_research.data.buckets import BucketRule, CropGeometry, crop_geometry
from sushi_research.data.dataset_hash import dataset_hash
from sushi_research.data.images import BadImage
from sushi_research.data.items import make_items
from sushi_research.data.samples import Sample, Samples
from sushi_research.errors import UserError
from sushi_research.fingerprints import content_hash


def grey(pixels) -> Image.Image:
    return Image.fromarray(np.asarray(pixels, np.uint8))


def png(image: Image.Image, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG", **options)
    return stream.getvalue()


def test_each_latent_has_the_mean_of_its_pixels_after_resize_and_crop():
    """A 64x32 mask halved to 32x16 and cropped by 8 columns: white begins at column 40, so at column 12 of the crop."""
    mask = np.zeros((32, 64))
    mask[:, 40:] = 255
    mask[:16, 40:] = 51  # a fifth
    geometry = CropGeometry(32, 64, resized_height=16, resized_width=32, crop_top=0, crop_left=8, height=16, width=16)
    found = masks.to_latents(grey(mask), geometry)
    assert found.dtype == np.float16 and found.shape == (1, 2, 2)
    assert found.tolist() == [[[0, np.float16(0.1)], [0, 0.5]]]


def test_of_a_small_box_that_is_enlarged_only_the_box_is_scaled():
    """At its whole size this mask would have 10,000 x 10,000 times its pixels. The box is half white."""
    mask = np.zeros((8, 8))
    mask[:, 4:] = 255
    box = CropGeometry(8, 8, 80_000, 80_000, crop_top=0, crop_left=40_000 - 8, height=16, width=16)
    assert masks.to_latents(grey(mask), box).tolist() == [[[0, 1], [0, 1]]]


def test_weights_keep_the_background_and_can_be_inverted_and_mirrored():
    mask = np.array([[[0, 0.5, 1]]], np.float16)
    weights = masks.loss_weights(mask, 0.25, invert=False, flip=False)
    assert weights.dtype == np.float32 and weights.tolist() == [[[0.25, 0.625, 1]]]
    assert masks.loss_weights(mask, 0.25, invert=True, flip=False).tolist() == [[[1, 0.625, 0.25]]]
    assert masks.loss_weights(mask, 0.25, invert=False, flip=True).tolist() == [[[1, 0.625, 0.25]]]


@pytest.mark.parametrize("size", [(131, 70), (64, 200), (100, 100), (513, 300)])
@pytest.mark.parametrize("flip", [False, True])
def test_a_mask_lies_on_what_it_masks(size, flip):
    """An image that is its own mask: the mean of its pixels in each latent is the mask's value there."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 2, (5, 7), dtype=np.uint8) * 255
    picture = Image.fromarray(noise).resize(size, Image.Resampling.NEAREST)
    geometry = crop_geometry(*size, BucketRule(resolution=64, step=32, min_side=32, max_side=128))
    pixels = images.resize_and_crop(picture.convert("RGB"), geometry, flip)[..., 0] / 255
    expected = pixels.reshape(geometry.height // 8, 8, geometry.width // 8, 8).mean((1, 3))
    found = masks.loss_weights(masks.to_latents(picture, geometry), 0.0, invert=False, flip=flip)[0]
    # The image is resized with Lanczos, which overshoots at edges, the mask with means. One latent off is 0.2 and more here.
    assert np.abs(found - expected).mean() < 0.02


def test_a_mask_s_file_is_grey_and_of_one_meaning():
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    assert masks.decode(png(red)).getextrema() == (76, 76)
    clear = Image.new("RGBA", (4, 4), (255, 255, 255, 0))
    with pytest.raises(BadImage) as error:
        masks.decode(png(clear))
    assert error.value.reason == "is transparent: save it in black and white, without transparency"


def test_alpha_is_the_opacity_of_the_image_as_it_is_shown():
    picture = Image.new("RGBA", (4, 2), (10, 20, 30, 255))
    picture.putpixel((0, 0), (10, 20, 30, 128))
    rotated = Image.Exif()
    rotated[0x0112] = 6  # a quarter turn clockwise
    assert masks.alpha(png(picture)).getpixel((0, 0)) == 128
    turned = masks.alpha(png(picture, exif=rotated))
    assert turned.size == (2, 4) and turned.getpixel((1, 0)) == 128 and turned.getpixel((0, 0)) == 255
    assert masks.alpha(png(picture.convert("RGB"))).getextrema() == (255, 255)
    hashes = np.array(["0" * 31 + "1", "0" * 31 + "2"], "S32")
    assert masks.alpha_hashes(hashes).tolist() == [b"alpha:" + b"0" * 25 + digit for digit in (b"1", b"2")]


def test_masks_are_found_by_the_names_of_their_images():
    names = ["a/cat.jpg", "a/cat-masklabel.png", "b/cat.jpg", "dog.png", "dog_mask.png", "dog.mask.webp", "my_mask.png"]
    assert masks.masks_beside(names) == {
        "a/cat.jpg": ["a/cat-masklabel.png"],
        "dog.png": ["dog.mask.webp", "dog_mask.png"],
    }
    assert masks.masks_beside(["x.png", "x_mask.png", "x_mask_mask.png"]) == {"x.png": ["x_mask.png"]}
    # A Mac may write the letters of one of the two names in their decomposed form.
    assert masks.masks_beside(["caf\u00e9.png", "cafe\u0301_mask.png"]) == {"caf\u00e9.png": ["cafe\u0301_mask.png"]}
    assert masks.masks_in_folder(["cafe\u0301.png"], ["caf\u00e9"]) == {"caf\u00e9": ["cafe\u0301.png"]}
    files = ["a/cat.png", "a/dog-masklabel.png", "b/cat.jpg", "a/cat.txt", "a/my_mask.png", "c.png"]
    assert masks.masks_in_folder(files, ["a/cat", "a/dog", "a/my_mask"]) == {
        "a/cat": ["a/cat.png"],
        "a/dog": ["a/dog-masklabel.png"],
        "a/my_mask": ["a/my_mask.png"],
    }


def test_masks_stay_with_their_images_and_count_in_the_hash_of_the_data():
    mask = b"the mask of 1"
    one = Sample("1.png", "01", "a", 64, 64, 2, lambda: b"1", mask_hash=content_hash(mask), load_mask=lambda: mask)
    clear = replace(one, name="2.png", image_hash="02", set=1, mask_hash="alpha:2", load_mask=None)
    plain = replace(one, name="3.png", image_hash="03", set=2, mask_hash="", load_mask=None)
    samples = Samples.concat([Samples.of([one]), Samples.of([clear]), Samples.of([plain])]).take(np.array([2, 1, 0]))
    assert [sample.mask_hash for sample in samples] == ["", clear.mask_hash, one.mask_hash]
    assert samples[2].read_mask() == mask and samples[1].load_mask is None
    changed = Samples.of([replace(one, load_mask=lambda: b"another")])[0]
    with pytest.raises(UserError, match="^the mask of 1.png was changed after it was checked"):
        changed.read_mask()
    rule = BucketRule(resolution=64, step=32, min_side=32, max_side=128)
    hashes = {
        dataset_hash(make_items(found, rule)[0])
        for found in ([one], [replace(one, mask_hash="")], [replace(one, mask_hash="04")])
    }
    assert len(hashes) == 3
    assert Samples.of([plain]).masks is None


def test_the_background_is_shown_in_red():
    """Of a picture of another size than the mask; white and black are as far apart from red as each other."""
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    for colour in ("white", "black"):
        picture = Image.new("RGB", (16, 16), colour)
        shown = masks.overlaid(picture, mask, invert=False)
        assert shown.getpixel((3, 8)) == picture.getpixel((3, 8))
        red, green, blue = shown.getpixel((12, 8))
        assert red - 40 > green and red - 40 > blue
        assert masks.overlaid(picture, mask, invert=True).getpixel((12, 8)) == picture.getpixel((12, 8))
