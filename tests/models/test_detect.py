"""What a base is, from its configs alone; everything else refused in one sentence that names it."""

import json
import shutil

import pytest

from sushi_research.errors import UserError
from sushi_research.models import detect, diffusers_folder, loading


def edited(base, tmp_path, component, **changes):
    """A copy of a base with keys of one config changed (None removes)."""
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    name = "scheduler_config.json" if component == "scheduler" else "config.json"
    path = copy / component / name
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return copy


def identify(folder):
    return loading.resolve_base(str(folder)).architecture


def test_architecture_by_config(base_folder, architecture):
    assert identify(base_folder) == architecture
    detect.require(architecture, architecture, "it")


def test_the_other_scripts_architecture_names_the_script():
    with pytest.raises(UserError, match=r"is an SDXL base: train it with scripts/train_sdxl_lora\.py"):
        detect.require("sdxl", "sd15", "it")
    with pytest.raises(UserError, match=r"Stable Diffusion 1\.5 base: train it with scripts/train_sd15_lora\.py"):
        detect.require("sd15", "sdxl", "it")


@pytest.mark.parametrize(
    ("architecture_", "component", "changes", "named"),
    [
        ("sd15", "unet", {"in_channels": 9}, "an inpainting model"),
        ("sdxl", "unet", {"in_channels": 9}, "an inpainting model"),
        ("sd15", "unet", {"in_channels": 8}, "an instruct-pix2pix model"),
        ("sd15", "unet", {"in_channels": 7}, "7 input channels"),
        ("sd15", "unet", {"use_linear_projection": True}, "Stable Diffusion 2.x"),
        ("sd15", "unet", {"cross_attention_dim": 48}, "do not fit together"),
        ("sd15", "unet", {"class_embed_type": "timestep"}, "another conditioning"),
        ("sd15", "unet", {"addition_embed_type": "text_image"}, "another conditioning"),
        ("sdxl", "unet", {"projection_class_embeddings_input_dim": 32 + 5 * 8}, "the SDXL refiner"),
        ("sdxl", "unet", {"cross_attention_dim": 96}, "do not fit together"),
        ("sdxl", "vae", {"latents_mean": [0, 0, 0, 0]}, "Playground v2.5"),
        ("sdxl", "scheduler", {"prediction_type": "sample"}, "predicts sample"),
        ("sd15", "scheduler", {"beta_end": 0.02}, "noise schedule"),
    ],
)
def test_refused_by_name(bases, tmp_path, architecture_, component, changes, named):
    folder = edited(bases[architecture_], tmp_path, component, **changes)
    with pytest.raises(UserError, match=named.replace(".", r"\.")) as caught:
        identify(folder)
    assert "\n" not in str(caught.value)


def test_missing_parts(bases, tmp_path):
    copy = tmp_path / "base"
    shutil.copytree(bases["sdxl"], copy)
    shutil.rmtree(copy / "text_encoder_2")
    with pytest.raises(UserError, match="has no second text encoder .*--model.text_encoders"):
        identify(copy)
    shutil.rmtree(copy / "unet")
    with pytest.raises(UserError, match="without a UNet"):
        identify(copy)
    (copy / "model_index.json").unlink()
    with pytest.raises(UserError, match="no model_index.json"):
        identify(copy)


def test_addition_embed_type_none_is_sd15(bases, tmp_path):
    # Every UNet config has the key, so its presence means nothing: the founding document's test fails here.
    folder = edited(bases["sd15"], tmp_path, "unet")
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"addition_embed_type": None}))
    assert identify(folder) == "sd15"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("no/such/folder/here", "neither a folder nor a file on this machine, nor a hub id"),
        ("./nothing", "neither a folder"),
        ("someone/some-model", "could not be fetched from the hub"),
    ],
)
def test_sources_that_are_not_there(source, words):
    with pytest.raises(UserError, match=words):
        loading.resolve_base(source)


def test_a_vae_of_another_architecture_is_refused(bases):
    with pytest.raises(UserError, match=r"vae/config.json has scaling_factor 0.18215, .* takes only 0.13025"):
        loading.resolve_base(str(bases["sdxl"]), vae=str(bases["sd15"]))


def test_a_vae_override_is_used_and_hashed(bases, tmp_path):
    from sushi_research.fingerprints import HashCache

    hash_cache = HashCache(tmp_path / "files.json")
    own = loading.resolve_base(str(bases["sdxl"]))
    vae = edited(bases["sdxl"], tmp_path, "vae", sample_size=8) / "vae"
    other = loading.resolve_base(str(bases["sdxl"]), vae=str(vae))
    assert other.parts["vae"].folder == vae
    assert own.hash("vae", hash_cache) != other.hash("vae", hash_cache)
    assert own.hash("unet", hash_cache) == other.hash("unet", hash_cache)


def test_weights_that_do_not_fit_or_are_cut_are_named(bases, tmp_path):
    import torch

    folder = edited(bases["sd15"], tmp_path, "unet", layers_per_block=1)
    with pytest.raises(UserError, match="do not fit its config.json|could not be loaded"):
        loading.load_unet(loading.resolve_base(str(folder)), torch.float32, torch.device("cpu"))
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"vae/diffusion_pytorch_model\.safetensors is cut short"):
        loading.load_vae(loading.resolve_base(str(folder)), torch.float32, torch.device("cpu"))
    weights.unlink()
    with pytest.raises(UserError, match=r"has no diffusion_pytorch_model\.safetensors"):
        loading.resolve_base(str(folder)).hash("vae", None)


def test_fp16_only_weights_ask_for_the_variant(bases, tmp_path):
    folder = edited(bases["sd15"], tmp_path, "unet")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(UserError, match=r"--model\.variant fp16"):
        diffusers_folder.weight_files(folder / "unet", "diffusion_pytorch_model", None)
    assert len(diffusers_folder.weight_files(folder / "unet", "diffusion_pytorch_model", "fp16")) == 1


def test_vae_dtype_is_fp32_unless_the_file_says_otherwise(bases, tmp_path):
    import torch

    cuda = torch.device("cuda")
    silent = edited(bases["sd15"], tmp_path / "a", "vae", force_upcast=None)
    safe = edited(bases["sd15"], tmp_path / "b", "vae", force_upcast=False)
    assert loading.vae_dtype(loading.resolve_base(str(silent)), cuda) == torch.float32
    assert loading.vae_dtype(loading.resolve_base(str(safe)), cuda) == torch.float16
    assert loading.vae_dtype(loading.resolve_base(str(safe)), torch.device("cpu")) == torch.float32
