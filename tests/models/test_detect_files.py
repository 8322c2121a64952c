"""What a base is, from names, shapes and configs of many kinds of models; all but two are refused, by what they are."""

import builtins
import functools
import json
import math
import re
import shutil

import pytest
import torch
from single_files import PREFIXES, place_of

from sushi_research.adapters import kohya_format, lora
from sushi_research.adapters.settings import AdapterSettings
from sushi_research.errors import UserError
from sushi_research.models import ARCHITECTURES, detect, labels, loading
from sushi_research.models import header as headers
from sushi_research.models.components import model_class
from testing.real_configs import NARROW_UNETS, SD15_TEXT, SD15_UNET, SD15_VAE, SDXL_TEXT_2, SDXL_UNET

UNET, VAE, CLIP = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
OPEN_CLIP, SDXL_CLIP, SDXL_OPEN_CLIP = "cond_stage_model.model.", *list(PREFIXES["sdxl"].values())[1:]
LABEL = f"{UNET}label_emb.0.0.weight"
CUDA = torch.device("cuda")
# stabilityai/stable-diffusion-2-1 (and -base, whose UNet is the same) and stable-diffusion-xl-refiner-1.0.
SD2_UNET = SD15_UNET | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
REFINER_UNET = SDXL_UNET | {
    "attention_head_dim": [6, 12, 24, 24],
    "block_out_channels": [384, 768, 1536, 1536],
    "cross_attention_dim": 1280,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "projection_class_embeddings_input_dim": 2560,
    "transformer_layers_per_block": 4,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}
REAL = {
    "unet sd15": ("unet", SD15_UNET),
    "unet sdxl": ("unet", SDXL_UNET),
    "unet sd2": ("unet", SD2_UNET),
    "unet refiner": ("unet", REFINER_UNET),
    "vae": ("vae", SD15_VAE),
    "clip": ("text_encoder", SD15_TEXT),
    "open_clip": ("text_encoder_2", SDXL_TEXT_2),
}


@functools.cache
def ours(name):
    """Parameter -> shape of a component at its published size, by the names of diffusers and transformers."""
    component, config = REAL[name]
    with torch.device("meta"):
        kind = model_class(component)
        model = kind(kind.config_class(**config)) if component.startswith("text") else kind.from_config(config)
    return {path: list(parameter.shape) for path, parameter in model.named_parameters()}


@functools.cache
def published(name, prefix=""):
    """The same by the names of the published single files."""
    place_at, found = place_of(*REAL[name]), {}
    for path, shape in ours(name).items():
        place = place_at(path)
        first = shape[0] * (1 if place.third is None else 3)
        found[prefix + place.name] = shape[::-1] if place.transposed else [first, *shape[1:]]
    return found


def plain(names):
    """Names, as one text, whose shapes tell nothing."""
    return dict.fromkeys(names.split(), [4])


def textless(name):
    return published(f"unet {name}", UNET) | published("vae", VAE)


def sd15():
    return textless("sd15") | published("clip", CLIP)


def sd2():
    return textless("sd2") | plain(f"{OPEN_CLIP}token_embedding.weight {OPEN_CLIP}transformer.resblocks.0.ln_1.bias")


def sdxl():
    text = published("clip", SDXL_CLIP) | published("open_clip", SDXL_OPEN_CLIP)
    more = {f"{SDXL_CLIP}text_model.embeddings.position_ids": [1, 77], f"{SDXL_OPEN_CLIP}logit_scale": []}
    return textless("sdxl") | text | more


def inputs(base, channels):
    """A base whose UNet takes more channels."""
    return base | {f"{UNET}input_blocks.0.0.weight": [320, channels, 3, 3]}


@pytest.fixture
def written(tmp_path):
    """Writes a file of these names and shapes, whose data are a hole that takes no room."""

    def write(shapes):
        entries, end = {}, 0
        for name, shape in shapes.items():
            begin, end = end, end + 2 * math.prod(shape)
            entries[name] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
        content = json.dumps(entries).encode()
        path = tmp_path / "model.safetensors"
        with open(path, "wb") as file:
            file.write(len(content).to_bytes(8, "little") + content)
            file.truncate(8 + len(content) + end)
        return path

    return write


