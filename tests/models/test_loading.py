"""Bases as the hub holds them: older names inside the files, sharded weights, both dtypes."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sushi_research.errors import UserError
from sushi_research.models import loading, sd15, sdxl

CPU = torch.device("cpu")


@pytest.fixture
def copy_base(bases, tmp_path):
    def copy(architecture):
        return shutil.copytree(bases[architecture], tmp_path / architecture)

    return copy


def test_published_text_encoders_load_like_ours(bases, copy_base):
    # The published files say `text_model.` throughout and carry position_ids; transformers 5.6 writes neither.
    folder = copy_base("sdxl")
    for name in sdxl.TEXT_ENCODERS:
        file = folder / name / "model.safetensors"
        tensors = {
            key if key.startswith(("text_model.", "text_projection")) else f"text_model.{key}": tensor.clone()
            for key, tensor in load_file(file).items()
        }
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        save_file(tensors, file, metadata={"format": "pt"})
    ours, _ = sdxl.encode_caption(sdxl.load_text(loading.resolve_base(str(bases["sdxl"])), CPU), "a cat")
    published, _ = sdxl.encode_caption(sdxl.load_text(loading.resolve_base(str(folder)), CPU), "a cat")
    assert all(torch.equal(published[name], ours[name]) for name in ours)


@pytest.mark.slow
def test_sharded_weights_load_and_a_missing_shard_is_named(bases, copy_base):
    folder = copy_base("sd15")
    whole = loading.load_unet(loading.resolve_base(str(folder)), torch.float32, CPU)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    whole.save_pretrained(folder / "unet", max_shard_size="1MB")
    shards = sorted((folder / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    sharded = loading.load_unet(loading.resolve_base(str(folder)), torch.float32, CPU)
    assert all(torch.equal(sharded.state_dict()[name], tensor) for name, tensor in whole.state_dict().items())
    shards[0].unlink()
    with pytest.raises(UserError, match="1 of the weight shards that its index names"):
        loading.load_unet(loading.resolve_base(str(folder)), torch.float32, CPU)


def test_a_changed_weight_or_tokenizer_changes_the_hash(bases, copy_base, tmp_path):
    from sushi_research.fingerprints import HashCache

    hash_cache = HashCache(tmp_path / "files.json")
    before = loading.resolve_base(str(bases["sd15"]))
    folder = copy_base("sd15")
    after = loading.resolve_base(str(folder))
    hashes = {name: after.hash(name, hash_cache) for name in ("unet", "vae", *sd15.TEXT_ENCODERS)}
    assert hashes == {name: before.hash(name, hash_cache) for name in hashes}
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.bias"][0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\na b\n")
    assert after.hash("unet", hash_cache) != hashes["unet"]
    assert after.hash("text_encoder", hash_cache) != hashes["text_encoder"]
    assert after.hash("vae", hash_cache) == hashes["vae"]


def test_pickled_weights_are_not_read(copy_base):
    folder = copy_base("sd15")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(UserError, match=r"pickled \.bin weights are not read"):
        loading.load_unet(loading.resolve_base(str(folder)), torch.float32, CPU)


def test_xformers_without_a_gpu_is_one_sentence(bases, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="xformers attention cannot be used here") as caught:
        loading.load_unet(loading.resolve_base(str(bases["sd15"])), torch.float32, CPU, "xformers")
    assert "\n" not in str(caught.value)


@pytest.fixture
def fetched(bases, monkeypatch, tmp_path):
    """Resolves a hub id by the hub library's own rule: a function that gives the files fetched, call by call, and the base.

    The repository has the files of the tiny SDXL base, and `more` names."""

    def resolve(*more, **arguments):
        import huggingface_hub
        from huggingface_hub.utils import filter_repo_objects

        root, calls = bases["sdxl"], []
        names = sorted([*(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()), *more])

        def snapshot(source, *, revision, allow_patterns, tqdm_class):
            calls.append((revision, list(filter_repo_objects(names, allow_patterns=allow_patterns))))
            for name in calls[-1][1]:
                copy = tmp_path / "0123abcd" / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes((root / name).read_bytes() if (root / name).is_file() else b"")
            return str(tmp_path / "0123abcd")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
        return calls, loading.resolve_base("someone/model", **arguments)

    return resolve


WEIGHT_FILES = [
    "text_encoder/model.safetensors",
    "text_encoder_2/model.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
]
OTHER_FILES = [
    "sd_xl_base_1.0.safetensors",
    "unet/diffusion_pytorch_model.bin",
    "text_encoder_2/model.onnx_data",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "text_encoder_2/model.fp16.safetensors",
]


def test_a_hub_base_costs_only_the_files_that_are_used(fetched):
    ((revision, configs), (commit, weights)), base = fetched(*OTHER_FILES)
    assert base.revision == commit == "0123abcd" and revision is None
    assert "model_index.json" in configs and "unet/config.json" in configs and "tokenizer_2/vocab.json" in configs
    assert not [name for name in configs if "safetensors" in name], "what is refused by its configs is not downloaded"
    assert weights == WEIGHT_FILES


def test_a_hub_base_in_half_precision(fetched):
    (_, (_, weights)), _ = fetched(*OTHER_FILES, variant="fp16")
    assert weights == ["text_encoder_2/model.fp16.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"]


def test_what_comes_from_elsewhere_is_not_fetched(fetched, bases):
    (_, (_, weights)), _ = fetched(vae=str(bases["sdxl"]), text_encoders=str(bases["sdxl"]))
    assert weights == ["unet/diffusion_pytorch_model.safetensors"]


def test_the_index_of_sharded_weights_is_fetched_with_them(fetched):
    sharded = [
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
    ]
    (_, (_, weights)), _ = fetched(*sharded)
    assert set(sharded) <= set(weights)


def test_whatever_the_hub_s_library_raises_is_one_sentence(monkeypatch):
    import huggingface_hub

    def broken(*arguments, **options):
        raise RuntimeError("the connection was reset\nwith details")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    with pytest.raises(UserError, match="RuntimeError: the connection was reset") as caught:
        loading.resolve_base("someone/model")
    assert "\n" not in str(caught.value)


def test_a_folder_has_no_revisions(bases):
    with pytest.raises(UserError, match="model.base: .* is on this machine, where there are no revisions"):
        loading.resolve_base(str(bases["sd15"]), revision="main")
    with pytest.raises(UserError, match="model.vae: .* is on this machine, where there are no revisions"):
        loading.resolve_base(str(bases["sd15"]), vae=str(bases["sd15"]), vae_revision="main")


def test_a_vae_override_may_be_in_half_precision_whatever_the_base_is(bases, copy_base):
    folder = copy_base("sdxl") / "vae"
    weights = folder / "diffusion_pytorch_model.safetensors"
    half = {name: tensor.half() for name, tensor in load_file(weights).items()}
    weights.unlink()
    save_file(half, folder / "diffusion_pytorch_model.fp16.safetensors", metadata={"format": "pt"})
    vae = loading.load_vae(loading.resolve_base(str(bases["sdxl"]), vae=str(folder)), torch.float32, CPU)
    assert all(torch.equal(tensor, half[name].float()) for name, tensor in vae.state_dict().items())
