"""scripts/sample.py: every picture is the one that its row and column say, and nothing is drawn from half an adapter."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from script_runs import Trainer, script

from sushi_research.config.other_scripts import SamplingConfig
from sushi_research.config.process import run_main

# One worker trains the adapters, for all the tests that look at them.
pytestmark = pytest.mark.xdist_group("sample_script")
ONE = pytest.mark.parametrize("architecture", ["sd15"])
SCRIPT = script("sample")


@pytest.fixture(scope="session")
def adapters(tmp_path_factory, bases, photos, caches) -> Callable[[str], Path]:
    """The adapter file of a short training at a high learning rate, by architecture; each is trained once, with pictures."""
    folder, made = tmp_path_factory.mktemp("adapters"), {}

    def adapter(architecture: str) -> Path:
        if architecture not in made:
            trainer = Trainer(architecture, bases[architecture], photos, folder / architecture, caches)
            sample = {"enabled": True, "prompts": ["a cat"], "steps": 2, "width": 64, "height": 48}
            changes = {"train.steps": 2, "optimizer.lr": 0.1, "lora.targets": "attention"} | {
                f"sample.{key}": sample[key] for key in sample
            }
            assert trainer.train("mine", changes) == 0
            made[architecture] = folder / architecture / "mine" / "mine.safetensors"
        return made[architecture]

    return adapter


@pytest.fixture
def generate(architecture, bases, tmp_path) -> Callable[..., dict[str, np.ndarray]]:
    """Draws a grid of small pictures in two steps; gives the single pictures by name."""

    def run(output: str = "grid.png", **changes: Any) -> dict[str, np.ndarray]:
        settings = {"base": str(bases[architecture]), "prompts": ["a cat"], "steps": 2, "width": 64, "height": 48}
        assert SCRIPT.main(SamplingConfig(**settings | changes, output=str(tmp_path / output))) == 0
        singles = (tmp_path / output).with_suffix("")
        return {path.name: np.asarray(Image.open(path)) for path in sorted(singles.iterdir())}

    return run


@pytest.fixture
def refusal(architecture, bases, tmp_path, capsys) -> Callable[..., str]:
    """The sentence in which the script refuses a config."""

    def run(**changes: Any) -> str:
        settings = {"base": str(bases[architecture]), "prompts": ["a cat"], "output": str(tmp_path / "grid.png")}
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_main(SCRIPT.main, SamplingConfig(**settings | changes))
        assert ended.value.code == 2
        printed = capsys.readouterr().err.rpartition("\r")[2]  # after the bars of loading
        assert printed.startswith("error: ") and printed.endswith("\n") and printed.count("\n") == 1, printed
        return printed.strip()

    return run


@pytest.mark.slow
def test_rows_and_columns(generate, adapters, architecture, tmp_path, capsys):
    adapter = adapters(architecture)
    settings = {"prompts": ["a cat", "a dog"], "seeds": [0, 1]}
    pictures = generate(adapters=[str(adapter)], lora_scales=[0.5, 1.0], **settings)
    # Rows are prompts, each with its seeds; columns the base and the LoRA scales.
    assert list(pictures) == [f"{row:02d}-{column:02d}.png" for row in range(4) for column in range(3)]
    assert all(picture.shape == (48, 64, 3) for picture in pictures.values())
    assert len({picture.tobytes() for picture in pictures.values()}) == 12, "no two are alike"
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 4 * 3 * 64 and grid.height > 4 * 3 * 48, "small pictures are shown larger"
    assert f"written: {tmp_path / 'grid.png'}" in capsys.readouterr().out

    alone = generate("alone.png", **settings)
    assert list(alone) == [f"{row:02d}-00.png" for row in range(4)]
    for name, picture in alone.items():
        assert np.array_equal(pictures[name], picture), "the base is the base, with adapters loaded or not"

    one = generate("one.png", adapters=[str(adapter)], lora_scales=[1.0], prompts=["a dog"], seeds=[1])
    assert np.array_equal(pictures["03-02.png"], one["00-01.png"]), "each LoRA scale alone"


@ONE
@pytest.mark.slow
def test_several_adapters_are_shown_each_alone(generate, adapters, tmp_path, monkeypatch):
    first = adapters("sd15")
    second = tmp_path / "half.safetensors"
    save_file({key: tensor / 2 if "lora_up" in key else tensor for key, tensor in load_file(first).items()}, second)
    grids = []
    monkeypatch.setattr(SCRIPT.plots, "grid", lambda *arguments: grids.append(arguments) or Image.new("RGB", (1, 1)))
    both = generate(adapters=[str(first), str(second)], lora_scales=[1.0])
    assert grids[0][2] == ["base", "mine 1", "half 1"], "a run's adapter is called by its run"
    one = generate("one.png", adapters=[str(second)], lora_scales=[1.0])
    assert np.array_equal(both["00-02.png"], one["00-01.png"])
    # Half of what B adds is the adapter at half its LoRA scale, exactly: powers of two.
    half = generate("strength.png", adapters=[str(first)], lora_scales=[0.5])
    assert np.array_equal(both["00-02.png"], half["00-01.png"])
    assert not np.array_equal(both["00-01.png"], both["00-02.png"])


@pytest.mark.slow
def test_it_samples_as_the_training_does(generate, adapters, architecture):
    """The pictures of a run, before and after it, are what the script draws: the same prompt, seed and scheduler.

    Within a few grey levels, because the training's text comes from an fp16 cache and the file holds the adapter in fp16;
    what the adapter changes is ten times as much and more.
    """
    adapter = adapters(architecture)
    generated = generate(adapters=[str(adapter)], lora_scales=[1.0])
    pictures = []
    for column, step in enumerate((0, 2)):
        with Image.open(adapter.parent / f"samples/step-{step:08d}/00-seed0.png") as picture:
            pictures.append(np.asarray(picture).astype(int))
        distance = np.abs(pictures[column] - generated[f"00-{column:02d}.png"]).mean()
        assert distance < 0.1 * np.abs(generated["00-00.png"].astype(int) - generated["00-01.png"]).mean()


@pytest.mark.slow
@ONE
def test_an_adapter_of_the_other_architecture(refusal, adapters, architecture):
    other = adapters({"sd15": "sdxl", "sdxl": "sd15"}[architecture])
    sentence = refusal(adapters=[str(other)])
    label = {"sd15": "SD1.5", "sdxl": "SDXL"}[architecture]
    words = rf": \d+ of 136 modules not found in this {label} base|matrices of \S+ are .* this base needs"
    assert sentence.startswith(f"error: {other}") and re.search(words, sentence)
    assert len(sentence) < 500


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sd15"])
def test_images_that_are_not_finite_are_not_saved(refusal, adapters, architecture, tmp_path):
    """Finite matrices can give predictions beyond the range of fp32; the VAE would turn them into black images."""
    huge = {
        key: tensor.float() * 1e30 if "lora_" in key.split(".")[-2] else tensor
        for key, tensor in load_file(adapters("sd15")).items()
    }
    save_file(huge, tmp_path / "huge.safetensors")
    assert refusal(adapters=[str(tmp_path / "huge.safetensors")], steps=1).startswith(
        "error: huge gives values that are not finite"
    )
    assert not (tmp_path / "grid.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sdxl"])
def test_two_namings_in_one_file(generate, adapters, tmp_path):
    """Of a file with SDXL's names of Stability and of diffusers, diffusers takes some and leaves the others, without a word."""
    tensors = load_file(adapters("sdxl"))
    sgm, own = "lora_unet_input_blocks_4_1_", "lora_unet_down_blocks_1_attentions_0_"
    mixed = {key.replace(sgm, own): tensor for key, tensor in tensors.items()}
    assert mixed.keys() != tensors.keys()
    save_file(mixed, tmp_path / "mixed.safetensors")
    paths = [str(adapters("sdxl")), str(tmp_path / "mixed.safetensors")]
    generated = generate(adapters=paths, lora_scales=[1.0])
    assert np.array_equal(generated["00-01.png"], generated["00-02.png"])