def short(value):
    """A test id of a few words."""
    return value.partition(" (")[0].partition(":")[0][:40] if isinstance(value, str) else ""


def refusal(path):
    """The sentence in which a base is refused that no option mends, after its path."""
    with pytest.raises(UserError) as caught:
        loading.resolve_base(str(path), tokenizers="/nowhere", prediction_type="epsilon")
    message = str(caught.value)
    assert message.isprintable() and len(message) < 500 and message.endswith(".") and str(path) in message
    return message.partition(str(path))[2]


# --- bases ---

BASES = {
    "sd15": {
        "whole": sd15,
        "by older names": lambda: {name.replace(".text_model.", "."): at for name, at in sd15().items()},
        "with EMA": lambda: (
            sd15()
            | {f"model_ema.diffusion_model{name.replace('.', '')}": at for name, at in published("unet sd15").items()}
            | plain("model_ema.decay model_ema.num_updates betas alphas_cumprod")
        ),
        "without text": lambda: textless("sd15"),
        "UNet alone": lambda: published("unet sd15"),
        "UNet alone, prefixed": lambda: published("unet sd15", "diffusion_model."),
    },
    "sdxl": {
        "whole": sdxl,
        "v-prediction": lambda: sdxl() | {"v_pred": [0], "ztsnr": [0]},
        "without text": lambda: textless("sdxl"),
        "with the first encoder only": lambda: textless("sdxl") | published("clip", SDXL_CLIP),
        "UNet alone": lambda: published("unet sdxl"),
        "UNet alone, prefixed": lambda: published("unet sdxl", "diffusion_model."),
    },
}


@pytest.mark.parametrize("name", BASES)
def test_a_base_is_known_by_its_header_in_any_order(name, written):
    for case, shapes in BASES[name].items():
        for keys in (shapes(), dict(reversed(shapes().items()))):
            assert detect.of_file(headers.read_header(written(keys))) == name, case


def test_a_base_without_text_encoders_asks_for_them(architecture, written):
    message = refusal(written(textless(architecture)))
    assert (
        f"holds {ARCHITECTURES[architecture].title} UNet without its text encoder: give --model.text_encoders"
        in message
    )


@pytest.mark.parametrize(("shapes", "count"), [(sd15, 1130), (sdxl, 2515)], ids=["sd15", "sdxl"])
def test_no_tensor_is_read(shapes, count, written, monkeypatch):
    path, pieces = written(shapes()), []

    def counting(*arguments):
        file = builtins.open(*arguments)
        read = file.read
        file.read = lambda *size: pieces.append(read(*size)) or pieces[-1]
        return file

    monkeypatch.setattr(headers, "open", counting, raising=False)
    header = headers.read_header(path)
    detect.of_file(header)
    assert len(header.tensors) == count
    begin = min(tensor.begin for tensor in header.tensors.values())
    assert sum(map(len, pieces)) == begin < path.stat().st_size / 1000


# --- models of other kinds ---


def mmdit(blocks, prefix="", more=""):
    each = "x_block.adaLN_modulation.1.bias x_block.mlp.fc1.weight context_block.adaLN_modulation.1.bias".split()
    names = [f"joint_blocks.{number}.{name}" for number in range(blocks) for name in each]
    return plain(" ".join(prefix + name for name in (*names, "x_embedder.proj.weight", "pos_embed", *more.split())))


def flux(prefix="", more=""):
    names = "img_in.weight double_blocks.0.img_attn.norm.key_norm.scale double_blocks.0.img_mod.lin.bias"
    names += f" single_blocks.0.linear1.weight {more}"
    return plain(" ".join(prefix + name for name in names.split()))


