"""What is fuzzed of training data: images, captions, and tables of both."""

from __future__ import annotations

import contextlib
import json
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
    from sushi_research.data.image_folder import find_in_folder
    from sushi_research.data.samples import Scan

    result = Scan(source=str(folder))
    images, _ = find_in_folder(result, folder, "text", {})
    named = {problem.name for problem in result.problems}
    assert all(image.caption or image.name in named for image in images), "an image without caption or problem"
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

    from sushi_research.data.hf_dataset import find_in_table
    from sushi_research.data.images import BadImage
    from sushi_research.data.samples import Scan
    from sushi_research.data.tables import open_folder, open_saved

    top = folder / Path(name).parts[0]
    datasets.config.HF_DATASETS_CACHE = folder / "copies"
    table = (open_saved if top.name == "saved" else open_folder)(top, "train")
    for image in find_in_table(Scan(source=str(top)), table, "train", "image", "text")[:3]:
        with contextlib.suppress(BadImage, OSError):
            image.load()
    return table