@ONE
def test_a_place_that_cannot_be_written_is_reported_before_anything_is_generated(refusal, tmp_path, monkeypatch):
    monkeypatch.setattr(SCRIPT, "load_pipeline", lambda *_: pytest.fail("the base was loaded"))
    (tmp_path / "file").write_text("")
    assert "file/grid: Not a directory" in refusal(output=str(tmp_path / "file/grid.png"))
    assert "give a file that ends in .png, .jpg or .webp" in refusal(output=str(tmp_path / "grid"))


@ONE
def test_a_base_that_is_none_of_ours(refusal, bases, tmp_path):
    copy = shutil.copytree(bases["sd15"], tmp_path / "base")
    config = json.loads((copy / "unet/config.json").read_text())
    (copy / "unet/config.json").write_text(json.dumps(config | {"in_channels": 9}))
    assert "an inpainting model" in refusal(base=str(copy))
    assert "neither a folder nor a file on this machine, nor a hub id" in refusal(base=str(tmp_path / "nowhere"))


@ONE
@pytest.mark.slow
def test_clip_skip_is_that_of_the_training(generate, trainer):
    changes = {"enabled": True, "prompts": ["a cat"], "steps": 2, "width": 64, "height": 48, "every": None}
    changes = {f"sample.{key}": value for key, value in changes.items()} | {"train.steps": 1, "model.clip_skip": 2}
    assert trainer.train("skips", changes) == 0
    with Image.open(trainer.folder("skips") / "samples/step-00000000/00-seed0.png") as picture:
        trained = np.asarray(picture).astype(int)
    usual, skipping = generate("1.png")["00-00.png"], generate("2.png", clip_skip=2)["00-00.png"]
    # The text of the training comes from an fp16 cache.
    assert np.abs(trained - skipping).mean() < 0.1 * np.abs(trained - usual).mean()


@pytest.mark.parametrize("architecture", ["sdxl"])
def test_sdxl_has_no_clip_skip(refusal):
    assert "clip_skip is 2, and an SDXL base has none" in refusal(clip_skip=2)


@ONE
@pytest.mark.slow
def test_an_adapter_of_the_text_encoder_changes_the_text(generate, tmp_path):
    name = "lora_te_text_model_encoder_layers_1_mlp_fc1"
    down, up = torch.linspace(-1, 1, 64).view(2, 32), torch.ones(64, 2)
    pair = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    save_file(pair, tmp_path / "text.safetensors")
    generated = generate(adapters=[str(tmp_path / "text.safetensors")], lora_scales=[1.0])
    assert (generated["00-00.png"] != generated["00-01.png"]).any()


@ONE
@pytest.mark.slow
def test_a_run_folder_brings_its_base(generate, adapters, bases):
    """The grid of a run folder is that of its file on its base."""
    file = adapters("sd15")
    assert_same(generate("folder.png", base=None, adapters=[str(file.parent)]), generate(adapters=[str(file)]))


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys() and all(np.array_equal(found[name], expected[name]) for name in expected)


@ONE
def test_a_base_is_named_or_brought(refusal, tmp_path):
    (tmp_path / "a.safetensors").touch()
    sentence = refusal(base=None, adapters=[str(tmp_path / "a.safetensors")])
    assert "base is missing: give --base VALUE, or a run folder among the adapters" in sentence
