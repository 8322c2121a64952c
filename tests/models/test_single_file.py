"""A base in one .safetensors file: what is loaded from it is what the diffusers folder of the same weights gives, and each
of its keys is used, on the list of what nobody needs, or an error."""

import ctypes
import functools
import gc
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from real_configs import SD15_TEXT, SD15_UNET, SD15_VAE, SDXL_TEXT_1, SDXL_TEXT_2, SDXL_UNET, SDXL_VAE
from safetensors.torch import load_file, save_file
from single_files import PREFIXES, narrow_base, place_of, write_single_file
from torch.utils._python_dispatch import TorchDispatchMode

from sushi_research.caches import encoding
from sushi_research.errors import UserError
from sushi_research.fingerprints import FileMemo
from sushi_research.models import diffusers_folder, loading, sd15, sdxl, single_file
from sushi_research.models.components import model_class

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
MODELS = {"sd15": sd15, "sdxl": sdxl}
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
}
UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT = {"sd15": "cond_stage_model.transformer.text_model.", "sdxl": "conditioner.embedders.0.transformer.text_model."}
OPEN = "conditioner.embedders.1.model."


def hole(*shape, dtype=torch.float16):
    return torch.empty(shape, dtype=dtype, device="meta")


def lay_out(file, tensors, metadata=None):
    """Writes a .safetensors file with its tensors in their order; one on the meta device is a hole that takes no room."""
    entries, end = {"__metadata__": metadata or {}}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    with open(file, "wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors.values():
            if tensor.is_meta:
                stream.seek(tensor.nbytes, os.SEEK_CUR)
            else:
                stream.write(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        stream.truncate()
    return file


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A narrow base in diffusers format, by architecture, dtype of its weights and seed."""
    root = tmp_path_factory.mktemp("folders")

    @functools.cache
    def make(architecture, dtype=torch.float16, seed=0):
        folder = narrow_base(root / f"{architecture} {dtype} {seed}", architecture, seed=seed)
        for file in folder.glob("*/*.safetensors"):
            save_file({name: value.to(dtype) for name, value in load_file(file).items()}, file, {"format": "pt"})
        return folder

    return make


@pytest.fixture
def folder(folder_of, architecture):
    return folder_of(architecture)


@pytest.fixture(scope="module")
def tensors_of(folder_of, tmp_path_factory):
    """The tensors of that base's single file, in fp16."""
    file = tmp_path_factory.mktemp("tensors") / "base.safetensors"

    @functools.cache
    def read(architecture, seed=0):
        return load_file(write_single_file(folder_of(architecture, seed=seed), file, architecture))

    return read


@pytest.fixture
def written(tmp_path):
    """Writes files that the test leaves behind it no longer."""
    files = []

    def write(tensors, name="base.safetensors", metadata=None):
        files.append(tmp_path / name)
        return lay_out(files[-1], tensors, metadata)

    yield write
    for file in files:
        file.unlink(missing_ok=True)


@pytest.fixture
def edited(written, tensors_of, folder_of):
    """The base of a single file with tensors added, replaced or (None) removed; its weights are holes."""

    def resolve(architecture, changes, **options):
        tensors = {name: tensor.to("meta") for name, tensor in tensors_of(architecture).items()} | changes
        file = written({name: tensor for name, tensor in tensors.items() if tensor is not None})
        return resolved(file, folder_of(architecture), **options)

    return resolve


def resolved(file, folder, **options):
    return loading.resolve_base(str(file), **{"tokenizers": str(folder)} | options)


def load(base, name, dtype=torch.float32):
    if name.startswith("text_encoder"):
        return loading.load_text_encoder(base, name, CPU, dtype)[1]
    return (loading.load_unet if name == "unet" else loading.load_vae)(base, dtype, CPU)


def assert_same(ours, theirs):
    mine, yours = ({**model.state_dict(), **dict(model.named_buffers())} for model in (ours, theirs))
    assert list(mine) == list(yours)
    for name, value in yours.items():
        assert mine[name].dtype == value.dtype and mine[name].device == value.device, name
        assert torch.equal(mine[name], value), name
    assert not any(module.training for module in ours.modules())
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def assert_all_same(ours, theirs, dtype=torch.float32):
    assert ours.parts.keys() == theirs.parts.keys() == {"unet", "vae", *MODELS[ours.architecture].TEXT_ENCODERS}
    for name in ours.parts:
        assert_same(load(ours, name, dtype), load(theirs, name, dtype))


def refusal(call, *arguments, **options):
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1000 and message.endswith(".")
    return message


# --- What is loaded ---


@pytest.mark.parametrize(
    ("stored", "used"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float16),
    ],
)
def test_every_component_equals_the_folder_s(architecture, stored, used, folder_of, tmp_path):
    folder = folder_of(architecture, stored)
    file = write_single_file(folder, tmp_path / "base.safetensors", architecture, dtype=stored)
    ours, theirs = resolved(file, folder), loading.resolve_base(str(folder))
    assert (ours.architecture, ours.prediction) == (architecture, theirs.prediction)
    assert_all_same(ours, theirs, used)
    file.unlink()


def test_forward_passes_equal_the_folder_s(architecture, folder, tensors_of, written):
    model, results = MODELS[architecture], []
    generator = torch.Generator().manual_seed(0)
    noisy, picture = torch.randn(2, 4, 8, 8, generator=generator), np.arange(64 * 64 * 3).reshape(64, 64, 3) % 251
    sizes = [torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)] if architecture == "sdxl" else []
    for base in (resolved(written(tensors_of(architecture)), folder), loading.resolve_base(str(folder))):
        text, _ = model.encode_caption(model.load_text(base, CPU), "A cat!")
        unet, vae = load(base, "unet"), load(base, "vae")
        both = {name: tensor[None].repeat(2, *[1] * tensor.ndim) for name, tensor in text.items()}
        with torch.no_grad():
            predicted = model.predict(unet, noisy, torch.tensor([3, 980]), both, *sizes)
            drawn = vae.decode(noisy).sample
        results.append([*text.values(), predicted, drawn, *encoding.encode_image(vae, picture.astype(np.uint8))])
    assert len(results[0]) == len(text) + 4 and all(result.isfinite().all() for result in results[0])
    assert all(map(torch.equal, *results))


