"""The adapter file: names, bytes, metadata, and what diffusers makes of it."""

import functools
import hashlib
import re
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from sushi_research.adapters import kohya_format as formats
from sushi_research.adapters import lora, verification
from sushi_research.adapters.formats import writing
from sushi_research.adapters.reading import read_adapter
from sushi_research.adapters.settings import AdapterSettings
from sushi_research.adapters.targets import adaptable_paths
from sushi_research.errors import UserError
from testing.real_configs import NARROW_UNETS, UNETS

RANK, ALPHA = 4, 3.0
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def trained_unet(architecture, targets="kohya_conv", device="meta", layers=2):
    """(UNet with an adapter, the trained state), where no tensor is zero."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel.from_config(NARROW_UNETS[architecture] | {"layers_per_block": layers}).eval()
    settings = {"rank": RANK, "alpha": ALPHA, "dropout": 0.0, "init": "default", "seed": 0}
    lora.attach(unet, AdapterSettings(targets=targets, **settings))
    generator = torch.Generator().manual_seed(1)
    parameters = lora.adapter_parameters({"unet": unet})
    return unet, {name: torch.randn(value.shape, generator=generator) for name, value in parameters.items()}


def saved(folder, architecture, targets="kohya_conv", dtype="float16", metadata=None):
    unet, state = trained_unet(architecture, targets)
    path = folder / "adapter.safetensors"
    arguments = {"architecture": architecture, "state": state, "dtype": DTYPES[dtype]}
    formats.save_adapter(path, {"unet": unet}, metadata=metadata or {"ss_v2": "False"}, **arguments)
    return path, unet, arguments


@functools.cache
def _saved_attention():
    with tempfile.TemporaryDirectory() as folder:
        path, unet, arguments = saved(Path(folder), "sd15", "attention")
        return path.read_bytes(), unet, arguments


def saved_attention(folder):
    """As `saved(folder, "sd15", "attention")`, made once: the file may be changed, the UNet and the arguments not."""
    content, unet, arguments = _saved_attention()
    path = folder / "adapter.safetensors"
    path.write_bytes(content)
    return path, unet, arguments


@functools.cache
def all_paths(architecture, configs="narrow"):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config({"narrow": NARROW_UNETS, "real": UNETS}[configs][architecture])
    return adaptable_paths(unet)


def rewrite(path, change):
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


# --- names ---


GOLDEN_NAMES = {
    "sd15": [
        (
            "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
            "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        ),
        (
            "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
            "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0",
        ),
        (
            "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
            "mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj",
        ),
        ("up_blocks.1.attentions.0.proj_in", "up_blocks_1_attentions_0_proj_in"),
        ("up_blocks.0.upsamplers.0.conv", "up_blocks_0_upsamplers_0_conv"),
        ("down_blocks.1.resnets.0.conv_shortcut", "down_blocks_1_resnets_0_conv_shortcut"),
    ],
    "sdxl": [
        (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
            "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        ),
        ("down_blocks.2.attentions.1.transformer_blocks.9.ff.net.2", "input_blocks_8_1_transformer_blocks_9_ff_net_2"),
        ("mid_block.attentions.0.proj_in", "middle_block_1_proj_in"),
        ("mid_block.resnets.0.conv1", "middle_block_0_in_layers_2"),
        ("mid_block.resnets.1.conv2", "middle_block_2_out_layers_3"),
        (
            "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
            "output_blocks_0_1_transformer_blocks_0_attn2_to_k",
        ),
        (
            "up_blocks.1.attentions.2.transformer_blocks.1.attn2.to_out.0",
            "output_blocks_5_1_transformer_blocks_1_attn2_to_out_0",
        ),
        ("down_blocks.0.resnets.0.time_emb_proj", "input_blocks_1_0_emb_layers_1"),
        ("up_blocks.2.resnets.2.conv_shortcut", "output_blocks_8_0_skip_connection"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks_3_0_op"),
        ("down_blocks.1.downsamplers.0.conv", "input_blocks_6_0_op"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks_2_2_conv"),
        ("up_blocks.1.upsamplers.0.conv", "output_blocks_5_2_conv"),
    ],
}


@pytest.mark.parametrize(("architecture", "modules"), [("sd15", 278), ("sdxl", 788)])
def test_names_at_the_real_structure(architecture, modules):
    names = formats.kohya_unet_names(architecture, all_paths(architecture, "real"))
    assert len(names) == len(set(names.values())) == modules
    for path, name in GOLDEN_NAMES[architecture]:
        assert names[path] == f"lora_unet_{name}"
    # Programs cut a key at its first dot, and tell the naming from these words.
    foreign = r"\.|(input|output)_blocks|middle_block" if architecture == "sd15" else r"\.|(down|up)_blocks|mid_block"
    assert not any(re.search(foreign, name) for name in names.values())


@pytest.mark.slow
def test_one_layer_per_block(tmp_path):
    """Stability's numbers count layers: diffusers finds each module again, also in the small bases of demo/base."""
    unet, state = trained_unet("sdxl", layers=1)
    path, arguments = tmp_path / "adapter.safetensors", {"architecture": "sdxl", "state": state, "dtype": torch.float32}
    formats.save_adapter(path, {"unet": unet}, metadata={}, **arguments)
    verification.verify_saved(path, {"unet": unet}, **arguments)
    names = formats.kohya_unet_names("sdxl", lora.adapter_modules(unet), 1)
    read = {pair.name: pair for pair in read_adapter(path).entries}
    assert read.keys() == set(names.values())
    assert all(torch.equal(read[name].down, state[f"{where}.lora_A.weight"]) for where, name in names.items())


