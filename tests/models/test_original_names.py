"""Where parameters lie in Stability's layout; diffusers' own converters, which go the other way, are the reference."""

import functools
import importlib
import json

import pytest
import torch
from base_files import REAL, original_tensors, real_model
from safetensors import safe_open
from safetensors.torch import load_file
from single_files import place_of, write_single_file

from sushi_research.models.original_names import Place, clip_name, open_clip_place, unet_name, vae_name

# The parameters of each component in v1-5-pruned-emaonly.safetensors and sd_xl_base_1.0.safetensors.
COUNTS = {
    "sd15": {"unet": 686, "vae": 248, "text_encoder": 196},
    "sdxl": {"unet": 1680, "vae": 248, "text_encoder": 196, "text_encoder_2": 517},
}
REAL_COMPONENTS = [(architecture, component) for architecture, parts in COUNTS.items() for component in parts]
BLOCK = "transformer_blocks.0"


def through_diffusers(component, config, model, tensors):
    """What diffusers' converters make of a file with these tensors of one component."""
    from diffusers.loaders import single_file_utils

    if component == "unet":
        file = {f"model.diffusion_model.{name}": value for name, value in tensors.items()}
        return single_file_utils.convert_ldm_unet_checkpoint(file, config)
    if component == "vae":
        file = {f"first_stage_model.{name}": value for name, value in tensors.items()}
        return single_file_utils.convert_ldm_vae_checkpoint(file, config)
    if component == "text_encoder_2":
        prefix = "conditioner.embedders.1.model."
        file = {prefix + name: value for name, value in tensors.items()}
        return single_file_utils.convert_open_clip_checkpoint(model, file, prefix)
    file = {f"cond_stage_model.transformer.{name}": value for name, value in tensors.items()}
    converted = single_file_utils.convert_ldm_clip_checkpoint(file)
    # As diffusers does for a CLIPTextModel of transformers >= 5.6.
    return {name.removeprefix("text_model."): value for name, value in converted.items()}


@pytest.mark.parametrize(("architecture", "component"), REAL_COMPONENTS)
def test_diffusers_finds_every_parameter_of_the_published_models(architecture, component):
    config, count = REAL[architecture][component], COUNTS[architecture][component]
    model = real_model(architecture, component)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert len(expected) == count == len(list(model.named_parameters()))
    tensors = original_tensors(architecture, component)
    converted = through_diffusers(component, config, model, tensors)
    assert {name: tuple(value.shape) for name, value in converted.items()} == expected
    # One to one, but for OpenCLIP's q, k and v: 32 layers keep six parameters each in two tensors.
    places = [place_of(component, config)(path) for path in expected]
    assert len(set(places)) == count
    assert len(tensors) == count - (32 * 4 if component == "text_encoder_2" else 0)


def test_the_published_files_in_whole():
    """Their numbers of keys: with position_ids, and for SDXL with OpenCLIP's logit_scale."""
    keys = {name: sum(parts.values()) for name, parts in COUNTS.items()}
    assert keys["sd15"] + 1 == 1131
    assert keys["sdxl"] - 32 * 4 + 1 + 1 == 2515


@pytest.mark.parametrize(
    ("architecture", "pipeline", "dtype"),
    [("sd15", "StableDiffusionPipeline", torch.float32), ("sdxl", "StableDiffusionXLPipeline", torch.float16)],
    ids=["sd15-fp32", "sdxl-fp16"],
)
@pytest.mark.slow
def test_diffusers_loads_the_written_file_bit_for_bit(architecture, pipeline, dtype, folder_of, tmp_path):
    folder = folder_of(architecture, torch.float32)
    file = write_single_file(folder, tmp_path / "base.safetensors", architecture, dtype=dtype)
    kind = getattr(importlib.import_module("diffusers"), pipeline)
    loaded = kind.from_single_file(str(file), config=str(folder), torch_dtype=dtype, local_files_only=True)
    for component in REAL[architecture]:
        (weights,) = (folder / component).glob("*.safetensors")
        # transformers writes names with `text_model.` for a CLIPTextModel, which has no such module since 5.6.
        saved = {name.removeprefix("text_model."): value for name, value in load_file(weights).items()}
        read = {
            name.removeprefix("text_model."): value for name, value in getattr(loaded, component).state_dict().items()
        }
        assert read.keys() == saved.keys()
        for name, value in saved.items():
            assert torch.equal(read[name], value.to(dtype)), f"{component}: {name}"


