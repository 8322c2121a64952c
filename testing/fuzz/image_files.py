"""What is fuzzed of training data: images, captions, and tables of both."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path

from sushi_research.errors import UserError


def make_images(folder: Path) -> None:
    """PNG, JPEG, WebP and GIF with EXIF, a colour profile and text."""
    from PIL import Image, ImageCms, PngImagePlugin

    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "a" * 100, zip=True)
    text.add(b"cHRM", b"\0\0\x7a\x26" * 8)
    text.add(b"gAMA", b"\0\0\xb1\x8f")
    image = Image.effect_mandelbrot((24, 16), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    image.save(folder / "a.png", pnginfo=text, exif=exif)
    image.save(folder / "b.png", icc_profile=profile)
    image.convert("P").save(folder / "c.png", transparency=0)
    image.convert("I").convert("I;16").save(folder / "d.png")
    image.save(folder / "a.jpg", exif=exif, icc_profile=profile)
    image.convert("CMYK").save(folder / "b.jpg")
    image.save(folder / "a.webp", exif=exif, icc_profile=profile)
    image.convert("RGBA").save(folder / "b.webp", lossless=True)
    image.save(folder / "a.gif")


def read_image(folder: Path, name: str) -> object:
    from sushi_research.data.images import decode_and_describe

    return decode_and_describe((folder / name).read_bytes())


def make_photos(folder: Path) -> None:
    """Files of the demo, and of its pages, as they are in the repository; and what cameras and phones make of one of them."""
    from PIL import Image

    root = Path(__file__).parents[2]
    names = (
        "demo/photos/star/10_tuna_maki.jpg",
        "demo/photos/night/02_egg_temaki.webp",
        "demo/photos/night/00_tuna_nigiri.png",
    )
    for name in (*names, "docs/images/guide_learned.jpg"):
        shutil.copy(root / name, folder)
    with Image.open(root / names[0]) as photo:
        photo.save(folder / "progressive.jpg", progressive=True, subsampling=2, quality=80)
        photo.save(folder / "phone.jpg", format="MPO", save_all=True, append_images=[photo.resize((64, 64))])
        photo.convert("L").save(folder / "grey.jpg")
        photo.save(folder / "photo.avif", quality=60)
        photo.save(folder / "photo.bmp")
        photo.save(folder / "photo.tif", compression="tiff_lzw")
        for suffix in ("gif", "webp", "png"):  # animations, of which the first frame is used
            photo.save(folder / f"moving.{suffix}", save_all=True, append_images=[photo.rotate(90)], duration=100)


def read_photo(folder: Path, name: str) -> object:
    """The whole way of a picture to the VAE."""
    import numpy

    from sushi_research.data.buckets import BucketRule, crop_geometry
    from sushi_research.data.images import decode, resize_and_crop
    from sushi_research.data.near_duplicates import fingerprint

    image = decode((folder / name).read_bytes())
    rule = BucketRule(resolution=128, step=32, min_side=64, max_side=256, upscale=True)
    geometry = crop_geometry(*image.size, rule)
    # A sliver that covers its bucket is enlarged beyond all memory; `make_items` is given what was checked.
    if geometry.resized_width * geometry.resized_height < 10_000_000:
        pixels = resize_and_crop(image, geometry, flip=False)
        assert pixels.shape == (geometry.height, geometry.width, 3)
    return fingerprint(numpy.asarray(image))


def make_masks(folder: Path) -> None:
    """Masks as editors and segmentation tools write them: grey, of one bit, a palette, 16 bits, colours, JPEG."""
    from PIL import Image, ImageDraw

    mask = Image.new("L", (40, 24))
    ImageDraw.Draw(mask).ellipse((5, 2, 30, 20), fill=255)
    mask.save(folder / "grey.png")
    mask.convert("1").save(folder / "bit.png")
    mask.convert("P").save(folder / "palette.png")
    mask.convert("I").convert("I;16").save(folder / "sixteen.png")
    mask.convert("RGB").save(folder / "colour.webp", lossless=True)
    mask.save(folder / "grey.jpg")


def read_mask(folder: Path, name: str) -> object:
    import numpy

    from sushi_research.data import masks
    from sushi_research.data.buckets import CropGeometry

    mask = masks.decode((folder / name).read_bytes())
    geometry = CropGeometry(mask.height, mask.width, 64, 96, 0, 16, 64, 64)
    latents = masks.to_latents(mask, geometry)
    for invert in (False, True):
        weights = masks.loss_weights(latents, 0.25, invert=invert, flip=invert)
        assert weights.shape == (1, 8, 8) and weights.min() >= 0.25 and weights.max() <= 1
    return numpy.isfinite(latents).all()


def bad_image() -> tuple[type[BaseException], ...]:
    from sushi_research.data.images import BadImage

    return (BadImage,)


def make_captions(folder: Path) -> None:
    (folder / "sub").mkdir()
    for name in ("a", "sub/b", "sub/\u304b\u3099", "c"):
        (folder / f"{name}.png").write_bytes(b"not read here")
    (folder / "a.txt").write_text("a salmon nigiri, 2 pieces\nsecond line\n")
    (folder / "c.caption").write_text("\ufefftuna \u30de\u30b0\u30ed", encoding="utf-16")
    entries = [{"file_name": "b.png", "text": "two"}, {"file_name": "\u304c.png", "text": "three"}]
    (folder / "sub/metadata.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def read_captions(folder: Path, name: str) -> object:
    from sushi_research.data.folder_files import list_files
    from sushi_research.data.found import CaptionRule
    from sushi_research.data.image_folder import find_in_folder
    from sushi_research.data.scan import Scan
    from sushi_research.remembered import NOTHING_REMEMBERED

    result = Scan(source=str(folder))
    found = find_in_folder(result, list_files(result, folder, {}), CaptionRule("text"), NOTHING_REMEMBERED)
    named = {problem.name for problem in result.problems}
    images = list(zip(found.names.to_pylist(), found.captions.to_pylist(), strict=True))
    assert all(captions or name in named for name, captions in images), "an image without caption or problem"
    if result.problems:
        raise UserError("; ".join(f"{problem.name}: {problem.reason}" for problem in result.problems[:3]))
    return images


def _table() -> object:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    cells = [{"bytes": b"image %d" % number, "path": None} for number in range(3)]
    return datasets.Dataset.from_dict({"image": cells, "text": ["one", "two", "three"]}, features=features)


def make_tables(folder: Path) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet

    datasets.disable_progress_bars()
    table = _table()
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(folder / "saved"))
    card = "---\nlicense: mit\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: train.*\n---\n# Sushi\n"
    plain = table.data.table
    for kind in ("parquet", "arrow", "dictionary"):
        (folder / kind).mkdir()
        (folder / kind / "README.md").write_text(card)
    pyarrow.parquet.write_table(plain, folder / "parquet/train.parquet", compression="snappy")
    (folder / "parquet/.huggingface.yaml").write_text("configs:\n- config_name: default\n  data_files: train.parquet\n")
    with (
        pyarrow.OSFile(str(folder / "arrow/train.arrow"), "wb") as sink,
        pyarrow.ipc.new_file(sink, plain.schema) as file,
    ):
        file.write_table(plain)
    short = pyarrow.table({"image": plain["image"], "text": plain["text"].dictionary_encode()})
    with (
        pyarrow.OSFile(str(folder / "dictionary/train.arrow"), "wb") as sink,
        pyarrow.ipc.new_stream(sink, short.schema) as file,
    ):
        file.write_table(short)


def read_table(folder: Path, name: str) -> object:
    import datasets

    from sushi_research.data.found import CaptionRule
    from sushi_research.data.hf_dataset import columns_of, find_in_table, place_of
    from sushi_research.data.images import BadImage
    from sushi_research.data.scan import Scan
    from sushi_research.data.tables import open_folder, open_saved
    from sushi_research.fingerprints import HashCache
    from sushi_research.remembered import NOTHING_REMEMBERED

    top = folder / Path(name).parts[0]
    datasets.config.HF_DATASETS_CACHE = folder / "copies"
    table = (open_saved if top.name == "saved" else open_folder)(top, "train", HashCache(Path(os.devnull)))
    result, rule = Scan(source=str(top)), CaptionRule("text")
    images = columns_of(result, table, "image", rule)
    find_in_table(result, images, place_of(images, result.source, NOTHING_REMEMBERED), "train", rule)
    for row in range(min(3, len(table.rows))):
        with contextlib.suppress(BadImage, OSError):
            images(row)
    return table
