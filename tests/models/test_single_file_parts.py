"""A base in one .safetensors file: the hashes of its components, and a VAE and text encoders from elsewhere."""

import json
import os
import shutil

import pytest
import torch
from base_files import MODELS, OPEN, TEXT, UNET, VAE, assert_same, hole, load, refusal, resolved
from safetensors.torch import load_file

from sushi_research import fingerprints
from sushi_research.fingerprints import HashCache
from sushi_research.models import loading
from sushi_research.models.single_file import FilePart

pytestmark = pytest.mark.slow

# --- Hashes ---


@pytest.fixture
def hashes(tmp_path):
    hash_cache = HashCache(tmp_path / "files.json")
    return lambda base, hash_cache=hash_cache: {name: base.hash(name, hash_cache) for name in base.parts}


def test_a_hash_is_of_a_component_s_tensors_wherever_they_are(tensors_of, folder_of, written, hashes):
    tensors, folder = tensors_of("sdxl"), folder_of("sdxl")
    found = hashes(resolved(written(tensors, "first.safetensors"), folder))
    assert len(set(found.values())) == len(found)
    moved = {name.removeprefix(UNET): tensor for name, tensor in reversed(tensors.items())} | {"betas": torch.zeros(5)}
    assert hashes(resolved(written(moved, metadata={"modelspec.title": "moved"}), folder)) == found
    alone = written({name: value for name, value in tensors.items() if VAE not in name}, "alone.safetensors")
    vae = written({name.removeprefix(VAE): value for name, value in tensors.items() if VAE in name}, "vae.safetensors")
    assert hashes(resolved(alone, folder, vae=str(vae))) == found


def test_a_hash_changes_with_its_component(tensors_of, folder_of, tmp_path, written, hashes):
    tensors, folder = tensors_of("sdxl"), folder_of("sdxl")
    before = hashes(resolved(written(tensors, "before.safetensors"), folder))
    unet = [f"{UNET}input_blocks.1.0.{end}" for end in ("in_layers.0.bias", "in_layers.0.weight")]
    changes = {
        "unet": dict(zip(unet, (tensors[name] for name in reversed(unet)), strict=True)),
        "vae": {f"{VAE}quant_conv.bias": tensors[f"{VAE}quant_conv.bias"] + 1},
        "text_encoder": {(name := f"{TEXT['sdxl']}final_layer_norm.bias"): tensors[name].float()},
        "text_encoder_2": {(name := f"{OPEN}transformer.resblocks.0.attn.in_proj_bias"): tensors.get(name, 0) + 1},
    }
    for changed in before:
        after = hashes(resolved(written(tensors | changes[changed]), folder))
        assert {name for name in before if after[name] != before[name]} == {changed}
        (tmp_path / "base.safetensors").unlink()
    vocabulary = tmp_path / "vocabulary"
    shutil.copytree(folder / "tokenizer", vocabulary)
    same = hashes(resolved(tmp_path / "before.safetensors", vocabulary))
    (vocabulary / "merges.txt").write_text("#version: 0.2\na b\n")
    after = hashes(resolved(tmp_path / "before.safetensors", vocabulary))
    assert {name for name in before if after[name] != same[name]} == set(MODELS["sdxl"].TEXT_ENCODERS)


def test_a_file_that_is_in_the_hash_cache_is_read_again_only_if_it_was_changed(
    tensors_of, folder_of, tmp_path, written, hashes, monkeypatch
):
    file, folder = written(tensors_of("sd15")), folder_of("sd15")
    monkeypatch.setattr(fingerprints, "RACY_NS", 0)
    os.utime(file, (1, 1))
    before = hashes(resolved(file, folder))
    digests, digest = [], FilePart._digest
    monkeypatch.setattr(FilePart, "_digest", lambda part: digests.append(part.name) or digest(part))
    assert hashes(resolved(file, folder)) == before and digests == []
    with open(file, "r+b") as stream:
        stream.seek(-1000, os.SEEK_END)
        stream.write(bytes(1000))
    os.utime(file, (1, 1))  # size and date are as they were
    assert hashes(resolved(file, folder)) != before and len(digests) == len(before)


# --- A VAE and text encoders from elsewhere ---


def assert_from(base, folder, other, names):
    """That the components `names` are those of the folder `other`, and the rest those of `folder`."""
    own, others = (loading.resolve_base(str(each)) for each in (folder, other))
    for name in own.parts:
        assert_same(load(base, name), load(others if name in names else own, name))


