"""Pictures are those of diffusers' pipeline, the base's are generated once, and distances are those of the latents."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sushi_research.caches.store import Store
from sushi_research.errors import UserError
from sushi_research.evaluation import drift, pictures
from sushi_research.evaluation.validation_set import ValidationSet

CAPTIONS = ["a cat", "a dog", "a bird"]
SAMPLE = {"steps": 2, "guidance": 3.0, "width": 32, "height": 64}


def job_of(here, count=2, **sample):
    config = here.job.config
    evaluation = config.evaluation.model_copy(update={"pictures": count})
    sample = config.sample.model_copy(update=SAMPLE | sample)
    return replace(here.job, config=config.model_copy(update={"evaluation": evaluation, "sample": sample}))


def sets_of(here, job):
    learned = pictures.learned_set(job, here.inputs, here.validation_set(), "base")
    return [learned, pictures.kept_set(job, here.inputs, CAPTIONS, "base")]


class Texts:
    """The caches, with texts encoded in fp32 when they are asked for."""

    def __init__(self, here) -> None:
        encoders = here.model.load_text(here.base, torch.device("cpu"))
        self.text_key, self.latents, self.latent_key = here.caches.text_key, here.caches.latents, here.caches.latent_key
        self.text = lambda caption: here.model.encode_caption(encoders, caption)[0]


@pytest.fixture(scope="module")
def of_base(setting, tmp_path_factory):
    """An architecture's job, inputs, sets and the store with the base's pictures; generated in two shares."""
    made = {}

    def make(name):
        if name not in made:
            here = copy.copy(setting(name))
            here.unet = copy.deepcopy(here.unet).eval()  # other tests share the setting's, which is in training mode
            job, inputs = job_of(here), replace(here.inputs, caches=Texts(here))
            sets, store = sets_of(here, job), Store.open(tmp_path_factory.mktemp("store"), drift.TENSORS, repair=True)
            for rank in range(2):
                share = SimpleNamespace(process_index=rank, num_processes=2)
                pictures.generate_missing(replace(job, accelerator=share), inputs, here.unet, sets, store)
                assert len(store) == 2 * (rank + 1)
            made[name] = here, job, inputs, sets, store
        return made[name]

    return make


def test_the_pictures_of_the_base_are_those_of_diffusers_pipeline(of_base):
    from diffusers import DiffusionPipeline, EulerDiscreteScheduler

    here, job, inputs, (learned, kept), store = of_base("sd15")
    pipeline = DiffusionPipeline.from_pretrained(here.base.source, unet=here.unet)
    # The base's own spacing does not fit two steps.
    pipeline.scheduler = EulerDiscreteScheduler.from_pretrained(
        here.base.source, subfolder="scheduler", timestep_spacing="trailing"
    )
    pipeline.set_progress_bar_config(disable=True)
    assert len({(picture.height, picture.width) for picture in learned.pictures}) == 2, "each has its image's size"
    for picture in [*learned.pictures, *kept.pictures]:
        expected = pipeline(
            picture.prompt,
            generator=torch.Generator("cpu").manual_seed(0),
            num_inference_steps=2,
            guidance_scale=3.0,
            height=picture.height,
            width=picture.width,
            output_type="latent",
        ).images[0]
        assert torch.equal(store.get(picture.key)["latents"], expected)


def test_the_base_has_no_distance_from_itself_and_distances_are_those_of_the_latents(of_base, monkeypatch):
    here, job, inputs, sets, store = of_base("sd15")
    learned, kept = (pictures.generate(job, inputs, each, store, here.unet) for each in sets)
    assert kept.distance.tolist() == kept.base_distance.tolist() == [[0.0], [0.0]]
    assert kept.distance.dtype == np.float32 and np.array_equal(learned.distance, learned.base_distance)
    [item] = [item for item in here.items if item.sample.caption == learned.picture_set.names[1]]
    image = here.caches.latents.get(here.caches.latent_key(item, False))["mean"].float() * 0.18215
    # Another order of summation in fp32.
    assert learned.distance[1, 0] == pytest.approx((learned.latents[1] - image).square().mean().item(), rel=1e-6)

    off = [latents[None] + 0.5 for latents in kept.latents]
    off[1][0, 0, 0, 0] = torch.nan
    monkeypatch.setattr(pictures.pipeline, "generate_latents", lambda *_, **__: iter(off))
    other = pictures.generate(job, inputs, sets[1], store, here.unet)
    assert other.distance[0, 0] == pytest.approx(0.25, rel=1e-5) and np.isnan(other.distance[1, 0])
    assert pictures.not_finite(sets[1], other.distance) == "1 of 2 (a dog)" and not pictures.not_finite(
        sets[1], kept.distance
    )


def test_prompts_are_the_first_captions_by_content_each_once(setting):
    here = setting("sd15")
    ordered = sorted(here.items, key=lambda item: item.sample.image_hash)
    captions = ["b", "a", "b", "c", "d", "e", "f"]
    items = tuple(
        replace(item, sample=replace(item.sample, caption=caption))
        for item, caption in zip(ordered, captions, strict=True)
    )
    learned = pictures.learned_set(job_of(here, 3), here.inputs, ValidationSet(items, 4, "image", "hash"), "base")
    assert learned.names == ("b", "a", "c") and learned.timesteps().tolist() == [[0], [0], [0]]
    assert [(each.height, each.width) for each in learned.pictures] == [items[n].bucket for n in (0, 1, 3)]
    assert [name for name, _ in pictures.rows_of([learned])] == [f"0{number}-learned-seed0.png" for number in range(3)]
    kept = pictures.kept_set(job_of(here, 9, width=None), here.inputs, CAPTIONS, "base")
    assert [(each.prompt, each.height, each.width) for each in kept.pictures] == [(text, 64, 64) for text in CAPTIONS]
    assert pictures.kept_set(job_of(here, 0), here.inputs, CAPTIONS, "base") is None
    assert pictures.kept_set(job_of(here), here.inputs, [], "base") is None


def test_a_set_is_bound_to_what_determines_its_pictures(setting):
    here = setting("sd15")
    jobs = [job_of(here, **changes) for changes in ({"steps": 3}, {"guidance": 4.0}, {"negative_prompt": "grey"})]
    jobs.append(replace(job_of(here), precision="bf16"))
    variants = [sets_of(here, job) for job in [job_of(here), *jobs]]
    variants.append([pictures.learned_set(job_of(here), here.inputs, here.validation_set(), "another")])
    keys = [picture.key for sets in variants for each in sets for picture in each.pictures]
    assert len(set(keys)) == len(keys) and len({each.hash for sets in variants for each in sets}) == 11
    more = sets_of(here, job_of(here, 3))
    for few, many in zip(variants[0], more, strict=True):
        assert many.pictures[:2] == few.pictures and many.hash != few.hash


def test_what_is_there_is_not_generated_again_and_what_is_not_finite_is_refused(of_base, tmp_path, monkeypatch):
    here, job, inputs, sets, store = of_base("sd15")
    pictures.generate_missing(job, inputs, None, sets, store)  # needs no UNet
    latents = [torch.zeros(1, 4, 8, 8), torch.full((1, 4, 8, 8), torch.inf)]
    monkeypatch.setattr(pictures.pipeline, "generate_latents", lambda *_, **__: iter(latents))
    empty = Store.open(tmp_path, drift.TENSORS, repair=True)
    with pytest.raises(
        UserError, match="a picture that is not finite .* for the prompt 'a (cat|dog)': use train.precision"
    ):
        pictures.generate_missing(job, inputs, None, sets[1:], empty)
    assert len(empty) == 1, "the picture before it is kept"
