"""Every architecture of the table offers the same names, and they work on its tiny base.

A model module is found by its line in `sushi_research/models/__init__.py`, before it has a script or a recipe.
"""

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from script_runs import load_script

from sushi_research import models
from sushi_research.adapters import kohya_format, lora, metadata, verification
from sushi_research.adapters.settings import AdapterSettings
from sushi_research.caches import encoding
from sushi_research.config import TrainingConfig
from sushi_research.models import formats, loading
from sushi_research.models.prediction import Prediction

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(params=models.ARCHITECTURES)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return models.load(name)


@pytest.fixture
def base(name, bases):
    return loading.resolve_base(str(bases[name]))


def test_the_table_imports_nothing_heavy():
    code = (
        "import json, sys\n"
        "from sushi_research import models\n"
        "from sushi_research.models import detect, formats\n"
        "[each.config_class() and each.formats() for each in models.ARCHITECTURES.values()]\n"
        "print(json.dumps([name for name in ('torch', 'numpy', 'diffusers', 'transformers') if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(done.stdout) == []


def test_names_and_signatures(name, model):
    assert model.NAME == name
    assert hasattr(importlib.import_module("diffusers"), model.PIPELINE)
    assert list(inspect.signature(model.load_text).parameters) == ["base", "device", "dtype"]
    assert list(inspect.signature(model.pipeline_text).parameters) == ["base", "text"]
    predict = list(inspect.signature(model.predict).parameters)
    assert predict == ["unet", "noisy", "timesteps", "text", "time_ids", "dtype"]
    several = (model.encode_captions, ("chunks", "batch"))
    for encode, others in ((model.encode_caption, ("chunks",)), several, (model.encode_prompt, ())):
        assert tuple(inspect.signature(encode).parameters)[2:] == (*others, *model.TEXT_SETTINGS)
    assert list(inspect.signature(model.token_ids).parameters) == ["text", "caption", "chunks"]
    assert tuple(inspect.signature(model.encode_ids).parameters) == ("text", "ids", "layout", *model.TEXT_SETTINGS)
    assert tuple(inspect.signature(model.idle_layers).parameters) == model.TEXT_SETTINGS
    assert model.idle_layers().keys() == set(model.TEXT_ENCODERS)


def test_the_config_class_has_the_settings_of_the_text(name, model):
    config = models.ARCHITECTURES[name].config_class()
    assert issubclass(config, TrainingConfig)
    assert set(model.TEXT_SETTINGS) <= set(config.model_fields["model"].annotation.model_fields)
    minimal = config(model={"base": "b"}, data={"path": "p"}, train={"steps": 1})
    assert models.name_of(minimal) == name


def test_the_formats_agree_with_the_model_module(name, model):
    own = models.ARCHITECTURES[name].formats()
    assert own.TEXT_ENCODERS == model.TEXT_ENCODERS
    assert set(own.SINGLE_FILE) == set(own.PUBLISHED["pad_tokens"]) | {"unet", "vae"}
    assert set(own.PUBLISHED["pad_tokens"]) == set(own.TEXT_ENCODERS) <= set(own.PUBLISHED)
    assert own.PUBLISHED["vae"]["scaling_factor"] == model.SCALING_FACTOR
    assert own.PUBLISHED["scheduler"].items() >= {"beta_schedule": "scaled_linear", "num_train_timesteps": 1000}.items()
    assert set(own.BASE_VERSION) == set(metadata.PREDICTION_TYPES)


def test_the_tiny_base_is_recognised_and_no_other_takes_it(name, base):
    assert base.architecture == name
    configs = {part: base.config(part) for part in base.parts}
    found = [
        each for each, row in models.ARCHITECTURES.items() if row.formats().of_configs(configs["unet"], configs) is True
    ]
    assert found == [name]


@pytest.mark.parametrize("context", [32, 768, 1024, 2048])
@pytest.mark.parametrize("added", [None, 80, 2560, 2816])
@pytest.mark.parametrize("linear", [False, True])
def test_no_two_architectures_take_one_file(context, added, linear):
    for open_clip in (False, True):
        unet = formats.FileUNet(context, linear, added, open_clip)
        assert sum(each.formats().of_file(unet) is True for each in models.ARCHITECTURES.values()) <= 1


def test_the_whole_forward(model, base):
    text, cut = model.encode_caption(model.load_text(base, CPU), "a cat")
    assert set(text) == set(model.TEXT_TENSORS) and cut == 0
    assert {name: tuple(tensor.shape) for name, tensor in text.items()} == model.text_shapes(base)
    unet = loading.load_unet(base, torch.float32, CPU)
    batch = {name: tensor[None].repeat(3, *[1] * tensor.ndim) for name, tensor in text.items()}
    noisy, ids = torch.randn(3, 4, 8, 12), torch.tensor([[64.0, 96, 0, 0, 64, 96]] * 3)
    sizes = "time_ids" in inspect.signature(model.predict).parameters
    out = model.predict(unet, noisy, torch.tensor([0, 500, 999]), batch, *[ids] * sizes, dtype=torch.float32)
    assert out.shape == noisy.shape and out.dtype == torch.float32
    one = {name: tensor[1:2] for name, tensor in batch.items()}
    alone = model.predict(unet, noisy[1:2], torch.tensor([500]), one, *[ids[1:2]] * sizes, dtype=torch.float32)
    # Another batch size may round otherwise in the last bits of a UNet of 60 layers.
    assert torch.allclose(out[1], alone[0], atol=1e-4)


def test_a_caption_is_encoded_as_the_pipeline_does(model, base):
    text = model.load_text(base, CPU)
    parts = {"unet": None, "vae": None, "scheduler": None} | model.pipeline_text(base, text) | model.PIPELINE_WITHOUT
    pipeline = getattr(importlib.import_module("diffusers"), model.PIPELINE)(**parts)
    encoded = pipeline.encode_prompt("a cat", device=CPU, num_images_per_prompt=1, do_classifier_free_guidance=False)
    ours, _ = model.encode_caption(text, "a cat")
    # encode_prompt gives (hidden, negative) or (hidden, negative, pooled, negative pooled).
    for name, theirs in zip(("hidden", "pooled"), encoded[::2], strict=False):
        assert torch.equal(ours[name], theirs[0])


def test_the_unet_is_frozen_and_of_the_asked_dtype(base):
    unet = loading.load_unet(base, torch.bfloat16, CPU)
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in unet.parameters())


