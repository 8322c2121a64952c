"""A base in one .safetensors file: what is loaded from it is what the diffusers folder of the same weights gives."""

import ctypes
import gc
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from base_files import (
    CPU,
    MODELS,
    OPEN,
    TEXT,
    UNET,
    VAE,
    assert_all_same,
    assert_same,
    hole,
    load,
    original_tensors,
    published,
    real_model,
    resolved,
)
from safetensors.torch import load_file, save_file
from single_files import write_single_file
from torch.utils._python_dispatch import TorchDispatchMode

from sushi_research.caches import encoding
from sushi_research.models import diffusers_folder, loading, single_file
from sushi_research.models.components import model_class

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("architecture", "stored", "used"),
    [
        ("sd15", torch.float32, torch.float32),
        ("sdxl", torch.float32, torch.bfloat16),
        ("sdxl", torch.float16, torch.float16),
        ("sd15", torch.bfloat16, torch.float16),
    ],
    ids=["sd15-fp32-fp32", "sdxl-fp32-bf16", "sdxl-fp16-fp16", "sd15-bf16-fp16"],
)
def test_every_component_equals_the_folder_s(architecture, stored, used, folder_of, tmp_path):
    folder = folder_of(architecture, stored)
    file = write_single_file(folder, tmp_path / "base.safetensors", architecture, dtype=stored)
    ours, theirs = resolved(file, folder), loading.resolve_base(str(folder))
    assert (ours.architecture, ours.prediction) == (architecture, theirs.prediction)
    assert_all_same(ours, theirs, used)
    file.unlink()


def test_forward_passes_equal_the_folder_s(architecture, folder, file_of):
    model, results = MODELS[architecture], []
    generator = torch.Generator().manual_seed(0)
    noisy, picture = torch.randn(2, 4, 8, 8, generator=generator), np.arange(64 * 64 * 3).reshape(64, 64, 3) % 251
    sizes = [torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)] if architecture == "sdxl" else []
    for base in (resolved(file_of(architecture), folder), loading.resolve_base(str(folder))):
        text, _ = model.encode_caption(model.load_text(base, CPU), "A cat!")
        unet, vae = load(base, "unet"), load(base, "vae")
        both = {name: tensor[None].repeat(2, *[1] * tensor.ndim) for name, tensor in text.items()}
        with torch.no_grad():
            predicted = model.predict(unet, noisy, torch.tensor([3, 980]), both, *sizes, dtype=torch.float32)
            decoded = vae.decode(noisy).sample
        results.append(
            [*text.values(), predicted, decoded, *encoding.encode_images(vae, picture[None].astype(np.uint8))]
        )
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
NO_TEXT_MODEL = renamed(r"transformer\.text_model\.", "transformer.")
LINEAR_ATTENTION = edit(r".*attn_1\.(q|k|v|proj_out)\.weight", lambda value: value.flatten(1))
POSITION_IDS = edit(".*position_ids", lambda value: value.half() + 0.1)
# The UNet's and the VAE's names are the same in both architectures, the text encoders' are not.
LAYOUTS = {
    "sd15-UNet without prefix": [BARE],
    "sd15-no text_model, linear attention, wrong position_ids": [NO_TEXT_MODEL, LINEAR_ATTENTION, POSITION_IDS],
    "sdxl-another prefix, no text_model": [renamed("^model.diffusion", "diffusion"), NO_TEXT_MODEL],
    "sdxl-linear projection, another order": [BARE, linear_projection, lambda tensors: dict(reversed(tensors.items()))],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts_of_the_same_weights(layout, tensors_of, folder_of, written):
    architecture = layout[:4]
    changed, folder = tensors_of(architecture), folder_of(architecture)
    for change in LAYOUTS[layout]:
        before, changed = changed, change(changed)
        assert list(before) != list(changed) or any(before[name] is not changed[name] for name in changed)
    assert_all_same(resolved(written(changed), folder), loading.resolve_base(str(folder)))


def test_mixed_dtypes_in_one_file(tensors_of, folder_of, written):
    architecture, folder = "sdxl", folder_of("sdxl")
    dtypes = [torch.float64, torch.float16, torch.bfloat16, torch.float32]
    tensors = {name: tensor for name, tensor in tensors_of(architecture).items() if tensor.dtype == torch.float16}
    mixed = {name: tensor.to(dtypes[i % 4]) for i, (name, tensor) in enumerate(tensors.items())}
    ours = resolved(written(mixed, "mixed.safetensors"), folder)
    theirs = resolved(written({name: tensor.float() for name, tensor in mixed.items()}), folder)
    assert_all_same(ours, theirs)


@pytest.mark.parametrize(("architecture", "prefix"), [("sd15", ""), ("sdxl", "model.diffusion_model.")])
def test_a_unet_alone_with_the_rest_from_a_folder(architecture, prefix, tensors_of, folder, written):
    unet = {name.replace(UNET, prefix): value for name, value in tensors_of(architecture).items() if UNET in name}
    base = loading.resolve_base(str(written(unet)), vae=str(folder), text_encoders=str(folder))
    assert base.vae_source == str(folder) and not base.ignored
    assert_all_same(base, loading.resolve_base(str(folder)))


def test_weights_are_in_memory_of_their_own(tensors_of, folder_of, written):
    file, folder = written(tensors_of("sd15")), folder_of("sd15")
    vae = load(resolved(file, folder), "vae", torch.float16)
    with open(file, "r+b") as stream:
        stream.write(bytes(file.stat().st_size))
    assert_same(vae, load(loading.resolve_base(str(folder)), "vae", torch.float16))


# diffusers loads the one, transformers the other.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("unet", torch.float32), ("text_encoder", torch.float16)],
    ids=["unet-fp32", "text_encoder-fp16"],
)
def test_weights_begin_where_torch_s_own_do_wherever_they_are_in_the_file(name, dtype, folder_of, tmp_path):
    """A matrix product on a CPU may round otherwise elsewhere, and one base would train two adapters."""
    stored = folder_of("sd15", dtype=dtype) / name
    copy = shutil.copytree(stored, tmp_path / name)
    (file,) = copy.glob("*.safetensors")
    unaligned = []
    for pad in ("", "8 bytes "):
        save_file(load_file(file), file, {"format": "pt", "pad": pad})
        begin = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        unaligned.append(begin % 64 != 0)
        model = diffusers_folder.FolderPart(name, copy, None).load(dtype, CPU)
        assert all(parameter.data_ptr() % 64 == 0 for parameter in model.parameters())
    assert any(unaligned)