# --- what diffusers makes of the file ---


def pipeline(architecture):
    """A diffusers pipeline around a UNet with the random weights that `trained_unet(device="cpu")` has."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    # Frozen like the trained one: on a CPU torch takes another kernel, with another last digit, where weights train.
    unet = UNet2DConditionModel.from_config(NARROW_UNETS[architecture]).eval().requires_grad_(False)
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    parts = {"vae": None, "text_encoder": None, "tokenizer": None, "unet": unet, "scheduler": scheduler}
    if architecture == "sd15":
        return StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    return StableDiffusionXLPipeline(**parts, text_encoder_2=None, tokenizer_2=None)


def predict(unet, architecture):
    torch.manual_seed(5)
    width = NARROW_UNETS[architecture]["cross_attention_dim"]
    added = {"text_embeds": torch.randn(2, 16), "time_ids": torch.randn(2, 6)} if architecture == "sdxl" else None
    noisy, hidden = torch.randn(2, 4, 8, 8), torch.randn(2, 5, width)
    with torch.no_grad():
        return unet(noisy, torch.tensor([3, 700]), hidden, added_cond_kwargs=added).sample


@pytest.mark.parametrize("architecture", UNETS)
@pytest.mark.slow
def test_a_pipeline_with_the_file_computes_what_was_trained(architecture, tmp_path):
    unet, state = trained_unet(architecture, device="cpu")
    # Small enough for the UNet not to saturate, large enough to change every digit.
    state = {name: value * 0.05 for name, value in state.items()}
    base = predict(unet, architecture)
    for name, parameter in lora.adapter_parameters({"unet": unet}).items():
        parameter.data.copy_(state[name])
    path = tmp_path / "adapter.safetensors"
    formats.save_adapter(path, {"unet": unet}, architecture=architecture, state=state, dtype=torch.float32, metadata={})
    loaded = pipeline(architecture)
    # Equal weights elsewhere in memory: some CPU kernels give another last digit there. The adapter moves the first digit.
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(predict(loaded.unet, architecture), base, **close)
    loaded.load_lora_weights(path, adapter_name="default")
    layers = lora.adapter_modules(loaded.unet)
    assert list(layers) == list(lora.adapter_modules(unet))
    assert {layer.scaling["default"] for layer in layers.values()} == {ALPHA / RANK}
    parameters = lora.adapter_parameters({"unet": loaded.unet})
    assert all(torch.equal(parameters[name], value) for name, value in state.items())
    torch.testing.assert_close(predict(loaded.unet, architecture), predict(unet, architecture), **close)
    assert (predict(unet, architecture) - base).abs().mean() > 0.05 * base.abs().mean()


# --- verify_saved ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_verify_accepts_what_was_saved(dtype, tmp_path):
    # Linear layers and convolutions; every module is saved and verified below, where the file is read.
    path, unet, arguments = saved(tmp_path, "sd15", ["attn2.to_k", "conv1"], dtype)
    verification.verify_saved(path, {"unet": unet}, **arguments)


def test_verify_accepts_an_alpha_that_fp32_rounds(tmp_path):
    unet, state = trained_unet("sd15", ["attn2.to_k"])
    for layer in lora.adapter_modules(unet).values():
        layer.lora_alpha["default"] = 0.1
    path = tmp_path / "adapter.safetensors"
    arguments = {"architecture": "sd15", "state": state, "dtype": torch.float16}
    formats.save_adapter(path, {"unet": unet}, metadata={}, **arguments)
    verification.verify_saved(path, {"unet": unet}, **arguments)


ONE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
ONE_PATH = r"mid_block\.attentions\.0\.transformer_blocks\.0\.attn1\.to_q"


def flip_a_bit(tensors):
    tensors[f"{ONE}.lora_up.weight"].view(torch.int16)[0, 0] ^= 1


def change_a(tensors):
    tensors[f"{ONE}.lora_down.weight"][0, 0] += 1


def drop_a_key(tensors):
    del tensors[f"{ONE}.alpha"]


def add_a_key(tensors):
    tensors["lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha"] = torch.tensor(1.0)


def double_alphas(tensors):
    for key in tensors:
        if key.endswith(".alpha"):
            tensors[key] *= 2


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (flip_a_bit, rf"lora_B of {ONE_PATH} differs from the trained matrix"),
        (change_a, rf"lora_A of {ONE_PATH} differs from the trained matrix"),
        (drop_a_key, rf"the key {ONE}\.alpha is missing"),
        (add_a_key, r"the key lora_te1_text_model_encoder_layers_0_mlp_fc1\.alpha should not be there"),
        (double_alphas, r"the scale of down_blocks\S+ is 1\.5, not 0\.75"),
        (dict.clear, r"the key \S+ is missing"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_verify_names_the_first_difference(damage, sentence, tmp_path):
    path, unet, arguments = saved_attention(tmp_path)
    rewrite(path, damage)
    with pytest.raises(verification.AdapterFileError, match=sentence):
        verification.verify_saved(path, {"unet": unet}, **arguments)


def test_verify_refuses_a_cut_file(tmp_path):
    path, unet, arguments = saved_attention(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(verification.AdapterFileError, match="cannot be read back"):
        verification.verify_saved(path, {"unet": unet}, **arguments)


def test_verify_notices_modules_that_diffusers_drops(tmp_path, monkeypatch):
    # With SDXL's own naming next to diffusers' in one file, diffusers drops the former without a word.
    right = writing.names_of

    def mixed(*arguments):
        return {
            path: "lora_unet_" + path.replace(".", "_") if path.endswith("attn2.to_v") else name
            for path, name in right(*arguments).items()
        }

    monkeypatch.setattr(writing, "names_of", mixed)
    path, unet, arguments = saved(tmp_path, "sdxl", ["attn2.to_k", "attn2.to_v"])
    with pytest.raises(verification.AdapterFileError, match=r"the module \S+ is missing"):
        verification.verify_saved(path, {"unet": unet}, **arguments)


@pytest.mark.parametrize("architecture", UNETS)
def test_verify_notices_swapped_names(architecture, tmp_path, monkeypatch):
    right = writing.names_of

    def swapped(*arguments):
        names = right(*arguments)
        return {path: names[path[:-1] + {"q": "k", "k": "q"}[path[-1]]] for path in names}

    monkeypatch.setattr(writing, "names_of", swapped)
    path, unet, arguments = saved(tmp_path, architecture, ["attn1.to_q", "attn1.to_k"])
    with pytest.raises(verification.AdapterFileError, match="lora_A of .* differs from the trained matrix"):
        verification.verify_saved(path, {"unet": unet}, **arguments)


# --- bytes and metadata ---


def test_the_bytes_are_a_function_of_the_arguments(tmp_path):
    metadata = {f"key_{index}": str(index) for index in range(20)}
    path, unet, arguments = saved(tmp_path, "sd15", "attention", metadata=metadata)
    first = path.read_bytes()
    # safetensors itself writes the metadata in another order each time; ours is sorted, whatever order it is given in.
    formats.save_adapter(path, {"unet": unet}, metadata=dict(reversed(metadata.items())), **arguments)
    assert path.read_bytes() == first
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_keys_shapes_and_dtypes(tmp_path):
    path, _, _ = saved(tmp_path, "sd15", "kohya_conv", "bfloat16")
    tensors = safetensors.torch.load_file(path)
    assert len(tensors) == 3 * 278
    linear = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"  # from 16 context to 24 channels
    conv = "lora_unet_down_blocks_1_resnets_0_conv1"  # from 8 to 16 channels
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    assert shapes[f"{linear}.lora_down.weight"] == (RANK, 16)
    assert shapes[f"{linear}.lora_up.weight"] == (24, RANK)
    assert shapes[f"{conv}.lora_down.weight"] == (RANK, 8, 3, 3)
    assert shapes[f"{conv}.lora_up.weight"] == (16, RANK, 1, 1)
    for key, value in tensors.items():
        assert value.dtype == (torch.float32 if key.endswith(".alpha") else torch.bfloat16)
        if key.endswith(".alpha"):
            assert value.shape == () and value.item() == ALPHA


def test_metadata_comes_back_with_the_hash_of_the_tensors(tmp_path):
    path, _, _ = saved(tmp_path, "sd15", "attention", metadata={"ss_output_name": '寿司 "x"\n', "a": ""})
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    digest = hashlib.sha256(data[8 + length :]).hexdigest()
    assert length % 8 == 0
    assert metadata == {
        "ss_output_name": '寿司 "x"\n',
        "a": "",
        "sshs_model_hash": digest,
        "modelspec.hash_sha256": f"0x{digest}",
    }


def test_a_tensor_that_does_not_fit_leaves_the_earlier_file(tmp_path):
    path, unet, arguments = saved(tmp_path, "sd15", ["attn2.to_k"])
    before = path.read_bytes()
    name = next(iter(arguments["state"]))
    arguments["state"][name][0, 0] = 70_000.0  # fp16 ends at 65,504
    with pytest.raises(UserError, match=rf"the adapter's {re.escape(name)} has values that float16 cannot hold"):
        formats.save_adapter(path, {"unet": unet}, metadata={}, **arguments)
    assert path.read_bytes() == before
    formats.save_adapter(path, {"unet": unet}, metadata={}, **arguments | {"dtype": torch.bfloat16})


@pytest.mark.parametrize("architecture", UNETS)
def test_every_module_is_saved_verified_and_read(architecture, tmp_path):
    path, unet, arguments = saved(tmp_path, architecture, "kohya_conv", "float32")
    verification.verify_saved(path, {"unet": unet}, **arguments)
    names = formats.kohya_unet_names(architecture, all_paths(architecture))
    pairs = {pair.name: pair for pair in read_adapter(path).entries}
    assert 2 * len(pairs) == len(arguments["state"]) and pairs.keys() == set(names.values())
    for module_path, name in names.items():
        assert torch.equal(pairs[name].down, arguments["state"][f"{module_path}.lora_A.weight"])
        assert torch.equal(pairs[name].up, arguments["state"][f"{module_path}.lora_B.weight"])
        assert (pairs[name].alpha, pairs[name].rank) == (ALPHA, RANK)
