"""A base in one .safetensors file: each of its keys is used, on the list of what nobody needs, or an error."""

import re
import shutil

import pytest
import torch
from base_files import CPU, OPEN, TEXT, UNET, VAE, hole, load, refusal, resolved
from safetensors.torch import load_file, save_file

from sushi_research.models import ARCHITECTURES, diffusers_folder
from sushi_research.models.header import read_header
from sushi_research.models.single_file import SingleFile


def expand(text):
    """Keys of both architectures, with the prefixes written short."""
    short = {"UNET.": UNET, "VAE.": VAE, "CLIP15.": TEXT["sd15"], "CLIPXL.": TEXT["sdxl"], "OPEN.": OPEN}
    return [re.sub(r"^[A-Z]+\d*\.", lambda match: short[match[0]], key) for key in text.split()]


UNKNOWN = {
    "sd15": """surprise betas2 model.betas sqrt_recip_betas alphas_cumprod_prev.0 model_emas.decay scale_factors
        denoiser.sigmas2 VAE.losses.logvar cond_stage_model.text_projection.bias diffusion_model.out.2.bias
        UNET.input_blocks.1.0.in_layers.2.weight_scale UNET.output_blocks.0.1.norm.weight VAE.decoder.mid.attn_2.q.weight
        CLIP15.encoder.layers.0.layer_norm3.bias cond_stage_model.transformer.final_layer_norm.bias""",
    "sdxl": """UNET.label_emb.1.0.bias VAE.encoder.down.3.downsample.conv.bias OPEN.text_projection.weight
        CLIPXL.encoder.layers.0.self_attn.in_proj_weight OPEN.transformer.resblocks.0.attn.q_proj.weight
        conditioner.embedders.1.text_projection conditioner.embedders.2.betas""",
}


@pytest.mark.parametrize("architecture", UNKNOWN)
def test_keys_of_no_component_are_found_each(architecture, edited, tmp_path):
    keys = expand(UNKNOWN[architecture])
    message = refusal(edited, architecture, dict.fromkeys(keys, hole(128, 128)))
    assert f"and {len(keys) - 1} more" in message
    opened = SingleFile(read_header(tmp_path / "base.safetensors"), architecture)
    _, unknown = opened.leftovers([opened.part(name) for name in ARCHITECTURES[architecture].formats().SINGLE_FILE])
    # OpenCLIP's projection twice: whichever of the two is not used.
    assert {key.removesuffix(".weight") if "_projection" in key else key for key in unknown} == {
        key.removesuffix(".weight") if "_projection" in key else key for key in keys
    }


def test_a_key_of_no_component_is_named_and_several_are_counted(edited):
    message = refusal(edited, "sd15", {f"{UNET}out.3.bias": hole(1)})
    assert f"'{UNET}out.3.bias'" in message and " more" not in message
    assert "holds 'a' and 2 more" in refusal(edited, "sd15", {"a": hole(1), f"{VAE}b": hole(1), f"{UNET}c": hole(1)})


