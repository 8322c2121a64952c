"""What goes into the caches: keyed by all that made it, computed alone, and only where it is missing."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sushi_research.caches import encoding as encode
from sushi_research.caches.store import Store
from sushi_research.data import images
from sushi_research.data.buckets import BucketRule
from sushi_research.data.samples import Sample, make_items
from sushi_research.errors import UserError
from sushi_research.fingerprints import content_hash
from sushi_research.models import loading

RULE = BucketRule(resolution=64, step=32, min_side=32, max_side=128)
CPU = torch.device("cpu")


@pytest.fixture
def samples(tmp_path):
    """Three pictures of three shapes; one is shown twice."""
    found = []
    for number, size in enumerate([(64, 64), (97, 64), (130, 70)]):
        rng = np.random.default_rng(number)
        path = tmp_path / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
        data = path.read_bytes()
        found.append(Sample(path.name, content_hash(data), "a cat", *size, 1 + (number == 1), load=path.read_bytes))
    return found


@pytest.fixture
def items(samples):
    return make_items(samples, RULE)[0]


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path / "latents", encode.LATENT_TENSORS, repair=True)


@pytest.fixture(scope="module")
def vae(bases):
    return loading.load_vae(loading.resolve_base(str(bases["sd15"])), torch.float32, CPU)


def test_a_key_has_all_that_decides_the_pixels(items):
    item = next(each for each in items if each.sample.width == 97)
    geometry = item.geometry
    keys = [
        encode.latent_key(item, flip, vae, dtype)
        for flip in (False, True)
        for vae in ("v1", "v2")
        for dtype in (torch.float32, torch.float16)
    ]
    other_image = replace(item, sample=replace(item.sample, image_hash="ff"))
    keys.append(encode.latent_key(other_image, False, "v1", torch.float32))
    for change in (
        {"resized_height": 63},
        {"resized_width": 98},
        {"crop_top": 1},
        {"crop_left": 1},
        {"height": 32},
        {"width": 32},
    ):
        changed = replace(item, geometry=replace(geometry, **change))
        keys.append(encode.latent_key(changed, False, "v1", torch.float32))
    converted = replace(item, sample=replace(item.sample, converted=True))
    keys.append(encode.latent_key(converted, False, "v1", torch.float32))
    assert len(set(keys)) == 16
    # Neither the file's name, nor its caption, nor which repetition it is.
    same = replace(item, instance=7, sample=replace(item.sample, name="x.png", caption="other", repeats=9))
    assert encode.latent_key(same, False, "v1", torch.float32) == keys[0]


def test_a_text_key_has_the_caption_the_encoders_and_the_layer():
    keys = [
        encode.text_key("a", ["e1"], {"clip_skip": 1}),
        encode.text_key("b", ["e1"], {"clip_skip": 1}),
        encode.text_key("a", ["e2"], {"clip_skip": 1}),
        encode.text_key("a", ["e1", "e2"], {"clip_skip": 1}),
        encode.text_key("a", ["e1"], {"clip_skip": 2}),
    ]
    assert len(set(keys)) == 5


def test_what_is_missing_is_listed_once_in_an_order_of_content(items, store, vae):
    missing = encode.missing_latents(store, items, (False, True), "v", torch.float32)
    assert len(items) == 4 and len(missing) == 6, "a repetition needs no entry of its own"
    assert [key for key, *_ in missing] == sorted(key for key, *_ in missing)
    other_way = encode.missing_latents(store, items[::-1], (True, False), "v", torch.float32)
    assert [key for key, *_ in other_way] == [key for key, *_ in missing]
    encode.encode_latents(store, missing[:2], vae)
    left = encode.missing_latents(store, items, (False, True), "v", torch.float32)
    assert [key for key, *_ in left] == [key for key, *_ in missing[2:]]


def test_an_entry_is_the_vaes_posterior_of_the_pixels(items, store, vae):
    encode.encode_latents(store, encode.missing_latents(store, items, (False, True), "v", torch.float32), vae)
    for item in items:
        for flip in (False, True):
            key = encode.latent_key(item, flip, "v", torch.float32)
            pixels = images.resize_and_crop(images.decode(item.sample.read()), item.geometry, flip)
            with torch.no_grad():
                picture = torch.tensor(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
                posterior = vae.encode(picture).latent_dist
            row = store.get(key)
            assert torch.equal(row["mean"], posterior.mean[0].half())
            assert torch.equal(row["std"], posterior.std[0].half())
            assert row["mean"].shape == (4, item.bucket[0] // 8, item.bucket[1] // 8)
            assert store.metadata(key) == {"image": item.sample.image_hash, "size": list(item.bucket), "flip": flip}


def test_shares_of_the_processes_are_disjoint_and_whole(items, store, vae):
    missing = encode.missing_latents(store, items, (False, True), "v", torch.float32)
    # Another run has made an entry meanwhile, and one process knows of it, the other does not: nothing shifts.
    lists = [missing, missing[1:]] if int(missing[0][0], 16) % 2 == 0 else [missing[1:], missing]
    for rank in range(2):
        before = len(store)
        encode.encode_latents(store, lists[rank], vae, rank=rank, world=2)
        assert 0 < len(store) - before < len(missing), "both processes have work"
    assert all(key in store for key, *_ in missing)


class BrokenVAE:
    """A VAE whose second picture comes out as `value`."""

    device, dtype = CPU, torch.float32

    def __init__(self, name: str, value: float) -> None:
        self.name, self.value, self.calls = name, value, 0

    def encode(self, picture: torch.Tensor) -> SimpleNamespace:
        self.calls += 1
        parts = {"mean": torch.zeros(1, 4, 8, 8), "std": torch.ones(1, 4, 8, 8)}
        if self.calls == 2:
            parts[self.name][0, 1, 2, 3] = self.value
        return SimpleNamespace(latent_dist=SimpleNamespace(**parts))


# 70,000 is finite in fp32, and infinite where it is stored.
@pytest.mark.parametrize(("name", "value"), [("mean", float("nan")), ("std", float("inf")), ("mean", 70_000.0)])
def test_a_value_that_is_not_finite_names_the_file_and_is_not_stored(items, store, name, value):
    missing = encode.missing_latents(store, items, (False,), "v", torch.float32)
    with pytest.raises(UserError, match=rf"not finite for {missing[1][1].sample.name}: "):
        encode.encode_latents(store, missing, BrokenVAE(name, value))
    assert [key in store for key, *_ in missing] == [True, False, False], "what was encoded before is kept"


def test_an_image_that_changed_after_its_check_is_not_encoded(samples, store, vae, tmp_path):
    items, _ = make_items(samples, RULE)
    missing = encode.missing_latents(store, items, (False,), "v", torch.float32)
    (tmp_path / "1.png").write_bytes((tmp_path / "0.png").read_bytes())
    with pytest.raises(UserError, match=r"1\.png was changed after it was checked"):
        encode.encode_latents(store, missing, vae)


def test_captions_are_encoded_once_each_and_stored_in_fp16(tmp_path):
    store = Store.open(tmp_path / "text", ("hidden",), repair=True)
    asked = []

    def encode_caption(caption: str) -> tuple[dict[str, torch.Tensor], int]:
        asked.append(caption)
        return {"hidden": torch.full((77, 8), len(caption) + 0.1)}, len(caption)

    missing = encode.missing_captions(store, ["a", "", "bb", "a"], ["e"], {})
    assert sorted(caption for _, caption in missing) == ["", "a", "bb"]
    encode.encode_captions(store, missing, encode_caption)
    assert sorted(asked) == ["", "a", "bb"]
    key = encode.text_key("bb", ["e"], {})
    assert torch.equal(store.get(key)["hidden"], torch.full((77, 8), 2.1).half())
    assert store.metadata(key) == {"caption": "bb", "tokens_cut": 2}
    assert encode.missing_captions(store, ["a", "", "c"], ["e"], {}) == [(encode.text_key("c", ["e"], {}), "c")]


def test_a_text_embedding_that_is_not_finite_names_the_caption(tmp_path):
    store = Store.open(tmp_path / "text", ("hidden",), repair=True)
    missing = encode.missing_captions(store, ["a cat"], ["e"], {})
    with pytest.raises(UserError, match="not finite for the caption 'a cat'"):
        encode.encode_captions(store, missing, lambda _: ({"hidden": torch.full((77, 8), 1e6)}, 0))
    assert len(store) == 0