FLUX2 = "double_stream_modulation_img.{0}.weight single_stream_modulation.{0}.weight".format
DISTILLED, GUIDANCE = "distilled_guidance_layer.in_proj.bias", "guidance_in.in_layer.bias"
SD3_DIFFUSERS = (
    "context_embedder.weight transformer_blocks.0.attn.add_k_proj.weight transformer_blocks.0.norm1_context.x"
)
FLUX_DIFFUSERS = f"{SD3_DIFFUSERS} single_transformer_blocks.0.attn.to_q.weight x_embedder.weight"
SVD = plain(
    f"{UNET}input_blocks.1.0.time_mixer.mix_factor {UNET}input_blocks.1.1.time_stack.0.attn1.to_q.weight "
    f"{VAE}decoder.mid.block_1.time_stack.in_layers.0.weight conditioner.embedders.0.open_clip.model.visual.proj"
)
SVD_DIFFUSERS = (
    "conv_in.weight down_blocks.0.attentions.0.temporal_transformer_blocks.0.attn1.to_q.weight "
    "down_blocks.0.attentions.0.time_mixer.mix_factor down_blocks.0.resnets.0.time_mixer.mix_factor"
)
MOTION = plain("down_blocks.0.motion_modules.0.temporal_transformer.norm.weight")
UPSCALER = {
    f"{UNET}input_blocks.0.0.weight": [256, 7, 3, 3],
    f"{UNET}label_emb.weight": [1000, 1024],
    f"{UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": [512, 1024],
    "low_scale_model.betas": [350],
}
UNCLIP = plain("embedder.model.visual.proj noise_augmentor.data_mean")
SIGMAS = {"edm_vpred.sigma_max": [], "edm_vpred.sigma_min": []}

# What it is called -> those that are called so.
OTHERS = {
    "Stable Diffusion 2.x": {
        "whole": sd2,
        "UNet alone": lambda: published("unet sd2"),
        "that says v-prediction": lambda: sd2() | {"v_pred": [0]},
        "of another UNet with its encoder": lambda: textless("sd15") | plain(f"{OPEN_CLIP}ln_final.weight"),
    },
    "Stable Diffusion 2.1 unCLIP": {
        "h": lambda: sd2() | UNCLIP | {LABEL: [1280, 2048]},
        "l": lambda: sd2() | UNCLIP | {LABEL: [1280, 1536]},
        "UNet alone": lambda: published("unet sd2", UNET) | {LABEL: [1280, 2048]},
    },
    "the SDXL refiner": {
        "whole": lambda: published("unet refiner", UNET) | published("open_clip", "conditioner.embedders.0.model."),
        "UNet alone": lambda: published("unet refiner"),
    },
    "an inpainting model (9 input channels)": {
        "SD1.5": lambda: inputs(sd15(), 9),
        "SD2": lambda: inputs(sd2(), 9),
        "SDXL": lambda: inputs(sdxl(), 9),
    },
    "an instruct-pix2pix model (8 input channels)": {
        "SD1.5": lambda: inputs(sd15(), 8),
        "SDXL": lambda: inputs(sdxl(), 8),
    },
    "a model whose UNet takes 7 input channels": {"x4 upscaler": lambda: UPSCALER},
    "a CosXL model": {
        "whole": lambda: sdxl() | SIGMAS,
        "edit": lambda: inputs(sdxl(), 8) | SIGMAS,
        "merged into v-prediction": lambda: sdxl() | SIGMAS | {"v_pred": [0], "ztsnr": [0]},
    },
    "Playground v2.5": {"whole": lambda: sdxl() | plain("edm_mean edm_std")},
    "a latent consistency model": {
        "original": lambda: sd15() | {f"{UNET}time_embed.cond_proj.weight": [320, 256]},
        "diffusers": lambda: ours("unet sd15") | {"time_embedding.cond_proj.weight": [320, 256]},
    },
    "a quantised (fp8) checkpoint": {"scaled": lambda: sdxl() | {f"{UNET}scaled_fp8": [0]}},
    "a video model": {
        "SVD": lambda: inputs(SVD, 8),
        "SVD by diffusers": lambda: plain(SVD_DIFFUSERS),
        "motion module": lambda: MOTION,
        "motion module in SD1.5": lambda: sd15() | MOTION,
    },
    "Stable Diffusion 3 (a transformer, not a UNet)": {
        "medium": lambda: mmdit(24),
        "medium, whole": lambda: mmdit(24, UNET) | published("vae", VAE) | plain("text_encoders.clip_l.logit_scale"),
        "diffusers": lambda: plain(SD3_DIFFUSERS),
    },
    "Stable Diffusion 3.5": {
        "medium": lambda: mmdit(24, "", "joint_blocks.0.x_block.attn2.qkv.weight"),
        "medium, whole": lambda: mmdit(24, UNET, "joint_blocks.0.x_block.attn2.qkv.weight"),
        "large": lambda: mmdit(38),
        "large, whole": lambda: mmdit(38, UNET),
    },
    "FLUX.1": {
        "schnell": flux,
        "dev": lambda: flux("", GUIDANCE),
        "dev, whole": lambda: flux(UNET, GUIDANCE) | plain("vae.decoder.conv_in.weight"),
        "dev in fp8": lambda: flux(UNET, f"{GUIDANCE} scaled_fp8"),
        "diffusers": lambda: plain(FLUX_DIFFUSERS),
    },
    "FLUX.2": {
        "original": lambda: flux("", FLUX2("lin")),
        "prefixed": lambda: flux(UNET, FLUX2("lin")),
        "diffusers": lambda: plain(f"{FLUX_DIFFUSERS} {FLUX2('linear')}"),
    },
    "Chroma": {
        "original": lambda: flux("", DISTILLED),
        "prefixed": lambda: flux(UNET, DISTILLED),
        "diffusers": lambda: plain(f"{FLUX_DIFFUSERS} {DISTILLED}"),
    },
}


