"""What is hashed is what is loaded: which files of a folder count, and files that are replaced in between."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sushi_research.errors import UserError
from sushi_research.fingerprints import HashCache
from sushi_research.models import loading

CPU = torch.device("cpu")


@pytest.fixture
def folder(bases, tmp_path):
    return shutil.copytree(bases["sd15"], tmp_path / "base")


def weights(component):
    (path,) = component.glob("*.safetensors")
    return path


def shard(component, change=0.0):
    """Two shards and their index, with the weights of the single file plus `change`."""
    path = weights(component)
    tensors = {key: tensor + change for key, tensor in load_file(path).items()}
    halves, names = sorted(tensors)[::2], [f"{path.stem}-0000{number}-of-00002.safetensors" for number in (1, 2)]
    weight_map = {key: names[key not in halves] for key in tensors}
    for name in names:
        held = {key: tensors[key].contiguous() for key in tensors if weight_map[key] == name}
        save_file(held, component / name, {"format": "pt"})
    (component / f"{path.stem}.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    )
    return path


def first(model):
    return next(model.parameters()).clone()


@pytest.mark.parametrize("name", ["unet", "text_encoder"])  # diffusers takes the index, transformers the single file
def test_a_single_file_next_to_an_index_of_other_shards_is_refused(folder, name):
    base = loading.resolve_base(str(folder))
    before = first(base.parts[name].load(torch.float32, CPU))
    single = shard(folder / name, change=1.0)
    for use in (lambda: base.hash(name, HashCache(folder / "none")), lambda: base.parts[name].load(torch.float32, CPU)):
        with pytest.raises(UserError, match=f"has both {single.name} and {single.name}.index.json"):
            use()
    single.unlink()
    assert torch.equal(first(base.parts[name].load(torch.float32, CPU)), before + 1.0)


def test_shards_that_the_index_does_not_name_are_neither_hashed_nor_loaded(folder):
    shard(folder / "vae").unlink()
    base, hash_cache = loading.resolve_base(str(folder)), HashCache(folder / "none")
    before, loaded = base.hash("vae", hash_cache), first(base.parts["vae"].load(torch.float32, CPU))
    path = folder / "vae" / "diffusion_pytorch_model-00001-of-00003.safetensors"
    save_file({"encoder.conv_in.weight": torch.zeros(1)}, path)
    assert base.hash("vae", hash_cache) == before
    assert torch.equal(first(base.parts["vae"].load(torch.float32, CPU)), loaded)
    (folder / "vae" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="shards without their index"):
        base.hash("vae", hash_cache)


def test_shards_of_fp16_weights_are_recognised(folder):
    shard(folder / "vae").unlink()
    for path in list((folder / "vae").glob("diffusion_pytorch_model*")):
        name = path.name.replace("model-0000", "model.fp16-0000").replace("index", "index.fp16")
        path.write_bytes(path.read_bytes().replace(b"model-0000", b"model.fp16-0000"))
        path.rename(path.with_name(name))
    with pytest.raises(UserError, match="vae holds fp16 weights only: add --model.variant fp16"):
        loading.resolve_base(str(folder)).require_loadable()
    loading.resolve_base(str(folder), vae=str(folder / "vae")).require_loadable()


def test_a_config_or_an_adapter_that_would_change_the_weights_is_refused(folder):
    config = folder / "text_encoder" / "config.json"
    usual = config.read_text()
    for key in ("transformers_weights", "configuration_files", "quantization_config"):
        config.write_text(json.dumps(json.loads(usual) | {key: "other.safetensors"}))
        with pytest.raises(UserError, match=f"config.json has the setting {key}"):
            loading.resolve_base(str(folder)).hash("text_encoder", HashCache(folder / "none"))
    config.write_text(usual)
    (folder / "text_encoder" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"has an adapter next to its weights \(adapter_config.json\)"):
        loading.load_text_encoder(loading.resolve_base(str(folder)), "text_encoder", CPU)


def test_a_tokenizer_reads_only_the_files_that_are_hashed(folder):
    tokenizer = folder / "tokenizer"
    base = loading.resolve_base(str(folder))
    before = base.hash("text_encoder", HashCache(folder / "none"))
    tokens = base.load_tokenizer("text_encoder")("a red star")["input_ids"]
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    a, b = list(vocabulary)[300:302]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (tokenizer / "tokenizer.4.0.0.json").write_text(json.dumps(content))
    (tokenizer / "tokenizer.model").write_text("{}")
    assert base.hash("text_encoder", HashCache(folder / "none")) == before
    assert base.load_tokenizer("text_encoder")("a red star")["input_ids"] == tokens


def replace(path, change):
    """Puts another file of the same size and date in the place of `path`."""
    date, other = path.stat().st_mtime_ns, path.with_suffix(".other")
    save_file({key: tensor + change for key, tensor in load_file(path).items()}, other, {"format": "pt"})
    os.replace(other, path)
    os.utime(path, ns=(date, date))


def test_files_that_were_replaced_after_they_were_hashed_are_not_used(folder):
    base, hash_cache = loading.resolve_base(str(folder)), HashCache(folder / "none")
    loads = {
        "unet": lambda: loading.load_unet(base, torch.float32, CPU),
        "vae": lambda: loading.load_vae(base, torch.float32, CPU),
        "text_encoder": lambda: loading.load_text_encoder(base, "text_encoder", CPU)[1],
    }
    for name, load in loads.items():
        base.hash(name, hash_cache)
        before = first(load())
        os.utime(weights(folder / name))  # touched: hashed and loaded once more
        assert torch.equal(first(load()), before)
        replace(weights(folder / name), 1.0)
        with pytest.raises(UserError, match=f"{name} were replaced after this command had hashed them"):
            load()
        base.hash(name, hash_cache)
        assert torch.equal(first(load()), before + 1.0)


def test_a_file_that_is_replaced_while_it_is_loaded_is_not_used(folder, monkeypatch):
    base = loading.resolve_base(str(folder))
    base.hash("vae", HashCache(folder / "none"))
    part = type(base.parts["vae"])
    load = part.load

    def replaced_before(self, *arguments):
        monkeypatch.setattr(part, "load", load)
        replace(weights(folder / "vae"), 1.0)
        return load(self, *arguments)

    monkeypatch.setattr(part, "load", replaced_before)
    with pytest.raises(UserError, match="vae were replaced"):
        loading.load_vae(base, torch.float32, CPU)


def test_a_loaded_model_stays_when_its_file_is_overwritten(folder):
    model = loading.load_unet(loading.resolve_base(str(folder)), torch.float32, CPU)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with open(weights(folder / "unet"), "r+b") as file:
        file.seek(-(2**20), os.SEEK_END)
        file.write(bytes(2**20))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
