"""Every model module offers the same functions by name, and they work on a tiny base of its architecture.

Modules are found by globbing: a new architecture is tested on arrival.
"""

import importlib
import inspect
from pathlib import Path

import diffusers
import pytest
import torch

import sushi_research.models
from sushi_research import config
from sushi_research.caches import encoding
from sushi_research.models import detect, loading

# The modules of an architecture, among those that read any base: they say so by their name in scripts/.
MODULES = sorted(
    path.stem
    for path in Path(sushi_research.models.__file__).parent.glob("*.py")
    if Path(f"scripts/train_{path.stem}_lora.py").is_file()
)
CONFIGS = {"sd15": config.SD15Training, "sdxl": config.SDXLTraining}
CPU = torch.device("cpu")


@pytest.fixture(params=MODULES)
def model(request):
    return importlib.import_module(f"sushi_research.models.{request.param}")


@pytest.fixture
def base(model, bases):
    return loading.resolve_base(str(bases[model.NAME]))


def test_both_architectures_are_here():
    assert {"sd15", "sdxl"} <= set(MODULES)


def test_names_and_signatures(model):
    assert model.NAME == model.__name__.rsplit(".", 1)[1]
    assert model.NAME in detect.NAMES and Path(detect.SCRIPTS[model.NAME]).is_file()
    assert hasattr(diffusers, model.PIPELINE)
    assert list(inspect.signature(model.load_text).parameters) == ["base", "device", "dtype"]
    assert list(inspect.signature(model.pipeline_text).parameters) == ["base", "text"]
    predict = list(inspect.signature(model.predict).parameters)
    assert predict[:4] == ["unet", "noisy", "timesteps", "text"] and predict[4:] in ([], ["time_ids"])
    settings = inspect.signature(model.encode_caption).parameters
    assert tuple(settings)[2:] == model.TEXT_SETTINGS
    fields = CONFIGS[model.NAME].model_fields["model"].annotation.model_fields
    assert set(model.TEXT_SETTINGS) <= set(fields)


def test_the_whole_forward(model, base):
    text, cut = model.encode_caption(model.load_text(base, CPU), "a cat")
    assert set(text) == set(model.TEXT_TENSORS) and cut == 0
    unet = loading.load_unet(base, torch.float32, CPU)
    batch = {name: tensor[None].repeat(3, *[1] * tensor.ndim) for name, tensor in text.items()}
    noisy, ids = torch.randn(3, 4, 8, 12), torch.tensor([[64.0, 96, 0, 0, 64, 96]] * 3)
    sizes = "time_ids" in inspect.signature(model.predict).parameters
    out = model.predict(unet, noisy, torch.tensor([0, 500, 999]), batch, *[ids] * sizes)
    assert out.shape == noisy.shape and out.dtype == torch.float32
    one = {name: tensor[1:2] for name, tensor in batch.items()}
    alone = model.predict(unet, noisy[1:2], torch.tensor([500]), one, *[ids[1:2]] * sizes)
    # Another batch size may round otherwise in the last bits of a UNet of 60 layers.
    assert torch.allclose(out[1], alone[0], atol=1e-4)


def test_text_shapes_tell_the_size_of_a_cache_row(model, base):
    text, _ = model.encode_caption(model.load_text(base, CPU), "a cat")
    assert {name: tuple(tensor.shape) for name, tensor in text.items()} == model.text_shapes(base)


def test_the_unet_is_frozen_and_of_the_asked_dtype(model, base):
    unet = loading.load_unet(base, torch.bfloat16, CPU)
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in unet.parameters())


def test_encoding_equals_diffusers(model, base):
    import numpy as np
    from diffusers.image_processor import VaeImageProcessor

    vae = loading.load_vae(base, torch.float32, CPU)
    assert vae.config.scaling_factor == model.SCALING_FACTOR
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    picture = VaeImageProcessor().preprocess(pixels[None].astype(np.float32) / 255.0)
    posterior = vae.encode(picture).latent_dist
    mean, std = encoding.encode_image(vae, pixels)
    assert mean.dtype == torch.float16 and mean.shape == (4, 8, 12)
    # x / 127.5 - 1 and 2 (x / 255) - 1 may differ in the last fp32 bit, so in one fp16 rounding here and there.
    assert torch.allclose(mean.float(), posterior.mean[0], rtol=2e-3, atol=1e-4)
    assert torch.allclose(std.float(), posterior.std[0], rtol=2e-3, atol=1e-4)