MISSING = [
    ("sd15", f"{UNET}out.2.bias"),
    ("sd15", f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight"),
    ("sd15", f"{VAE}quant_conv.weight"),
    ("sd15", f"{VAE}encoder.down.0.block.0.conv1.weight"),
    ("sd15", f"{TEXT['sd15']}final_layer_norm.bias"),
    ("sdxl", f"{UNET}label_emb.0.2.weight"),
    ("sdxl", f"{TEXT['sdxl']}embeddings.position_embedding.weight"),
    ("sdxl", f"{OPEN}transformer.resblocks.3.attn.in_proj_bias"),
    ("sdxl", f"{OPEN}text_projection"),
]


# A tensor of another shape or of a dtype that is not read: one of each way that a tensor is held against its parameter (as
# it is, a third of it, transposed).
WRONG = [
    ("misshapen", "sd15", f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight"),
    ("misshapen", "sd15", f"{VAE}encoder.down.0.block.0.conv1.weight"),
    ("misshapen", "sdxl", f"{OPEN}transformer.resblocks.3.attn.in_proj_bias"),
    ("misshapen", "sdxl", f"{OPEN}text_projection"),
    ("fp8", "sd15", f"{UNET}out.2.bias"),
    ("integers", "sdxl", f"{OPEN}transformer.resblocks.3.attn.in_proj_bias"),
]


@pytest.mark.parametrize(
    ("kind", "architecture", "key"),
    [*(("missing", *each) for each in MISSING), *WRONG],
    ids=lambda value: value[-40:],
)
def test_what_a_component_lacks_is_named(kind, architecture, key, edited, tensors_of):
    shape = tensors_of(architecture)[key].shape
    wrong = {
        "missing": None,
        "misshapen": hole(*shape, 2),
        "fp8": hole(*shape, dtype=torch.float8_e4m3fn),
        "integers": hole(*shape, dtype=torch.int8),
    }
    message = refusal(edited, architecture, {key: wrong[kind]})
    # A name that the sizes are read from is given as it stands below its prefix.
    below = re.sub("^(model.diffusion_model|first_stage_model|.*transformer|conditioner.embedders.1.model)[.]", "", key)
    assert below in message and "base.safetensors" in message
    assert {"fp8": "F8_E4M3", "integers": "I8"}.get(kind, "") in message


@pytest.mark.parametrize(
    ("architecture", "changes", "words"),
    [
        ("sdxl", {f"{OPEN}text_projection": hole(128, 128, 1)}, "text_projection"),
        ("sd15", {f"{TEXT['sd15']}embeddings.token_embedding.weight": hole(64, 514)}, "text encoder in"),
        ("sd15", {f"{VAE}encoder.down.0.block.0.conv1.weight": hole(33, 32, 3, 3)}, "VAE in"),
        ("sd15", {f"{VAE}encoder.conv_in.weight": hole(0, 3, 3, 3)}, "encoder.conv_in.weight"),
        ("sd15", {f"{TEXT['sd15']}encoder.layers.0.mlp.fc1.weight": hole(10**6, 0)}, "fc1.weight has the shape"),
        ("sd15", {f"{TEXT['sd15']}embeddings.position_embedding.weight": hole(248, 64)}, "248 positions, not 77"),
        ("sdxl", {f"{OPEN}transformer.resblocks.{i}.ln_1.bias": hole(128) for i in range(101)}, "101 layers"),
        ("sd15", {f"{UNET}input_blocks.12.0.op.weight": hole(128, 128, 3, 3)}, "blocks are not those"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_sizes_that_make_no_model_are_refused(architecture, changes, words, edited):
    message = refusal(edited, architecture, changes)
    assert words in message and "base.safetensors" in message


IGNORED = {
    "sd15": """model_ema.diffusion_modelinput_blocks00weight model_ema.decay model_ema.num_updates betas alphas_cumprod
        alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod log_one_minus_alphas_cumprod
        sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance posterior_log_variance_clipped
        posterior_mean_coef1 posterior_mean_coef2 logvar lvlb_weights scale_factor embedding_manager.embedder.weight
        VAE.loss.logvar VAE.model_ema.decay cond_stage_model.logit_scale cond_stage_model.text_projection
        cond_stage_model.transformer.text_projection.weight CLIP15.embeddings.position_ids""",
    "sdxl": """denoiser.sigmas denoiser.log_sigmas conditioner.embedders.0.transformer.text_projection.weight
        conditioner.embedders.0.text_projection conditioner.embedders.0.logit_scale OPEN.logit_scale
        conditioner.embedders.0.transformer.logit_scale conditioner.embedders.1.logit_scale
        CLIPXL.embeddings.position_ids""",
}


@pytest.mark.parametrize("architecture", IGNORED)
def test_what_nobody_needs_is_ignored_with_a_reason(architecture, edited):
    keys = set(expand(IGNORED[architecture]))
    base = edited(architecture, dict.fromkeys(keys, hole(3)))
    assert base.ignored.keys() == keys and all(len(reason) > 10 for reason in base.ignored.values())
    for key in keys:
        assert not any(key in part.tensors for part in base.parts.values())


NAN, INFINITE = float("nan"), float("-inf")
WHERE = [
    (NAN, "sd15", f"{UNET}middle_block.1.proj_in.weight", "mid_block.attentions.0.proj_in.weight"),
    (INFINITE, "sd15", f"{VAE}decoder.up.0.block.0.norm1.bias", "decoder.up_blocks.3.resnets.0.norm1.bias"),
    (INFINITE, "sd15", f"{TEXT['sd15']}final_layer_norm.bias", "final_layer_norm.bias"),
    (NAN, "sdxl", f"{OPEN}transformer.resblocks.3.attn.in_proj_bias", "layers.3.self_attn.v_proj.bias"),
]


@pytest.mark.parametrize(
    ("name", "value", "architecture", "key", "path"),
    [(name, *each) for name, each in zip(("unet", "vae", "text_encoder", "text_encoder_2"), WHERE, strict=True)],
    ids=["unet", "vae", "text_encoder", "text_encoder_2"],
)
def test_weights_that_are_not_finite_are_named(value, architecture, name, key, path, tensors_of, folder_of, written):
    tensors, folder = dict(tensors_of(architecture)), folder_of(architecture)
    tensors[key] = tensors[key].clone()
    tensors[key].view(-1)[-1] = value
    file = written(tensors)
    base = resolved(file, folder)
    message = refusal(load, base, name)
    assert key in message and str(file) in message
    assert all(load(base, other) for other in base.parts if other != name)

    copy = shutil.copytree(folder / name, file.parent / name)
    (weights,) = copy.glob("*.safetensors")
    stored = load_file(weights)
    (found,) = (found for found in stored if found.endswith(path))
    stored[found].view(-1)[-1] = value
    save_file(stored, weights, {"format": "pt"})
    message = refusal(diffusers_folder.FolderPart(name, copy, None).load, torch.bfloat16, CPU)
    assert path in message and str(copy) in message
    shutil.rmtree(copy)


def test_a_weight_that_fp16_cannot_hold_is_refused_in_fp16_alone(tensors_of, folder_of, written):
    key = f"{UNET}out.2.bias"
    base = resolved(written(tensors_of("sd15") | {key: torch.full((4,), 1e5)}), folder_of("sd15"))
    assert (load(base, "unet", torch.bfloat16).conv_out.bias > 9e4).all()
    message = refusal(load, base, "unet", torch.float16)
    assert key in message and "float16 cannot hold" in message
