"""Base files in tests: writing single files tensor by tensor, resolving, loading and comparing bases."""

import functools
import json
import os
from pathlib import Path

import pytest
import torch
from single_files import PREFIXES, place_of
from torch import Tensor, nn

from sushi_research.errors import UserError
from sushi_research.models import loading, sd15, sdxl
from sushi_research.models.components import model_class
from testing.real_configs import SD15_TEXT, SD15_UNET, SD15_VAE, SDXL_TEXT_1, SDXL_TEXT_2, SDXL_UNET, SDXL_VAE

CPU = torch.device("cpu")
MODELS = {"sd15": sd15, "sdxl": sdxl}
# The components' configs at their published sizes.
REAL = {
    "sd15": {"unet": SD15_UNET, "vae": SD15_VAE, "text_encoder": SD15_TEXT},
    "sdxl": {"unet": SDXL_UNET, "vae": SDXL_VAE, "text_encoder": SDXL_TEXT_1, "text_encoder_2": SDXL_TEXT_2},
}
# safetensors' names of dtypes.
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
}
# Prefixes of the components in a single file.
UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT = {"sd15": "cond_stage_model.transformer.text_model.", "sdxl": "conditioner.embedders.0.transformer.text_model."}
OPEN = "conditioner.embedders.1.model."


def hole(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """A tensor without values; `lay_out` leaves a hole in the file for it."""
    return torch.empty(shape, dtype=dtype, device="meta")


def lay_out(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
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


def resolved(file: Path, folder: Path, **options: str):
    """The base in `file`, with the tokenizers of `folder`."""
    return loading.resolve_base(str(file), **{"tokenizers": str(folder)} | options)


def load(base, name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A component of a base, on the CPU."""
    if name.startswith("text_encoder"):
        return loading.load_text_encoder(base, name, CPU, dtype)[1]
    return (loading.load_unet if name == "unet" else loading.load_vae)(base, dtype, CPU)


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    """That two models have equal parameters and buffers, and are frozen and in evaluation mode."""
    mine, yours = ({**model.state_dict(), **dict(model.named_buffers())} for model in (ours, theirs))
    assert list(mine) == list(yours)
    for name, value in yours.items():
        assert mine[name].dtype == value.dtype and mine[name].device == value.device, name
        assert torch.equal(mine[name], value), name
    assert not any(module.training for module in ours.modules())
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def assert_all_same(ours, theirs, dtype: torch.dtype = torch.float32) -> None:
    """That two bases have the same components with equal weights."""
    assert ours.parts.keys() == theirs.parts.keys() == {"unet", "vae", *MODELS[ours.architecture].TEXT_ENCODERS}
    for name in ours.parts:
        assert_same(load(ours, name, dtype), load(theirs, name, dtype))


def refusal(call, *arguments, **options) -> str:
    """The sentence in which `call` refuses."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1000 and message.endswith(".")
    return message


@functools.cache
def real_model(architecture: str, component: str) -> nn.Module:
    """A component at its published size, without memory for its weights."""
    kind, config = model_class(component), REAL[architecture][component]
    with torch.device("meta"):
        return kind(kind.config_class(**config)) if "text" in component else kind.from_config(config)


def original_tensors(architecture: str, component: str) -> dict[str, Tensor]:
    """A published component's tensors as holes, by the names and shapes of the single file, without its prefix."""
    place_at, tensors = place_of(component, REAL[architecture][component]), {}
    for path, parameter in real_model(architecture, component).named_parameters():
        place, shape = place_at(path), list(parameter.shape)
        shape[0] *= 1 if place.third is None else 3
        shape += [1, 1] if ".mid.attn_1." in place.name and len(shape) == 2 else []
        tensors[place.name] = hole(*(shape[::-1] if place.transposed else shape))
    return tensors


def published(architecture: str) -> dict[str, Tensor]:
    """The tensors of the published file, as holes."""
    prefixes = {"unet": UNET, **PREFIXES[architecture]}
    return {
        prefix + name: tensor
        for component, prefix in prefixes.items()
        for name, tensor in original_tensors(architecture, component).items()
    }