def test_encoding_an_image_equals_diffusers(model, base):
    import numpy as np
    from diffusers.image_processor import VaeImageProcessor

    vae = loading.load_vae(base, torch.float32, CPU)
    assert vae.config.scaling_factor == model.SCALING_FACTOR
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    picture = VaeImageProcessor().preprocess(pixels[None].astype(np.float32) / 255.0)
    posterior = vae.encode(picture).latent_dist
    mean, std = (each[0] for each in encoding.encode_images(vae, pixels[None]))
    assert mean.dtype == torch.float16 and mean.shape == (4, 8, 12)
    # x / 127.5 - 1 and 2 (x / 255) - 1 may differ in the last fp32 bit, so in one fp16 rounding here and there.
    assert torch.allclose(mean.float(), posterior.mean[0], rtol=2e-3, atol=1e-4)
    assert torch.allclose(std.float(), posterior.std[0], rtol=2e-3, atol=1e-4)


def test_an_adapter_file_loads_in_diffusers_as_it_was_trained(name, base, tmp_path):
    unet = loading.load_unet(base, torch.float32, CPU)
    lora.attach(unet, AdapterSettings(targets="kohya_conv", rank=2, alpha=1.0, dropout=0.0, init="default", seed=0))
    state = {key: torch.randn_like(value) for key, value in lora.adapter_parameters({"unet": unet}).items()}
    facts = {"architecture": name, "state": state, "dtype": torch.float16}
    kohya_format.save_adapter(tmp_path / "adapter.safetensors", {"unet": unet}, **facts, metadata={})
    verification.verify_saved(tmp_path / "adapter.safetensors", {"unet": unet}, **facts)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_adapter_file_names_its_base(name, prediction):
    config = models.ARCHITECTURES[name].config_class()(
        model={"base": "b"}, data={"path": "d"}, lora={"targets": ["to_q"]}, train={"steps": 1}
    )
    facts = metadata.Facts(name, "n", "b", "h", "h", "h", 1, 1, 1, Prediction(prediction), (0.0, 1.0))
    entries = metadata.adapter_metadata(config, facts)
    assert entries["ss_base_model_version"] and entries["modelspec.architecture"].endswith("/lora")


def test_its_script_trains(name, bases, photos, tmp_path, monkeypatch):
    """Two steps on the tiny base, from the images to an adapter file that fits it."""
    row = models.ARCHITECTURES[name]
    if not (ROOT / row.script).is_file() and not (ROOT / f"configs/{name}_lora.yaml").is_file():
        pytest.skip(f"{row.script} is still to be written")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    config = row.config_class()(
        model={"base": str(bases[name])},
        data={"path": str(photos), "resolution": 64, "bucket_step": 32},
        cache={"folder": str(tmp_path / "cache")},
        lora={"rank": 2, "alpha": 2.0},
        train={"steps": 2, "batch_size": 1},
        optimizer={"name": "adamw"},
        sample={"enabled": False},
        tracking={"wandb": "off"},
        run={"folder": str(tmp_path), "name": "run"},
    )
    assert load_script(name).main(config) == 0
    assert (tmp_path / "run" / "run.safetensors").is_file()
