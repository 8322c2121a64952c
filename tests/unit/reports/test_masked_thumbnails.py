"""The pictures of masked images on pages show what is background."""

import io

from PIL import Image

from sushi_research.config import SDXLTraining
from sushi_research.config.sets import sets_of
from sushi_research.data.buckets import BucketRule
from sushi_research.data.items import make_items
from sushi_research.data.samples import Sample
from sushi_research.fingerprints import content_hash
from sushi_research.reports import thumbnails
from sushi_research.reports.data_page.pictures import picture_of
from sushi_research.runs.run_folder import open_run_folder


def png(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def test_the_background_of_a_mask_is_red_on_pages(tmp_path):
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    image, mask = png(Image.new("RGB", (64, 64), "green")), png(mask)
    sample = Sample("a.png", content_hash(image), "a", 64, 64, 1, lambda: image)
    masked = Sample(**vars(sample) | {"mask_hash": content_hash(mask), "load_mask": lambda: mask})
    config = SDXLTraining(
        model={"base": "base"}, data={"path": "photos"}, train={"steps": 1}, masks={"source": "files"}
    )
    sets, found = sets_of(config), []
    for name, each in (("plain", sample), ("masked", masked)):
        items, _ = make_items([each], BucketRule(resolution=64, step=32, min_side=32, max_side=128))
        with open_run_folder(tmp_path, name) as run:
            thumbnails.write(run, items, sets)
            [shown], _ = thumbnails.pictures(run)
        found += [shown.source, picture_of(each, sets)]
    for small, is_masked in zip(found, (False, False, True, True), strict=True):
        picture = Image.open(io.BytesIO(small))
        left, right = picture.getpixel((10, 32)), picture.getpixel((54, 32))
        assert left[0] < 20 < left[1]
        assert (right[0] > 100) == is_masked