@pytest.mark.parametrize("name", OTHERS, ids=short)
def test_another_model_is_refused_by_its_name(name, written):
    for case, shapes in OTHERS[name].items():
        message = refusal(written(shapes()))
        assert message.startswith(f" is {name}"), case
        assert re.search(f"choose an {labels()} base|train the SDXL base|take the model's fp16 file", message), case


# --- files that are no model ---

KOHYA, ATTENTION = (
    "lora_unet_down_blocks_0_attentions_0_proj_in",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1",
)
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
LORA, UNKNOWN = "a LoRA (adapter) file; name the base that it was trained on", "of an unknown kind (its tensors: "
FILES = {
    LORA: {
        "kohya": f"{KOHYA}.lora_down.weight {KOHYA}.lora_up.weight {KOHYA}.alpha",
        "kohya, text": "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
        "kohya, DoRA": f"{KOHYA}.dora_scale",
        "kohya, with an embedding": f"bundle_emb.x.string_to_param.* {KOHYA}.lora_down.weight",
        "peft": f"base_model.model.{ATTENTION}.to_q.lora_A.weight",
        "peft, named": f"unet.{ATTENTION}.to_q.lora_B.default.weight",
        "peft, text": f"text_encoder.{TEXT}.lora_A.weight",
        "diffusers": f"unet.{ATTENTION}.to_q.lora.down.weight",
        "FLUX": "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight",
        "loha": f"{KOHYA}.hada_w1_a {KOHYA}.hada_w1_b {KOHYA}.hada_w2_a {KOHYA}.alpha",
        "lokr": f"{KOHYA}.lokr_w1 {KOHYA}.lokr_w2_a {KOHYA}.lokr_w2_b",
        "lokr, factored": f"{KOHYA}.lokr_w1_a {KOHYA}.lokr_w1_b {KOHYA}.lokr_t2",
        "oft": f"{KOHYA}.oft_blocks {KOHYA}.alpha",
    },
    "a ControlNet": {
        "original": "control_model.time_embed.0.weight control_model.input_hint_block.0.weight",
        "with a base": lambda: sd15() | plain("control_model.input_hint_block.0.weight"),
        "diffusers": "conv_in.weight controlnet_cond_embedding.conv_in.weight down_blocks.0.resnets.0.conv1.weight",
        "Control-LoRA": "lora_controlnet input_hint_block.0.weight input_blocks.1.0.in_layers.2.down",
    },
    "a T2I-Adapter": {
        "original": "conv_in.weight body.0.block1.weight body.2.in_conv.weight",
        "diffusers": "adapter.conv_in.weight adapter.body.0.resnets.0.block1.weight",
    },
    "an IP-Adapter": {"SD1.5": "image_proj.proj.weight ip_adapter.1.to_k_ip.weight", "plus": "image_proj.latents"},
    "a textual inversion embedding": {"SD1.5": "emb_params", "SDXL": "clip_g clip_l"},
    "a UNet alone, with diffusers' tensor names: put it into the unet folder": {
        "SD1.5": lambda: ours("unet sd15"),
        "SDXL": lambda: ours("unet sdxl"),
    },
    "a VAE alone: give it to model.vae": {
        "original": lambda: published("vae"),
        "prefixed": lambda: published("vae", VAE),
        "diffusers": lambda: ours("vae"),
    },
    "a text encoder alone: choose": {
        "transformers": lambda: published("clip"),
        "transformers 5.6": lambda: ours("clip"),
        "OpenCLIP": lambda: published("open_clip"),
    },
    "empty (no tensors): download": {"nothing": ""},
    UNKNOWN: {
        "Stable Cascade": "clip_txt_mapper.weight down_blocks.0.0.channelwise.0.weight",
        "PixArt": "adaln_single.linear.weight transformer_blocks.0.attn1.to_k.weight pos_embed.proj.weight",
        "Wan": "blocks.0.cross_attn.k.weight head.modulation patch_embedding.weight",
        "control characters": lambda: dict.fromkeys(("\x1b[2J\n\u202e", "\r", "\0"), [4]),
        "a UNet of vectors": f"{UNET}input_blocks.0.0.weight {UNET}out.2.weight",
        "very long names": "x" * 5000,
    },
}
# Close to the names of others.
NEIGHBOURS = {
    LORA: {
        "diffusers' processors": f"unet.{ATTENTION}.processor.to_q_lora.down.weight",
        "diffusers, text": f"text_encoder.{TEXT}.lora_linear_layer.down.weight",
        "diffusers, text alone": f"{TEXT}.lora_linear_layer.down.weight",
        "full": f"{KOHYA}.diff {KOHYA}.diff_b",
        "GLoRA": f"{KOHYA}.a1.weight {KOHYA}.a2.weight {KOHYA}.b1.weight",
    },
    "a ControlNet": {"LLLite": "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight"},
    UNKNOWN: {
        "Qwen-Image": "transformer_blocks.0.attn.add_k_proj.weight transformer_blocks.0.img_mod.1.weight",
        "HunyuanVideo": "double_blocks.0.img_mod.linear.weight txt_in.individual_token_refiner.blocks.0.norm1.weight",
        "Wan's VAE": "encoder.conv1.weight decoder.middle.0.residual.0.gamma",
    },
    f"{UNKNOWN}x": {"a name of 80 letters": "x" * 80},
}


