"""A batch is what the caches hold, with draws that are functions of the sample alone."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from sushi_research import randomness
from sushi_research.caches import encoding
from sushi_research.caches.caches import Caches
from sushi_research.caches.store import Store
from sushi_research.config import SDXLTraining
from sushi_research.config.sets import sets_of
from sushi_research.data.buckets import BucketRule
from sushi_research.data.items import make_items
from sushi_research.data.samples import Sample
from sushi_research.training.loader import Loader, is_flipped
from sushi_research.training.sampler import Sampler

CPU = torch.device("cpu")
SEED = 5
CONFIG = SDXLTraining(model={"base": "base"}, data={"path": "photos"}, train={"steps": 1})
SETS = sets_of(CONFIG)


def entry(number: int, flip: bool, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    mean = torch.full(shape, number + 0.5 * flip, dtype=torch.float16)
    return {"mean": mean, "std": mean + 100}


@pytest.fixture
def caches(tmp_path):
    texts = Store.open(tmp_path / "text", ("hidden", "pooled"), repair=True)
    latents = Store.open(tmp_path / "latents", encoding.LATENT_TENSORS, repair=True)
    return Caches(latents, texts, "vae", torch.float32, ("e1", "e2"), {})


@pytest.fixture
def items(caches):
    """Six items of five pictures in two buckets, their latents filled with the picture's number."""
    # The second has 33 columns too many, so that its cut moves by one when it is mirrored.
    sizes = [(64, 64), (97, 64), (130, 70), (64, 64), (128, 64)]
    samples = [
        Sample(f"{n}.png", f"{n:02d}", f"caption {n}", *size, 1 + (n == 3), bytes) for n, size in enumerate(sizes)
    ]
    items, problems = make_items(samples, BucketRule(resolution=64, step=32, min_side=32, max_side=128))
    assert not problems
    with caches.latents.writer() as writer:
        for item in {item.sample.image_hash: item for item in items}.values():
            for flip in (False, True):
                shape = (4, item.bucket[0] // 8, item.bucket[1] // 8)
                number = int(item.sample.image_hash)
                writer.add(caches.latent_key(item, flip), entry(number, flip, shape), {})
    with caches.texts.writer() as writer:
        for number in range(5):
            text = {"hidden": torch.full((77, 3), number).half(), "pooled": torch.full((2,), number).half()}
            writer.add(caches.text_key(f"caption {number}"), text, {})
    return items


@pytest.fixture
def loader(items, caches):
    """Makes a loader, closed in the end."""
    made = []

    def make(
        group: int = 4, batch_size: int = 4, rank: int = 0, world: int = 1, flip: float = 0.0, **changes
    ) -> Loader:
        sampler = Sampler(items.bucket_ids, group, SEED)
        options = {"batch_size": batch_size, "rank": rank, "world": world, "device": CPU}
        options["sets"] = [replace(each, flip=flip) for each in SETS]
        made.append(Loader(items, sampler, caches, **options, **changes))
        return made[-1]

    yield make
    for each in made:
        each.close()


def rows(loader: Loader, steps: range) -> dict[tuple, dict[str, torch.Tensor]]:
    """Everything that is known about each sample of some steps, by step and key."""
    found = {}
    for step in steps:
        for batch in loader.step(step):
            for index, key in enumerate(batch.keys):
                values = {"mean": batch.mean, "std": batch.std, "time_ids": batch.time_ids, **batch.text}
                values |= {"noise": batch.normal("noise"), "offset": batch.normal("noise_offset", (4,))}
                values["timestep"] = batch.integers("timestep", 1000)
                assert (step, key) not in found
                found[step, key] = {name: value[index] for name, value in values.items()}
    return found


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        for name, value in values.items():
            assert torch.equal(found[key][name], value), (key, name)


def test_nothing_beyond_the_end_of_the_run_is_prepared(loader):
    """The cache has the texts of the run's steps alone."""
    found, asked = loader(steps=2), []
    found._prepare = lambda step: asked.append(step) or []
    assert [list(found.step(step)) for step in range(2)] == [[], []]
    found.close()
    assert asked == [0, 1]


def test_a_batch_is_what_the_caches_hold(loader, items):
    by_name = {item.sample.name: item for item in items}
    seen = 0
    for step in range(6):
        for batch in loader(flip=0.5).step(step):
            assert len(batch) == len(batch.names) == len(batch.keys) <= 4
            for index, (name, (epoch, image, instance)) in enumerate(zip(batch.names, batch.keys, strict=True)):
                item, number = by_name[name], int(image)
                flip = is_flipped(SEED, 0.5, epoch, next(i for i in items if i.identity == (image, instance)))
                shape = (4, item.bucket[0] // 8, item.bucket[1] // 8)
                for tensor, expected in entry(number, flip, shape).items():
                    assert torch.equal(getattr(batch, tensor)[index], expected)
                assert (batch.text["hidden"][index] == number).all() and batch.text["hidden"].shape[1:] == (77, 3)
                assert (batch.text["pooled"][index] == number).all()
                assert batch.time_ids[index].tolist() == list(item.geometry.time_ids(flip, "image"))
                seen += 1
            assert batch.time_ids.dtype == torch.float32
    assert seen == 24


def test_the_founding_recipes_time_ids_are_the_buckets(loader):
    for batch in loader(time_ids="bucket").step(0):
        height, width = (8 * side for side in batch.mean.shape[2:])
        assert batch.time_ids.tolist() == [[height, width, 0, 0, height, width]] * len(batch)


def test_the_split_into_batches_and_processes_changes_no_sample(loader):
    whole = rows(loader(flip=0.5), range(5))
    assert_same(rows(loader(batch_size=1, flip=0.5), range(5)), whole)
    parts = [rows(loader(batch_size=2, rank=rank, world=2, flip=0.5), range(5)) for rank in range(2)]
    assert parts[0].keys().isdisjoint(parts[1]) and all(parts)
    assert_same(parts[0] | parts[1], whole)


def test_what_is_prefetched_is_the_same_noise(loader):
    ahead = loader(ahead=("noise",))
    assert_same(rows(ahead, range(3)), rows(loader(), range(3)))
    batch = next(ahead.step(3))
    assert batch.normal("noise") is batch.normal("noise"), "drawn once, in the background"
    assert torch.equal(batch.normal("posterior"), batch.normal("posterior")), "drawn when asked, and the same again"


def test_noise_comes_from_the_documented_streams(loader):
    batch = next(loader().step(0))
    shape = tuple(batch.mean.shape[1:])
    noise = [randomness.normal(SEED, "noise", *key, shape=shape) for key in batch.keys]
    assert np.array_equal(batch.normal("noise").numpy(), np.stack(noise))
    timesteps = [randomness.integer(SEED, "timestep", *key, high=1000) for key in batch.keys]
    assert batch.integers("timestep", 1000).tolist() == timesteps
    assert batch.integers("timestep", 1000).dtype == torch.int64


def test_repetitions_of_a_picture_have_noise_of_their_own(loader):
    found = rows(loader(group=6), range(1))
    repeats = [values["noise"] for (_, (_, image, _)), values in found.items() if image == "03"]
    assert len(repeats) == 2 and not torch.equal(*repeats)


def test_any_step_may_be_asked_for(loader):
    """A resumed run begins in the middle; one that went there step by step has the same batches."""
    walked = rows(loader(), range(4))
    assert_same(rows(loader(), range(3, 4)), {key: value for key, value in walked.items() if key[0] == 3})
    back_and_forth = loader()
    rows(back_and_forth, range(2, 3))
    assert_same(rows(back_and_forth, range(0, 4)), walked)


def test_flips(items):
    assert not any(is_flipped(SEED, 0.0, epoch, item) for epoch in range(20) for item in items)
    assert all(is_flipped(SEED, 1.0, epoch, item) for epoch in range(20) for item in items)
    flips = [[is_flipped(SEED, 0.3, epoch, item) for item in items] for epoch in range(100)]
    # 600 draws of fixed streams: five standard deviations are 0.094.
    assert abs(np.mean(flips) - 0.3) < 0.094
    assert len({tuple(epoch) for epoch in flips[:20]}) > 5, "drawn again each epoch"


def test_waiting_is_counted_until_it_is_taken(loader, monkeypatch):
    slow = loader()
    prepare = slow._prepare
    monkeypatch.setattr(slow, "_prepare", lambda step: (time.sleep(0.02), prepare(step))[1])
    list(slow.step(0))
    # The first step had to be waited for; sleep() never ends before its time.
    assert slow.take_waited() >= 0.02
    assert slow.take_waited() == 0.0


def test_a_lost_cache_entry_reaches_the_training(loader, caches, tmp_path):
    broken = loader()
    broken.caches = replace(caches, latents=Store.open(tmp_path / "empty", encoding.LATENT_TENSORS, repair=True))
    with pytest.raises(KeyError, match="has no entry"):
        rows(broken, range(2))


def test_the_loader_thread_takes_the_process_s_own_gpu(caches, items, monkeypatch):
    # With one process accelerate's device is `cuda` without an index, which torch.cuda.set_device refuses.
    chosen = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(torch.device("cuda", device)))
    sampler = Sampler(items.bucket_ids, 2, SEED)
    loader = Loader(items, sampler, caches, batch_size=2, rank=0, world=1, device=torch.device("cuda"), sets=SETS)
    loader._pool.submit(int).result()
    loader.close()
    assert chosen == [torch.device("cuda:3")]


def test_the_largest_batch_is_one_of_those_to_come_and_tells_its_step(loader):
    # An epoch has six samples in two buckets.
    for group, steps in ((4, 3), (1, 6), (4, None)):
        made = loader(group=group, steps=steps)
        largest = made.largest(0)
        batches = [batch for step in range(max(1, 6 // group)) for batch in made.step(step)]
        assert largest.mean.numel() == max(batch.mean.numel() for batch in batches)
        same = [batch for batch in batches if batch.keys == largest.keys]
        assert len(same) == 1 and torch.equal(same[0].mean, largest.mean) and same[0].step == largest.step
    assert loader(group=4, steps=3).largest(3) is None


def test_after_waiting_the_background_thread_is_idle(loader):
    made, slow = loader(steps=2), []
    prepare = made._prepare

    def slowly(step):
        time.sleep(0.2 if step == 1 else 0)
        slow.append(step)
        return prepare(step)

    made._prepare = slowly
    made.wait_for_prefetch()
    list(made.step(0))
    made.wait_for_prefetch()
    assert slow == [0, 1]