def renamed(pattern, replacement):
    return lambda tensors: {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}


def edit(pattern, change):
    return lambda tensors: {
        name: change(tensor).contiguous() if re.fullmatch(pattern, name) else tensor for name, tensor in tensors.items()
    }


def linear_projection(tensors):
    return renamed("text_projection$", "text_projection.weight")(edit(".*text_projection", torch.t)(tensors))


BARE = renamed("^model.diffusion_model.", "")
LAYOUTS = {
    "a bare UNet": (BARE, ("sd15", "sdxl")),
    "another prefix of the UNet": (renamed("^model.diffusion", "diffusion"), ("sd15", "sdxl")),
    "no text_model": (renamed(r"transformer\.text_model\.", "transformer."), ("sd15", "sdxl")),
    "a linear projection": (linear_projection, ("sdxl",)),
    "linear attention": (edit(r".*attn_1\.(q|k|v|proj_out)\.weight", lambda value: value.flatten(1)), ("sd15", "sdxl")),
    "wrong position_ids": (edit(".*position_ids", lambda value: value.half() + 0.1), ("sd15", "sdxl")),
    "everything": (lambda tensors: BARE(linear_projection(dict(reversed(tensors.items())))), ("sdxl",)),
}


@pytest.mark.parametrize(
    ("layout", "architecture"), [(layout, name) for layout, (_, names) in LAYOUTS.items() for name in names]
)
def test_other_layouts_of_the_same_weights(layout, architecture, tensors_of, folder_of, written):
    change, folder, tensors = LAYOUTS[layout][0], folder_of(architecture), tensors_of(architecture)
    changed = change(tensors)
    assert any(name not in tensors or tensors[name] is not tensor for name, tensor in changed.items())
    assert_all_same(resolved(written(changed), folder), loading.resolve_base(str(folder)))


def test_mixed_dtypes_in_one_file(architecture, tensors_of, folder, written):
    dtypes = [torch.float64, torch.float16, torch.bfloat16, torch.float32]
    tensors = {name: tensor for name, tensor in tensors_of(architecture).items() if tensor.dtype == torch.float16}
    mixed = {name: tensor.to(dtypes[i % 4]) for i, (name, tensor) in enumerate(tensors.items())}
    ours = resolved(written(mixed, "mixed.safetensors"), folder)
    theirs = resolved(written({name: tensor.float() for name, tensor in mixed.items()}), folder)
    assert_all_same(ours, theirs)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_unet_alone_with_the_rest_from_a_folder(architecture, prefix, tensors_of, folder, written):
    unet = {name.replace(UNET, prefix): value for name, value in tensors_of(architecture).items() if UNET in name}
    base = loading.resolve_base(str(written(unet)), vae=str(folder), text_encoders=str(folder))
    assert base.vae_source == str(folder) and not base.ignored
    assert_all_same(base, loading.resolve_base(str(folder)))