@pytest.mark.parametrize(
    ("name", "cases"),
    [*FILES.items(), *NEIGHBOURS.items()],
    ids=[*map(short, FILES), *(f"near {short(name)}" for name in NEIGHBOURS)],
)
def test_what_is_no_model_is_refused_by_its_name(name, cases, written):
    for case, shapes in cases.items():
        message = refusal(written(plain(shapes) if isinstance(shapes, str) else shapes()))
        assert message.startswith(f" is {name}"), case


@pytest.mark.slow
def test_our_own_adapter_file_is_no_base(architecture, tmp_path):
    with torch.device("meta"):
        unet = model_class("unet").from_config(NARROW_UNETS[architecture])
    lora.attach(unet, AdapterSettings(targets="kohya_conv", rank=2, alpha=2.0, dropout=0.0, init="default", seed=0))
    state = {name: torch.zeros(value.shape) for name, value in lora.adapter_parameters({"unet": unet}).items()}
    facts = {"architecture": architecture, "state": state, "dtype": torch.float16, "metadata": {"ss_v2": "False"}}
    kohya_format.save_adapter(tmp_path / "model.safetensors", {"unet": unet}, **facts)
    assert refusal(tmp_path / "model.safetensors").startswith(f" is {LORA}")


# --- folders ---


