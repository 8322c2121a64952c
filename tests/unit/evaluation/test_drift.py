"""The drift is the mean squared distance between two UNets' predictions on what the base drew, whoever computes which part."""

import copy
import functools

import numpy as np
import pytest
import torch

from sushi_research import objectives
from sushi_research.caches.store import Store
from sushi_research.errors import UserError
from sushi_research.evaluation import drift, validation_set

CAPTIONS = ("picture 0 of a", "picture 1 of b", "picture 2 of a")


def drift_set_of(here, captions=CAPTIONS, base_hash="base", side=64, dtype=torch.float32):
    return drift.make_drift_set(
        captions, here.caches.text_key, here.model, here.base, base_hash, side=side, dtype=dtype
    )


def generated(here, drift_set, folder):
    store = Store.open(folder, drift.TENSORS, repair=True)
    unet = copy.deepcopy(here.unet).eval()
    for rank in range(2):
        drift.generate_missing(drift_set, store, here.caches.text, here.model, here.base, unet, rank=rank, world=2)
        store.refresh()
    return store


@pytest.fixture(scope="module")
def generated_latents(setting, tmp_path_factory):
    """The drawings of the captions by an architecture's base, made once."""
    root = tmp_path_factory.mktemp("drawings")
    return functools.cache(lambda name: generated(setting(name), drift_set_of(setting(name)), root / name))


def measure_of(here, drift_set, store, **share):
    return drift.Drift(drift_set, store, here.caches.text, here.model, here.base, device=torch.device("cpu"), **share)


def moved(unet):
    """Another UNet: every bias a little higher."""
    other = copy.deepcopy(unet)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.endswith("bias"):
                parameter += 0.05
    return other


@pytest.mark.slow
def test_the_drift_equals_a_plain_reference(architecture, setting, generated_latents):
    """Written out one draw at a time; batches of four round otherwise."""
    here = setting(architecture)
    drift_set, store = drift_set_of(here), generated_latents(architecture)
    measure = measure_of(here, drift_set, store)
    measure.remember_base(here.unet)
    moved_by_base, own = measure.measure(here.unet)
    assert (moved_by_base == 0).all() and np.array_equal(own, measure.base_loss), "the base has not moved"
    other = moved(here.unet)
    found, loss = measure.measure(other)
    assert found.shape == (3, drift.NOISE_SAMPLES) and found.dtype == np.float32 and (found > 0).all()

    abar = objectives.alphas_cumprod()
    for index, caption in enumerate(CAPTIONS):
        x0 = store.get(drift_set.keys[index])["latents"].float()[None]
        text = {name: value[None] for name, value in here.caches.text(caption).items()}
        sizes = torch.tensor([[64, 64, 0, 0, 64, 64]], dtype=torch.float32)
        for number, t in enumerate(torch.from_numpy(validation_set.timesteps(caption, drift.NOISE_SAMPLES))):
            noise = validation_set.noise(caption, number, (4, 8, 8))[None]
            noised = abar[t].sqrt() * x0 + (1 - abar[t]).sqrt() * noise
            with torch.no_grad():
                one, two = (
                    here.model.predict(unet, noised, t[None], text, sizes, dtype=torch.float32)
                    for unet in (here.unet, other)
                )
            assert found[index, number] == pytest.approx((one - two).square().mean().item(), rel=1e-4)
            # The bases of tests predict the noise.
            for predicted, measured in ((one, measure.base_loss), (two, loss)):
                assert measured[index, number] == pytest.approx((predicted - noise).square().mean().item(), rel=1e-4)


def test_the_number_of_processes_changes_no_bit(setting, generated_latents):
    here = setting("sd15")
    drift_set, store = drift_set_of(here), generated_latents("sd15")
    other = moved(here.unet)
    shares = []
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        measure = measure_of(here, drift_set, store, rank=rank, world=world)
        assert not measure.knows_base
        measure.remember_base(here.unet)
        shares.append(np.stack([*measure.measure(other), measure.base_loss]))  # [drift, loss, base's loss]
    assert np.array_equal(shares[0], shares[1] + shares[2])
    assert (shares[1][:, 1] == 0).all() and (shares[2][:, [0, 2]] == 0).all()


def test_a_caption_is_sampled_once(setting, generated_latents, tmp_path):
    here = setting("sd15")
    store = generated_latents("sd15")
    before = {key: store.get(key)["latents"] for key in drift_set_of(here).keys}
    assert len(before) == 3 and all(value.shape == (4, 8, 8) for value in before.values())
    drift.generate_missing(drift_set_of(here), store, here.caches.text, here.model, here.base, None)  # needs no UNet
    again = generated(here, drift_set_of(here, CAPTIONS[1::-1]), tmp_path / "again")
    for key in drift_set_of(here).keys[:2]:
        assert torch.equal(before[key], again.get(key)["latents"]), "neither order nor company changes a drawing"


def test_the_validation_set_is_bound_to_what_decides_a_sample(setting):
    here = setting("sd15")
    drift_sets = [
        drift_set_of(here),
        drift_set_of(here, CAPTIONS[:2]),
        drift_set_of(here, base_hash="another"),
        drift_set_of(here, side=96),
        drift_set_of(here, dtype=torch.bfloat16),
    ]
    assert drift_set_of(here) == drift_sets[0] and len({drift_set.hash for drift_set in drift_sets}) == 5
    assert drift_sets[1].keys == drift_sets[0].keys[:2]
    assert not set(drift_sets[0].keys) & {key for drift_set in drift_sets[2:] for key in drift_set.keys}


def test_the_summary_is_over_captions():
    found = drift.summary(np.array([[1.0, 3.0], [4.0, 6.0], [7.0, 9.0]]))
    assert found == {"evaluation/drift": 5.0, "evaluation/drift_se": pytest.approx(3 / 3**0.5)}


def test_an_image_that_is_not_finite_is_named_and_the_others_are_kept(setting, tmp_path, monkeypatch):
    """As where fp16 overflows: the base is refused before anything is trained."""
    here = setting("sd15")
    drift_set, store = drift_set_of(here), Store.open(tmp_path, drift.TENSORS, repair=True)
    latents = [torch.zeros(1, 4, 8, 8), torch.full((1, 4, 8, 8), 70_000.0), torch.zeros(1, 4, 8, 8)]
    monkeypatch.setattr(drift.pipeline, "generate_latents", lambda *_, **__: iter(latents))
    with pytest.raises(UserError, match="an image that is not finite .* for the drift caption 'picture 1 of b': use "):
        drift.generate_missing(drift_set, store, here.caches.text, here.model, here.base, None)
    assert [key in store for key in drift_set.keys] == [True, False, False]