def test_parts_of_a_file(folder_of, tmp_path):
    file = write_single_file(
        folder_of("sdxl"),
        tmp_path / "part.safetensors",
        "sdxl",
        unet_prefix="",
        without=["text_encoder", "vae"],
        extra={"v_pred": torch.tensor([])},
        metadata={"modelspec.title": "part"},
    )
    with safe_open(file, "pt") as opened:
        keys, metadata = set(opened.keys()), opened.metadata()
        assert opened.get_tensor("conditioner.embedders.1.model.logit_scale").shape == ()
    assert metadata == {"modelspec.title": "part"}
    assert {"v_pred", "input_blocks.0.0.weight"} <= keys
    assert not any(key.startswith(("first_stage_model.", "conditioner.embedders.0.")) for key in keys)


def test_companions_of_a_file(folder_of, tmp_path):
    full, bare = (
        load_file(write_single_file(folder_of("sd15"), tmp_path / "base.safetensors", "sd15", companions=companions))
        for companions in (True, False)
    )
    extra = {key: full[key] for key in full.keys() - bare.keys()}
    # The buffers of the noise schedule, and the position ids.
    assert len(extra) == 12 + 1 and "alphas_cumprod" in extra
    ids = extra["cond_stage_model.transformer.text_model.embeddings.position_ids"]
    assert ids.dtype == torch.int64 and ids.shape == (1, 77)