@pytest.fixture
def edited(bases, architecture, tmp_path):
    """Copies a base, with another pipeline class and keys of its components' configs changed."""

    def edit(pipeline=None, **components):
        folder = shutil.copytree(bases[architecture], tmp_path / "model.safetensors", dirs_exist_ok=True)
        changes = {f"{name}/config.json": each for name, each in components.items()}
        for path, each in (({"model_index.json": {"_class_name": pipeline}} if pipeline else {}) | changes).items():
            (folder / path).write_text(json.dumps(json.loads((folder / path).read_text()) | each))
        return folder

    return edit


SDXL_ONLY = pytest.mark.parametrize("architecture", ["sdxl"])


@pytest.mark.parametrize(
    ("architecture", "pipeline"),
    [("sd15", "StableDiffusionInpaintPipeline"), ("sdxl", "StableDiffusionXLControlNetPipeline")],
)
def test_a_folder_made_for_another_pipeline(pipeline, edited):
    assert refusal(edited(pipeline)).startswith(f" is made for {pipeline}; ")


def test_a_folder_of_a_latent_consistency_model(edited):
    assert refusal(edited(unet={"time_cond_proj_dim": 256})).startswith(" is a latent consistency model")


@SDXL_ONLY
@pytest.mark.parametrize("pipeline", ["FluxPipeline", "StableDiffusion3Pipeline", "PixArtSigmaPipeline"])
def test_a_folder_with_a_transformer_has_no_unet(pipeline, edited):
    folder = edited(pipeline)
    (folder / "unet").rename(folder / "transformer")
    assert refusal(folder).startswith(f" holds a {pipeline} without a UNet; ")


@SDXL_ONLY
def test_a_folder_of_the_refiner(edited):
    """As published: five numbers of sizes, and the second text encoder alone."""
    sizes = {"addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 1280 + 5 * 256}
    folder = edited(unet=sizes, text_encoder_2={"projection_dim": 1280})
    for name in ("text_encoder", "text_encoder_2"):
        shutil.rmtree(folder / name)
        assert refusal(folder).startswith(" is the SDXL refiner; ")


def test_a_folder_of_a_video_model(edited):
    folder = edited("StableVideoDiffusionPipeline", unet={"in_channels": 8})
    assert "video model" in refusal(folder)


# --- the VAE in half precision ---


def vae_dtypes(*sources, vae=None, tokenizers):
    found = [loading.resolve_base(str(each), vae=vae and str(vae), tokenizers=str(tokenizers)) for each in sources]
    assert all(loading.vae_dtype(base, torch.device("cpu")) == torch.float32 for base in found)
    return {loading.vae_dtype(base, CUDA) for base in found}


@pytest.mark.slow
def test_the_vae_of_a_single_file_is_never_used_in_fp16(architecture, file_of, folder, edited):
    file = file_of(architecture)
    safe = edited(vae={"force_upcast": False})
    assert vae_dtypes(safe, tokenizers=folder) == {torch.float16}
    assert vae_dtypes(file, folder, tokenizers=folder) == {torch.float32}
    assert vae_dtypes(file, folder, safe, vae=file, tokenizers=folder) == {torch.float32}


@SDXL_ONLY
def test_a_vae_folder_is_used_in_fp16_only_if_it_says_false(file_of, folder, edited):
    for said in (False, True, None):
        vae = edited(vae={"force_upcast": said}) / "vae"
        expected = {torch.float16 if said is False else torch.float32}
        assert vae_dtypes(file_of("sdxl"), folder, vae=vae, tokenizers=folder) == expected, said
    for said in (0, "false", []):
        vae = edited(vae={"force_upcast": said}) / "vae"
        with pytest.raises(UserError, match="has force_upcast .*, but this suite takes only true, false or null"):
            vae_dtypes(file_of("sdxl"), folder, vae=vae, tokenizers=folder)