def test_parameters_and_buffers_come_to_the_device(file_of, folder_of, monkeypatch):
    # The only other device of a machine without a GPU has no numbers to look at.
    monkeypatch.setattr(single_file, "require_finite", lambda *arguments: None)
    for name, part in resolved(file_of("sdxl"), folder_of("sdxl")).parts.items():
        model = part.load(torch.bfloat16, torch.device("meta"))
        assert not [key for key, value in [*model.named_parameters(), *model.named_buffers()] if not value.is_meta], (
            name
        )


def anonymous() -> int:
    """Bytes of this process's memory that are not pages of a file."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


# A parameter of glibc's mallopt (malloc.h).
M_MMAP_THRESHOLD = -3


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
    sizes = original_tensors("sdxl", "vae")
    file = written({VAE + name: tensor.to(torch.float32) for name, tensor in sizes.items()})
    base = loading.resolve_base(str(folder_of("sdxl")), vae=str(file))
    gc.collect()
    libc = ctypes.CDLL(None)
    # After many tests glibc takes blocks of up to 32 MiB from its heap and keeps those that are freed. Now it maps each above 128
    # KiB and unmaps it at once, so that the peak is the same in every process.
    libc.mallopt(M_MMAP_THRESHOLD, 2**17)
    libc.malloc_trim(0)
    before = anonymous()
    try:
        with Watch() as watch:
            vae = load(base, "vae", torch.bfloat16)
    finally:
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # the most to which glibc itself raises it
    weights = sum(parameter.nbytes for parameter in vae.parameters())
    assert weights == sum(tensor.nbytes for tensor in sizes.values()) > 160e6
    assert 0.9 * weights < watch.peak - before < 1.6 * weights


# --- The published models, by their headers ---


@pytest.mark.parametrize(("architecture", "count"), [("sd15", 1131), ("sdxl", 2515)])
def test_the_published_files_in_full_size(architecture, count, folder_of, written):
    extra = {f"{TEXT[architecture]}embeddings.position_ids": hole(1, 77, dtype=torch.int64)}
    extra |= {f"{OPEN}logit_scale": hole(dtype=torch.float32)} if architecture == "sdxl" else {}
    tensors = published(architecture) | extra
    assert len(tensors) == count
    base = resolved(written(tensors), folder_of(architecture))
    assert base.ignored.keys() == extra.keys() and all(base.ignored.values())
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