def test_the_narrow_bases_obey_the_published_ratios(folder_of):
    for architecture in REAL:
        folder = folder_of(architecture)
        configs = {name: json.loads((folder / name / "config.json").read_text()) for name in REAL[architecture]}
        unet, vae = configs["unet"], configs["vae"]
        assert unet["norm_num_groups"] == vae["norm_num_groups"] == 32
        heads = 8 if architecture == "sd15" else [max(width // 64, 1) for width in unet["block_out_channels"]]
        assert unet["attention_head_dim"] == heads
        encoders = [config for name, config in configs.items() if name.startswith("text_encoder")]
        assert all(config["hidden_size"] == 64 * config["num_attention_heads"] for config in encoders)
        assert unet["cross_attention_dim"] == sum(config["hidden_size"] for config in encoders)
        assert vae.get("force_upcast") == (True if architecture == "sdxl" else None)


SD15, SDXL = {"plain_up_blocks": (0,)}, {"plain_up_blocks": (2,)}
GOLDEN_UNET = [
    (SD15, "conv_in.weight", "input_blocks.0.0.weight"),
    (SD15, "time_embedding.linear_2.bias", "time_embed.2.bias"),
    (SDXL, "add_embedding.linear_1.weight", "label_emb.0.0.weight"),
    (SDXL, "add_embedding.linear_2.bias", "label_emb.0.2.bias"),
    (SD15, "down_blocks.0.resnets.0.norm1.weight", "input_blocks.1.0.in_layers.0.weight"),
    (SD15, "down_blocks.0.resnets.0.conv1.weight", "input_blocks.1.0.in_layers.2.weight"),
    (SD15, "down_blocks.0.attentions.1.proj_in.weight", "input_blocks.2.1.proj_in.weight"),
    (SD15, "down_blocks.0.downsamplers.0.conv.weight", "input_blocks.3.0.op.weight"),
    (SD15, "down_blocks.1.resnets.0.conv_shortcut.bias", "input_blocks.4.0.skip_connection.bias"),
    (SD15, "down_blocks.3.resnets.1.conv2.bias", "input_blocks.11.0.out_layers.3.bias"),
    (SDXL, f"down_blocks.1.attentions.0.{BLOCK}.attn1.to_q", f"input_blocks.4.1.{BLOCK}.attn1.to_q"),
    (
        SDXL,
        "down_blocks.2.attentions.1.transformer_blocks.9.norm3.bias",
        "input_blocks.8.1.transformer_blocks.9.norm3.bias",
    ),
    (SD15, "mid_block.resnets.0.time_emb_proj.weight", "middle_block.0.emb_layers.1.weight"),
    (SD15, "mid_block.attentions.0.norm.weight", "middle_block.1.norm.weight"),
    (SD15, "mid_block.attentions.0.proj_in", "middle_block.1.proj_in"),
    (SD15, "mid_block.resnets.1.norm2.weight", "middle_block.2.out_layers.0.weight"),
    (SD15, "up_blocks.0.resnets.0.conv1.weight", "output_blocks.0.0.in_layers.2.weight"),
    # diffusers reads the upsampler at 1 and at 2, so only these tell which of the two it is.
    (SD15, "up_blocks.0.upsamplers.0.conv.weight", "output_blocks.2.1.conv.weight"),
    (SD15, "up_blocks.1.upsamplers.0.conv.weight", "output_blocks.5.2.conv.weight"),
    (SDXL, "up_blocks.0.upsamplers.0.conv.weight", "output_blocks.2.2.conv.weight"),
    (
        SD15,
        f"up_blocks.3.attentions.2.{BLOCK}.ff.net.0.proj.weight",
        f"output_blocks.11.1.{BLOCK}.ff.net.0.proj.weight",
    ),
    (SDXL, "up_blocks.2.resnets.2.conv_shortcut.weight", "output_blocks.8.0.skip_connection.weight"),
    (SD15, "conv_norm_out.bias", "out.0.bias"),
    (SD15, "conv_out.weight", "out.2.weight"),
    ({"layers_per_block": 1}, "down_blocks.1.resnets.0.conv1.weight", "input_blocks.3.0.in_layers.2.weight"),
    ({"layers_per_block": 1}, "up_blocks.1.upsamplers.0.conv", "output_blocks.3.2.conv"),
]
GOLDEN_VAE = [
    ("encoder.conv_in.weight", "encoder.conv_in.weight"),
    ("encoder.down_blocks.0.resnets.1.norm1.weight", "encoder.down.0.block.1.norm1.weight"),
    ("encoder.down_blocks.1.resnets.0.conv_shortcut.weight", "encoder.down.1.block.0.nin_shortcut.weight"),
    ("encoder.down_blocks.2.downsamplers.0.conv.bias", "encoder.down.2.downsample.conv.bias"),
    ("encoder.mid_block.resnets.0.conv1.weight", "encoder.mid.block_1.conv1.weight"),
    ("encoder.mid_block.attentions.0.group_norm.weight", "encoder.mid.attn_1.norm.weight"),
    ("decoder.mid_block.attentions.0.to_q.weight", "decoder.mid.attn_1.q.weight"),
    ("decoder.mid_block.attentions.0.to_out.0.bias", "decoder.mid.attn_1.proj_out.bias"),
    ("decoder.mid_block.resnets.1.norm2.bias", "decoder.mid.block_2.norm2.bias"),
    ("decoder.up_blocks.0.resnets.2.conv2.weight", "decoder.up.3.block.2.conv2.weight"),
    ("decoder.up_blocks.0.upsamplers.0.conv.weight", "decoder.up.3.upsample.conv.weight"),
    ("decoder.up_blocks.3.resnets.0.conv_shortcut.bias", "decoder.up.0.block.0.nin_shortcut.bias"),
    ("decoder.conv_norm_out.weight", "decoder.norm_out.weight"),
    ("quant_conv.weight", "quant_conv.weight"),
    ("post_quant_conv.bias", "post_quant_conv.bias"),
]
LAYER = "text_model.encoder.layers.31"
GOLDEN_OPEN_CLIP = [
    ("text_model.embeddings.token_embedding.weight", Place("token_embedding.weight")),
    ("text_model.embeddings.position_embedding.weight", Place("positional_embedding")),
    (f"{LAYER}.layer_norm1.weight", Place("transformer.resblocks.31.ln_1.weight")),
    (f"{LAYER}.layer_norm2.bias", Place("transformer.resblocks.31.ln_2.bias")),
    (f"{LAYER}.self_attn.q_proj.weight", Place("transformer.resblocks.31.attn.in_proj_weight", third=0)),
    (f"{LAYER}.self_attn.k_proj.bias", Place("transformer.resblocks.31.attn.in_proj_bias", third=1)),
    (f"{LAYER}.self_attn.v_proj.weight", Place("transformer.resblocks.31.attn.in_proj_weight", third=2)),
    (f"{LAYER}.self_attn.out_proj.bias", Place("transformer.resblocks.31.attn.out_proj.bias")),
    (f"{LAYER}.mlp.fc1.weight", Place("transformer.resblocks.31.mlp.c_fc.weight")),
    (f"{LAYER}.mlp.fc2.bias", Place("transformer.resblocks.31.mlp.c_proj.bias")),
    ("text_model.final_layer_norm.weight", Place("ln_final.weight")),
    ("text_projection.weight", Place("text_projection", transposed=True)),
]


def test_golden_names():
    for arguments, path, name in GOLDEN_UNET:
        assert unet_name(path, **arguments) == name
    for path, name in GOLDEN_VAE:
        assert vae_name(path, levels=4) == name
    for path, place in GOLDEN_OPEN_CLIP:
        assert open_clip_place(path) == place
    for path in (
        "embeddings.position_embedding.weight",
        "encoder.layers.11.self_attn.k_proj.bias",
        "final_layer_norm.bias",
    ):
        assert clip_name(path) == clip_name(f"text_model.{path}") == f"text_model.{path}"


UNKNOWN_UNET = """
conv_in.scale class_embedding.linear_1.weight time_embedding.cond_proj.weight mid_block
mid_block.0.attentions.0.proj_in.weight mid_block.attentions.1.proj_in.weight mid_block.resnets.2.conv1.weight
mid_block.downsamplers.0.conv.weight down_blocks.attentions.0.proj_in.weight down_blocks.0.attentions.0
down_blocks.0.resnets.2.conv1.weight down_blocks.0.resnets.0.conv3.weight
down_blocks.0.attentions.0.transformer_blocks.0.attn3.to_q.weight
down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight down_blocks.0.motion_modules.0.proj_in.weight
down_blocks.0.upsamplers.0.conv.weight down_blocks.0.downsamplers.1.conv.weight up_blocks.0.downsamplers.0.conv.weight
up_blocks.0.resnets.3.conv1.weight
""".split()
UNKNOWN_VAE = """
encoder.down_blocks.4.resnets.0.conv1.weight encoder.down_blocks.0.upsamplers.0.conv.weight
encoder.up_blocks.0.resnets.0.conv1.weight decoder.down_blocks.0.resnets.0.conv1.weight
decoder.mid_block.resnets.2.conv1.weight decoder.mid_block.attentions.0.conv1.weight
decoder.mid_block.resnets.0.to_q.weight decoder.up_blocks.0.resnets.0.time_emb_proj.weight
""".split()
UNKNOWN_CLIP = """
text_model.embeddings.position_ids text_model.embeddings.token_embedding.bias
text_model.encoder.layers.0.self_attn.in_proj.weight encoder.layers.0.mlp.fc3.bias encoder.layers.0.mlp.fc1
visual_projection.weight
""".split()


@pytest.mark.parametrize(
    ("find", "paths"),
    [
        (unet_name, ["", *UNKNOWN_UNET]),
        (functools.partial(vae_name, levels=4), UNKNOWN_VAE),
        (clip_name, [*UNKNOWN_CLIP, "text_projection.weight"]),
        (open_clip_place, UNKNOWN_CLIP),
    ],
    ids=["unet", "vae", "clip", "open_clip"],
)
def test_unknown_paths_are_named(find, paths):
    for path in paths:
        with pytest.raises(KeyError) as caught:
            find(path)
        assert caught.value.args == (path,)
