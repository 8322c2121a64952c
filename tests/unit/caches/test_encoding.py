"""What goes into the caches: keyed by all that made it, computed alone, and only where it is missing."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image

from sushi_research import models
from sushi_research.caches import encoding as encode
from sushi_research.caches.caches import Caches
from sushi_research.caches.keys import hex_digits, owners
from sushi_research.caches.latent_entries import LatentEntries, latent_entries, latent_key, latent_keys
from sushi_research.caches.store import Store
from sushi_research.caches.text_keys import TextEntries, text_key, text_keys
from sushi_research.conditioning import Chunks
from sushi_research.data import images
from sushi_research.data.buckets import BucketRule
from sushi_research.data.items import make_items
from sushi_research.data.samples import Sample
from sushi_research.errors import UserError
from sushi_research.fingerprints import content_hash
from sushi_research.models import loading
from sushi_research.remembered import Remembered

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


def missing_of(store, items, flips) -> LatentEntries:
    entries = latent_entries([(items, flip) for flip in flips], "v", torch.float32)
    return entries.take(~store.has(entries.keys))


def test_a_key_has_all_that_decides_the_pixels(items):
    item = next(each for each in items if each.sample.width == 97)
    geometry = item.geometry
    keys = [
        latent_key(item, flip, vae, dtype)
        for flip in (False, True)
        for vae in ("v1", "v2")
        for dtype in (torch.float32, torch.float16)
    ]
    other_image = replace(item, sample=replace(item.sample, image_hash="ff"))
    keys.append(latent_key(other_image, False, "v1", torch.float32))
    for change in (
        {"resized_height": 63},
        {"resized_width": 98},
        {"crop_top": 1},
        {"crop_left": 1},
        {"height": 32},
        {"width": 32},
    ):
        changed = replace(item, geometry=replace(geometry, **change))
        keys.append(latent_key(changed, False, "v1", torch.float32))
    converted = replace(item, sample=replace(item.sample, converted=True))
    keys.append(latent_key(converted, False, "v1", torch.float32))
    assert len(set(keys)) == 16
    # Neither the file's name, nor its caption, nor which repetition it is.
    same = replace(item, instance=7, sample=replace(item.sample, name="x.png", caption="other", repeats=9))
    assert latent_key(same, False, "v1", torch.float32) == keys[0]


def test_a_text_key_has_the_caption_the_encoders_and_the_layer():
    keys = [
        text_key("a", ["e1"], {"clip_skip": 1}),
        text_key("b", ["e1"], {"clip_skip": 1}),
        text_key("a", ["e2"], {"clip_skip": 1}),
        text_key("a", ["e1", "e2"], {"clip_skip": 1}),
        text_key("a", ["e1"], {"clip_skip": 2}),
    ]
    assert len(set(keys)) == 5


def test_keys_as_columns_are_the_keys_of_single_items(items, samples):
    converted = make_items([replace(sample, converted=number == 1) for number, sample in enumerate(samples)], RULE)[0]
    for each in (items, converted, list(converted), items[:0]):
        for flip in (False, True):
            expected = [latent_key(item, flip, "v", torch.float16) for item in each]
            assert hex_digits(latent_keys(each, flip, "v", torch.float16)) == expected
    captions, settings = ["", "a cat", 'caf\u00e9 "x" \\ \n', "\U0001f408"], {"clip_skip": 2}
    expected = [text_key(caption, ["e1", "e2"], settings) for caption in captions]
    assert hex_digits(text_keys(arrow(*captions), ["e1", "e2"], settings)) == expected


def test_what_is_missing_is_listed_once_in_an_order_of_content(items, store, vae, tmp_path):
    missing = missing_of(store, items, (False, True))
    keys = hex_digits(missing.keys)
    assert len(items) == 4 and len(missing) == 6, "a repetition needs no entry of its own"
    assert keys == sorted(keys)
    for number, key in enumerate(keys):
        assert latent_key(missing.item(number), bool(missing.flips[number]), "v", torch.float32) == key
        assert tuple(missing.buckets[number]) == missing.item(number).bucket
    assert missing.bytes == sum(2 * 4 * (h // 8) * (w // 8) * 2 for h, w in missing.buckets.tolist())
    assert hex_digits(missing_of(store, items[::-1], (True, False)).keys) == keys
    encode.encode_latents(store, missing.take(np.arange(2)), vae)
    assert hex_digits(missing_of(store, items, (False, True)).keys) == keys[2:]


def test_the_entries_of_a_data_set_are_remembered(items, tmp_path, monkeypatch):
    remembered = Remembered(tmp_path)

    def entries(vae: str) -> LatentEntries:
        return latent_entries([(items, False), (items, True), (list(items[:1]), False)], vae, torch.float32, remembered)

    first = entries("v")
    hashed = []
    monkeypatch.setattr("sushi_research.caches.latent_entries.digest", lambda data: hashed.append(data) or bytes(16))
    again = entries("v")
    for name in ("keys", "parts", "numbers", "flips"):
        assert np.array_equal(getattr(again, name), getattr(first, name))
    assert not hashed
    entries("another")
    assert len(hashed) == 9


def test_an_entry_is_the_vaes_posterior_of_the_pixels(items, store, vae):
    encode.encode_latents(store, missing_of(store, items, (False, True)), vae)
    for item in items:
        for flip in (False, True):
            key = latent_key(item, flip, "v", torch.float32)
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
    missing = missing_of(store, items, (False, True))
    keys = hex_digits(missing.keys)
    # Another run has made an entry meanwhile, and one process knows of it, the other does not: nothing shifts.
    later = missing.take(np.arange(1, len(missing)))
    lists = [missing, later] if int(keys[0], 16) % 2 == 0 else [later, missing]
    for rank in range(2):
        before = len(store)
        encode.encode_latents(store, lists[rank], vae, rank=rank, world=2)
        assert 0 < len(store) - before < len(missing), "both processes have work"
    assert store.has(missing.keys).all()
    for world in (1, 2, 3, 7):
        assert owners(missing.keys, world).tolist() == [int(key, 16) % world for key in keys]


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
    missing = missing_of(store, items, (False,)).by_bucket()
    with pytest.raises(UserError, match=rf"not finite for {missing.item(1).sample.name}: "):
        encode.encode_latents(store, missing, BrokenVAE(name, value))
    assert store.has(missing.keys).tolist() == [True, False, False], "what was encoded before is kept"


class CountingVAE:
    """Wraps a VAE: notes the size of each batch, and has room for `room` images at most."""

    def __init__(self, vae, room: int) -> None:
        self.vae, self.room, self.sizes = vae, room, []
        self.device, self.dtype = vae.device, vae.dtype

    def encode(self, pictures: torch.Tensor) -> SimpleNamespace:
        self.sizes.append(len(pictures))
        if len(pictures) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.vae.encode(pictures)


@pytest.mark.parametrize(("room", "sizes"), [(4, [2, 4]), (2, [2, 4, 2, 2]), (1, [2, 1, 1, 1, 1, 1, 1])])
def test_batches_of_a_bucket_as_on_a_gpu(items, store, vae, tmp_path, monkeypatch, caplog, room, sizes):
    """Each is what it is alone, up to a rounding in fp16. Where the device is full, the batch is halved, for the others too."""
    missing = missing_of(store, items, (False, True))
    alone, together = store, Store.open(tmp_path / "together", encode.LATENT_TENSORS, repair=True)
    encode.encode_latents(alone, missing, vae)
    monkeypatch.setattr(
        encode, "_batch_size", lambda vae, bucket, limit: max(1, min(4, limit // (bucket[0] * bucket[1])))
    )
    counting = CountingVAE(vae, room)
    encode.encode_latents(together, missing, counting)
    assert counting.sizes == sizes
    assert len([each for each in caplog.records if "out of memory" in each.message]) == {4: 0, 2: 1, 1: 1}[room]
    for key in hex_digits(missing.keys):
        for name, tensor in together.get(key).items():
            # A convolution over four images may sum in another order: one step of fp16, 2^-10 of the value.
            torch.testing.assert_close(tensor, alone.get(key)[name], rtol=2**-10, atol=1e-5)
        assert together.metadata(key) == alone.metadata(key)


def test_an_image_that_changed_after_its_check_is_not_encoded(samples, store, vae, tmp_path):
    items, _ = make_items(samples, RULE)
    missing = missing_of(store, items, (False,))
    (tmp_path / "1.png").write_bytes((tmp_path / "0.png").read_bytes())
    with pytest.raises(UserError, match=r"1\.png was changed after it was checked"):
        encode.encode_latents(store, missing, vae)


def test_an_image_that_a_library_no_longer_decodes_is_named(items, store, vae, monkeypatch):
    def refuse(data: bytes) -> None:
        raise images.BadImage("HEIC needs pillow-heif")

    monkeypatch.setattr(images, "decode", refuse)
    missing = missing_of(store, items, (False,)).by_bucket()
    with pytest.raises(
        UserError, match=rf"^{missing.item(0).sample.name} could be .* not now: HEIC needs pillow-heif; "
    ):
        encode.encode_latents(store, missing, vae)


def arrow(*texts: str) -> pyarrow.Array:
    return pyarrow.array(texts, pyarrow.large_string())


@pytest.mark.parametrize("batch", [1, 2])
def test_captions_are_encoded_once_each_and_stored_in_fp16(tmp_path, batch):
    store = Store.open(tmp_path / "text", ("hidden",), repair=True)
    asked = []

    def encode_captions(captions: list[str]) -> list[tuple[dict[str, torch.Tensor], int]]:
        asked.append(captions)
        return [({"hidden": torch.full((77, 8), len(caption) + 0.1)}, len(caption)) for caption in captions]

    caches = Caches(store, store, "v", torch.float32, ("e",), {})
    missing = caches.missing_captions(arrow("a", "", "bb", "a"))
    assert sorted(missing.texts.to_pylist()) == ["", "a", "bb"]
    assert hex_digits(missing.keys) == sorted(text_key(text, ["e"], {}) for text in ("", "a", "bb"))
    encode.encode_texts(store, missing, encode_captions, batch=batch)
    assert [len(each) for each in asked] == ([1, 1, 1] if batch == 1 else [2, 1])
    assert sorted(sum(asked, [])) == ["", "a", "bb"]
    key = text_key("bb", ["e"], {})
    assert torch.equal(store.get(key)["hidden"], torch.full((77, 8), 2.1).half())
    assert store.metadata(key) == {"caption": "bb", "tokens_cut": 2}
    assert caches.missing_captions(arrow("a", "", "c")).texts.to_pylist() == ["c"]


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_captions_in_a_batch_are_what_they_are_alone(bases, name):
    model, base = models.load(name), loading.resolve_base(str(bases[name]))
    text, captions = model.load_text(base, CPU), ["a cat", "", "b " * 100, "a cat on a plate"]
    for chunks in (Chunks(), Chunks(2), Chunks(2, "kohya")):
        alone = [model.encode_caption(text, caption, chunks) for caption in captions]
        for batch in (1, 3):
            for (tensors, cut), (expected, expected_cut) in zip(
                model.encode_captions(text, captions, chunks, batch=batch), alone, strict=True
            ):
                assert cut == expected_cut
                for key, tensor in expected.items():
                    # A matrix product over more rows may sum in another order: some steps of fp32.
                    tolerance = {"rtol": 0, "atol": 0} if batch == 1 else {"rtol": 1e-5, "atol": 1e-5}
                    torch.testing.assert_close(tensors[key], tensor, **tolerance)


def test_a_text_embedding_that_is_not_finite_names_the_caption(tmp_path):
    store = Store.open(tmp_path / "text", ("hidden",), repair=True)
    missing = TextEntries.of(text_keys(arrow("a cat"), ["e"], {}), arrow("a cat"))
    with pytest.raises(UserError, match="not finite for the caption 'a cat'"):
        encode.encode_texts(store, missing, lambda _: [({"hidden": torch.full((77, 8), 1e6)}, 0)])
    assert len(store) == 0
