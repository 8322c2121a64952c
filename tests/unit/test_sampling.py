"""Pictures from cached text equal those of diffusers' own pipeline, called as anybody would call it."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from PIL import Image

from sushi_research import sampling
from sushi_research.models import loading, sd15, sdxl

CPU = torch.device("cpu")
MODELS = {"sd15": sd15, "sdxl": sdxl}
PROMPTS, SEEDS = ["a salmon nigiri", "tuna " * 10], [0, 7]
SETTINGS = {"steps": 3, "guidance": 4.0, "height": 48, "width": 64}


@pytest.fixture
def model(architecture):
    return MODELS[architecture]


@pytest.fixture
def base(base_folder):
    return loading.resolve_base(str(base_folder))


@pytest.fixture
def encode(base, model):
    """A caption's embedding in fp32, as the caches hold it in fp16."""
    text = model.load_text(base, CPU)
    return lambda caption: model.encode_caption(text, caption)[0]


@pytest.fixture
def unet(base):
    return loading.load_unet(base, torch.float32, CPU)


@pytest.fixture
def reference(base, unet):
    """Draws with diffusers' pipeline from a prompt."""
    # The frozen UNet, as pictures are drawn from while training: for weights that want a gradient torch takes other
    # kernels, also under no_grad, and the last bits differ.
    pipeline = DiffusionPipeline.from_pretrained(base.folder, unet=unet)
    pipeline.scheduler = EulerDiscreteScheduler.from_pretrained(base.folder / "scheduler")
    pipeline.set_progress_bar_config(disable=True)

    def draw(prompt, seed, negative_prompt, output_type, guidance=SETTINGS["guidance"]):
        return pipeline(
            prompt,
            negative_prompt=negative_prompt,
            generator=torch.Generator("cpu").manual_seed(seed),
            num_inference_steps=SETTINGS["steps"],
            guidance_scale=guidance,
            height=SETTINGS["height"],
            width=SETTINGS["width"],
            output_type=output_type,
        ).images

    return draw


@pytest.mark.parametrize("negative_prompt", ["blurry", None])
def test_equal_to_the_pipeline(base, model, unet, encode, reference, negative_prompt):
    """None stands for no negative prompt: SDXL then takes zeros, as its model_index says, SD1.5 the empty caption."""
    negative = encode(negative_prompt or "")
    if negative_prompt is None:
        negative = sampling.unconditional(negative, force_zeros=model.NAME == "sdxl")
    texts = [encode(prompt) for prompt in PROMPTS]
    drawn = sampling.draw_latents(model, base, unet, texts, negative, seeds=SEEDS, **SETTINGS)
    expected = [reference(prompt, seed, negative_prompt, "latent") for prompt in PROMPTS for seed in SEEDS]
    assert len(drawn) == 4
    for found, right in zip(drawn, expected, strict=True):
        assert found.shape == (1, 4, 6, 8)
        assert torch.equal(found, right)
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_decoding_equals_the_pipeline(base, model, unet, encode, reference):
    negative = sampling.unconditional(encode(""), force_zeros=model.NAME == "sdxl")
    latents = sampling.draw_latents(model, base, unet, [encode("a cat")], negative, seeds=[3], **SETTINGS)
    [picture] = sampling.decode(loading.load_vae(base, torch.float32, CPU), latents, model.SCALING_FACTOR)
    [right] = reference("a cat", 3, None, "pil")
    assert isinstance(picture, Image.Image) and picture.size == (64, 48)
    assert np.array_equal(np.asarray(picture), np.asarray(right))


def test_without_guidance_the_negative_does_not_matter(base, model, unet, encode):
    settings = SETTINGS | {"guidance": 1.0}
    text = [encode("a cat")]
    one, other = (
        sampling.draw_latents(model, base, unet, text, encode(negative), seeds=[0], **settings)[0]
        for negative in ("blurry", "dark")
    )
    assert torch.equal(one, other)


def test_zeros_where_the_base_wants_them():
    text = {"hidden": torch.ones(77, 4), "pooled": torch.ones(3)}
    assert sampling.unconditional(text, force_zeros=False) is text
    zeros = sampling.unconditional(text, force_zeros=True)
    assert zeros.keys() == text.keys() and not any(tensor.any() for tensor in zeros.values())
    assert zeros["hidden"].shape == (77, 4) and zeros["pooled"].shape == (3,)


def test_the_unet_and_torchs_generator_are_left_as_they_were(base, model, unet, encode):
    unet.train()
    seen = []
    unet.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    state = torch.get_rng_state()
    sampling.draw_latents(model, base, unet, [encode("a")], encode(""), seeds=[0], **SETTINGS)
    assert seen == [False] * SETTINGS["steps"], "no dropout in a picture"
    assert unet.training
    assert torch.equal(torch.get_rng_state(), state)
    unet.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sampling.draw_latents(model, base, unet, [encode("a")], encode(""), seeds=[0], **SETTINGS)
    assert unet.training, "after a failure too"