def test_weights_stand_in_memory_of_their_own(architecture, tensors_of, folder, written):
    file = written(tensors_of(architecture))
    vae = load(resolved(file, folder), "vae", torch.float16)
    with open(file, "r+b") as stream:
        stream.write(bytes(file.stat().st_size))
    assert_same(vae, load(loading.resolve_base(str(folder)), "vae", torch.float16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder"])
def test_weights_begin_where_torch_s_own_do_wherever_they_lie_in_the_file(name, dtype, folder_of, tmp_path):
    """A matrix product on a CPU may round otherwise elsewhere, and one base would train two adapters."""
    stored = folder_of("sd15", dtype=dtype) / name
    copy = shutil.copytree(stored, tmp_path / name)
    (file,) = copy.glob("*.safetensors")
    lies_elsewhere = []
    for pad in ("", "8 bytes "):
        save_file(load_file(file), file, {"format": "pt", "pad": pad})
        begin = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        lies_elsewhere.append(begin % 64 != 0)
        model = diffusers_folder.FolderPart(name, copy, None).load(dtype, CPU)
        assert all(parameter.data_ptr() % 64 == 0 for parameter in model.parameters())
    assert any(lies_elsewhere)


def test_parameters_and_buffers_come_to_the_device(architecture, tensors_of, folder, written, monkeypatch):
    # The only other device of a machine without a GPU has no numbers to look at.
    monkeypatch.setattr(single_file, "require_finite", lambda *arguments: None)
    for name, part in resolved(written(tensors_of(architecture)), folder).parts.items():
        model = part.load(torch.bfloat16, torch.device("meta"))
        assert not [key for key, value in [*model.named_parameters(), *model.named_buffers()] if not value.is_meta], (
            name
        )


def anonymous() -> int:
    """Bytes of this process's memory that are not pages of a file."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


class Watch(TorchDispatchMode):
    """The most anonymous memory after any operation on tensors."""

    peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.peak = max(self.peak, anonymous())
        return result


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_the_memory_of_the_weights_once(folder_of, written):
    # The VAE at its published size, 335 MB in fp32: who reads the file in whole holds three times the weights in bf16, who
    # copies them twice. Measured: 1.2 to 1.3 times, with what the allocator keeps.
    sizes = published("sdxl", only="vae")
    file = written({name: tensor.to(torch.float32) for name, tensor in sizes.items()})
    base = loading.resolve_base(str(folder_of("sdxl")), vae=str(file))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = anonymous()
    with Watch() as watch:
        vae = load(base, "vae", torch.bfloat16)
    weights = sum(parameter.nbytes for parameter in vae.parameters())
    assert weights == sum(tensor.nbytes for tensor in sizes.values()) > 160e6
    assert 0.9 * weights < watch.peak - before < 1.6 * weights


# --- The published models, by their headers ---

REAL = {
    "sd15": {"unet": SD15_UNET, "vae": SD15_VAE, "text_encoder": SD15_TEXT},
    "sdxl": {"unet": SDXL_UNET, "vae": SDXL_VAE, "text_encoder": SDXL_TEXT_1, "text_encoder_2": SDXL_TEXT_2},
}


@functools.cache
def real_model(architecture, component):
    kind, config = model_class(component), REAL[architecture][component]
    with torch.device("meta"):
        return kind(kind.config_class(**config)) if "text" in component else kind.from_config(config)


def published(architecture, only=None):
    """The tensors of the published file, as holes."""
    tensors = {}
    for component, prefix in {"unet": UNET, **PREFIXES[architecture]}.items():
        place_at = place_of(component, REAL[architecture][component])
        for path, parameter in real_model(architecture, component).named_parameters():
            place, shape = place_at(path), list(parameter.shape)
            shape[0] *= 1 if place.third is None else 3
            shape += [1, 1] if ".mid.attn_1." in place.name and len(shape) == 2 else []
            if only in (None, component):
                tensors[prefix + place.name] = hole(*(shape[::-1] if place.transposed else shape))
    return tensors


@pytest.mark.parametrize(("architecture", "count"), [("sd15", 1131), ("sdxl", 2515)])
def test_the_published_files_in_full_size(architecture, count, folder_of, written):
    beside = {f"{TEXT[architecture]}embeddings.position_ids": hole(1, 77, dtype=torch.int64)}
    beside |= {f"{OPEN}logit_scale": hole(dtype=torch.float32)} if architecture == "sdxl" else {}
    tensors = published(architecture) | beside
    assert len(tensors) == count
    base = resolved(written(tensors), folder_of(architecture))
    assert base.ignored.keys() == beside.keys() and all(base.ignored.values())
    for name, part in base.parts.items():
        real, kind = real_model(architecture, name), model_class(name)
        assert list(part.places) == [path for path, _ in real.named_parameters()]
        if "text" in name:
            assert kind.config_class(**part.config).to_dict() == real.config.to_dict()
        else:
            with torch.device("meta"):
                config = kind.from_config(part.config).config
            # The published SDXL UNet says null, which is false to diffusers.
            wanted = real.config | ({"upcast_attention": False} if name == "unet" else {})
            assert {key: config[key] for key in config if key[0] != "_"} == {
                key: wanted[key] for key in wanted if key[0] != "_"
            }


# --- Keys and values that do not belong ---


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


@pytest.mark.parametrize(
    ("architecture", "key"), [(name, key) for name, keys in UNKNOWN.items() for key in expand(keys)]
)
def test_a_key_of_no_component_is_named(architecture, key, edited):
    message = refusal(edited, architecture, {key: hole(128, 128)})
    # OpenCLIP's projection twice: whichever of the two is not used.
    assert repr(key) in message or repr(key.removesuffix(".weight")) in message and "_projection" in key
    assert " more" not in message


def test_several_keys_of_no_component_are_counted(edited):
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


@pytest.mark.parametrize(("architecture", "key"), MISSING)
@pytest.mark.parametrize("kind", ["missing", "misshapen", "fp8", "integers"])
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


WHERE = [
    ("sd15", "unet", f"{UNET}middle_block.1.proj_in.weight", "mid_block.attentions.0.proj_in.weight"),
    ("sd15", "vae", f"{VAE}decoder.up.0.block.0.norm1.bias", "decoder.up_blocks.3.resnets.0.norm1.bias"),
    ("sd15", "text_encoder", f"{TEXT['sd15']}final_layer_norm.bias", "final_layer_norm.bias"),
    ("sdxl", "text_encoder_2", f"{OPEN}transformer.resblocks.3.attn.in_proj_bias", "layers.3.self_attn.v_proj.bias"),
]


@pytest.mark.parametrize(("architecture", "name", "key", "path"), WHERE)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
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


# --- Hashes ---


@pytest.fixture
def hashes(tmp_path):
    memo = FileMemo(tmp_path / "files.json")
    return lambda base, memo=memo: {name: base.hash(name, memo) for name in base.parts}


def test_a_hash_is_of_a_component_s_tensors_wherever_they_lie(architecture, tensors_of, folder, written, hashes):
    tensors = tensors_of(architecture)
    found = hashes(resolved(written(tensors, "first.safetensors"), folder))
    assert len(set(found.values())) == len(found)
    moved = BARE(dict(reversed(tensors.items())) | {"betas": torch.zeros(5)})
    assert hashes(resolved(written(moved, metadata={"modelspec.title": "moved"}), folder)) == found
    alone = written({name: value for name, value in tensors.items() if VAE not in name}, "alone.safetensors")
    vae = written({name.removeprefix(VAE): value for name, value in tensors.items() if VAE in name}, "vae.safetensors")
    assert hashes(resolved(alone, folder, vae=str(vae))) == found


def test_a_hash_changes_with_its_component(architecture, tensors_of, folder, tmp_path, written, hashes):
    tensors = tensors_of(architecture)
    before = hashes(resolved(written(tensors, "before.safetensors"), folder))
    unet = [f"{UNET}input_blocks.1.0.{end}" for end in ("in_layers.0.bias", "in_layers.0.weight")]
    changes = {
        "unet": dict(zip(unet, (tensors[name] for name in reversed(unet)), strict=True)),
        "vae": {f"{VAE}quant_conv.bias": tensors[f"{VAE}quant_conv.bias"] + 1},
        "text_encoder": {(name := f"{TEXT[architecture]}final_layer_norm.bias"): tensors[name].float()},
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
    assert {name for name in before if after[name] != same[name]} == set(MODELS[architecture].TEXT_ENCODERS)


def test_a_file_that_is_in_the_memo_is_not_read_again(tensors_of, folder_of, tmp_path, written, hashes):
    file, folder = written(tensors_of("sd15")), folder_of("sd15")
    os.utime(file, (1, 1))
    before = hashes(resolved(file, folder))
    with open(file, "r+b") as stream:
        stream.seek(-1000, os.SEEK_END)
        stream.write(bytes(1000))
    os.utime(file, (1, 1))
    assert hashes(resolved(file, folder)) == before
    assert hashes(resolved(file, folder), FileMemo(tmp_path / "none.json")) != before


# --- A VAE and text encoders from elsewhere ---


def assert_from(base, folder, other, names):
    """That the components `names` are those of the folder `other`, and the rest those of `folder`."""
    own, others = (loading.resolve_base(str(each)) for each in (folder, other))
    for name in own.parts:
        assert_same(load(base, name), load(others if name in names else own, name))


@pytest.mark.parametrize("prefix", ["", VAE, None])
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


@pytest.mark.parametrize("kind", ["file", "folder"])
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