@pytest.mark.parametrize(
    ("architecture", "prefix"), [("sd15", ""), ("sdxl", VAE), ("sd15", None)], ids=["bare", "prefixed", "whole file"]
)
def test_a_vae_from_another_file(prefix, architecture, tensors_of, folder_of, written):
    folder, other = folder_of(architecture), folder_of(architecture, seed=1)
    tensors = tensors_of(architecture, seed=1)
    if prefix is not None:
        companions = {f"{VAE}loss.logvar": torch.zeros(()), f"{VAE}model_ema.decay": torch.ones(())}
        vae = {name: value for name, value in tensors.items() if VAE in name} | companions
        tensors = {name.replace(VAE, prefix): value for name, value in vae.items()}
    source, file = written(tensors, "other.safetensors"), written(tensors_of(architecture))
    base = resolved(file, folder, vae=str(source))
    assert base.vae_source == str(source)
    assert_from(base, folder, other, ["vae"])
    # A base in diffusers format takes it as well.
    assert_same(load(loading.resolve_base(str(folder), vae=str(source)), "vae"), load(base, "vae"))


def test_an_unknown_key_of_another_vae_is_named(tensors_of, folder_of, written):
    vae = {name: value for name, value in tensors_of("sd15").items() if VAE in name}
    other = written(vae | {"elsewhere": hole(1), f"{VAE}extra": hole(1)}, "other.safetensors")
    message = refusal(loading.resolve_base, str(folder_of("sd15")), vae=str(other))
    assert f"'{VAE}extra', which" in message and str(other) in message


def test_a_vae_by_diffusers_names_is_refused_with_a_way_out(folder_of, edited, tensors_of):
    file = folder_of("sd15") / "vae" / "diffusion_pytorch_model.safetensors"
    message = refusal(loading.resolve_base, str(folder_of("sd15")), vae=str(file))
    assert str(file) in message and "the folder of a VAE in diffusers format" in message
    gone = {name: None for name in tensors_of("sd15") if VAE in name}
    assert "VAE" in refusal(edited, "sd15", gone | {VAE + name: value for name, value in load_file(file).items()})


@pytest.mark.parametrize(("architecture", "kind"), [("sdxl", "file"), ("sd15", "folder")])
def test_text_encoders_from_elsewhere(kind, architecture, tensors_of, folder_of, written):
    folder, file = folder_of(architecture), written(tensors_of(architecture))
    other = folder_of(architecture, seed=1)
    source = other if kind == "folder" else written(tensors_of(architecture, seed=1), "other.safetensors")
    options = {} if kind == "folder" else {"tokenizers": str(folder)}
    base = loading.resolve_base(str(file), text_encoders=str(source), **options)
    assert {each.folder.parent for each in base.tokenizers.values()} == {other if kind == "folder" else folder}
    assert_from(base, folder, other, MODELS[architecture].TEXT_ENCODERS)


def test_what_is_not_in_the_file_names_the_option_that_gives_it(architecture, tensors_of, edited, written):
    def without(*prefixes):
        return {name: None for name in tensors_of(architecture) if name.startswith(prefixes)}

    assert "--model.vae" in refusal(edited, architecture, without(VAE))
    text = refusal(edited, architecture, without(TEXT[architecture]))
    assert "without its text encoder" in text and "--model.text_encoders" in text
    if architecture == "sdxl":
        assert "without its second text encoder: give --model.text_encoders" in refusal(edited, "sdxl", without(OPEN))
    source = str(written({"betas": torch.zeros(3)}, "nothing.safetensors"))
    for option in ("vae", "text_encoders"):
        assert f"model.{option}: {source}" in refusal(edited, architecture, {}, **{option: source})


def test_a_text_encoder_s_config_without_the_width_of_its_pooled_output(edited, folder_of, tmp_path):
    # transformers takes 512 then, which is not this UNet's.
    folder = shutil.copytree(folder_of("sdxl"), tmp_path / "sdxl", ignore=shutil.ignore_patterns("*.safetensors"))
    path = folder / "text_encoder_2" / "config.json"
    config = json.loads(path.read_text())
    del config["projection_dim"]
    path.write_text(json.dumps(config))
    assert "do not fit together" in refusal(edited, "sdxl", {}, text_encoders=str(folder))
