"""A file that is no usable adapter: evaluate.py, sample.py and inspect_model.py refuse it in one and the same sentence."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from script_runs import script

from sushi_research.config.other_scripts import SamplingConfig
from sushi_research.config.process import run_main
from sushi_research.errors import UserError
from sushi_research.evaluation import adapter_files
from testing.tiny_base import save_tiny_base

PAIR = {"lora_unet_x.lora_down.weight": torch.ones(2, 4), "lora_unet_x.lora_up.weight": torch.ones(4, 2)}
SOUND = save(PAIR)
# File name -> (its content, what is said of it).
FILES = {
    "nan.safetensors": (
        save(PAIR | {"lora_unet_x.alpha": torch.tensor(float("nan"))}),
        "holds NaN in lora_unet_x.alpha",
    ),
    "oft.safetensors": (save({"lora_unet_x.oft_blocks": torch.ones(2, 2)}), "holds an OFT"),
    "embedding.safetensors": (save({"emb_params": torch.ones(2, 2)}), "holds a textual inversion embedding"),
    "up.safetensors": (save(dict(list(PAIR.items())[1:])), "without the down matrix"),
    "flux.safetensors": (
        save({key.replace("_x.", "_single_blocks_0_linear1."): tensor for key, tensor in PAIR.items()}),
        "which is no module of the UNet of SD1.5 or of SDXL",
    ),
    "empty.safetensors": (b"", "is empty (0 bytes)"),
    "cut.safetensors": (SOUND[:-5], "is cut short (5 bytes are missing)"),
    "header.safetensors": (SOUND[:50], "is cut short (its header has"),
    "page.safetensors": (b"<!DOCTYPE html><html>", "is a web page (HTML)"),
    "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a git-lfs pointer"),
    "pickle.pt": (b"x", "is a pickle (.pt)"),
}


@pytest.fixture
def refusal(tmp_path, capsys):
    """The sentence in which a script's main function refuses a config, without its file's path."""

    def run(main, config, path: Path) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_main(main, config)
        printed = capsys.readouterr().err
        assert ended.value.code == 2 and printed.startswith(f"error: {path} ") and printed.count("\n") == 1, printed
        return printed.removeprefix(f"error: {path} ").strip()

    return run


def test_one_sentence_from_all(refusal, tmp_path):
    evaluate, sample, inspect = (script(name) for name in ("evaluate", "sample", "inspect_model"))
    for name, (content, said) in FILES.items():
        path = tmp_path / name
        path.write_bytes(content)
        words = ["sd15", "--config", "configs/demo_sd15.yaml", f"--adapters={json.dumps([str(path)])}", "--dry-run"]
        sampling = {
            "base": "nowhere",
            "prompts": ["a cat"],
            "adapters": [str(path)],
            "output": str(tmp_path / "grid.png"),
        }
        sentences = [
            refusal(evaluate.main, evaluate.read([*words, f"--output={tmp_path}"]), path),
            refusal(sample.main, SamplingConfig(**sampling), path),
            refusal(inspect.main, argparse.Namespace(model=str(path)), path),
        ]
        assert said in sentences[0] and len(set(sentences)) == 1, sentences


def test_a_file_that_is_not_there_and_a_folder(refusal, tmp_path):
    sample = script("sample")
    settings = {"base": "nowhere", "prompts": ["a cat"], "output": str(tmp_path / "grid.png")}
    for path, said in ((tmp_path / "nowhere.pt", "does not exist"), (tmp_path, "is a folder")):
        assert said in refusal(sample.main, SamplingConfig(**settings, adapters=[str(path)]), path)


def test_a_sound_adapter_is_described(tmp_path, capsys):
    path = tmp_path / "sound.safetensors"
    save_file(PAIR, path)
    assert script("inspect_model").main(argparse.Namespace(model=str(path))) == 0
    assert "a LoRA (adapter) file" in capsys.readouterr().out


def test_a_base_given_as_an_adapter(refusal, tmp_path):
    unet = save_tiny_base(tmp_path / "base", "sd15") / "unet/diffusion_pytorch_model.safetensors"
    settings = {"base": "nowhere", "prompts": ["a cat"], "output": str(tmp_path / "grid.png")}
    said = refusal(script("sample").main, SamplingConfig(**settings, adapters=[str(unet)]), unet)
    assert said == "is a UNet alone, not a LoRA: give a LoRA file."


def test_losses_that_are_not_finite_are_not_written():
    finite, infinite = np.zeros((2, 4)), np.full((2, 4), np.inf)
    nothing = np.full((2, 4), np.nan)
    adapter_files.require_finite("mine", 1.0, [finite])
    for measured in ([infinite], [finite, nothing]):
        with pytest.raises(
            UserError, match="^mine gives values that are not finite .* at the LoRA scale 2, and the base"
        ):
            adapter_files.require_finite("mine", 2.0, measured)
        with pytest.raises(UserError, match="^the base gives values"):
            adapter_files.require_finite("base", 0.0, measured)
