"""Writes and verifies the files of trained adapters in kohya's layout (formats/writing.py).

It is the layout that diffusers, ComfyUI, A1111, Forge and InvokeAI load completely, as far as they have the kind at all. As in
kohya's sd-scripts, SD1.5 modules are named after diffusers' blocks and SDXL modules after the blocks of Stability's code
(`input_blocks.4.1`). With any other naming, some of those programs fail or silently drop modules.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sushi_research.adapters.formats import writing
from sushi_research.adapters.formats.writing import header_bytes, tensors_of
from sushi_research.adapters.lora import ADAPTER, adapter_modules, adapter_parameters, trained_entries
from sushi_research.errors import UserError
from sushi_research.files import disk_error, write_atomic
from sushi_research.models import ARCHITECTURES
from sushi_research.models.header import read_header
from sushi_research.user_files import read_regular, readable

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"


class AdapterFileError(RuntimeError):
    """A written adapter file does not load as the trained adapter."""


def kohya_unet_names(architecture: str, module_paths: Iterable[str], layers_per_block: int = 2) -> dict[str, str]:
    """Path in the UNet -> the module's name in an adapter file for `architecture`; one to one."""
    return writing.names_of(architecture, "unet", list(module_paths), "kohya", layers_per_block)


def save_adapter(
    path: Path,
    components: Mapping[str, nn.Module],
    *,
    architecture: str,
    state: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    metadata: Mapping[str, str] | None,
) -> None:
    """Writes the adapters of the components with the tensors of `state` (fp32, named as in tensor_names.py), cast to `dtype`.

    Equal arguments give equal bytes. The file is written atomically. Two hashes of the tensors' bytes are added to the
    metadata: `sshs_model_hash`, as A1111 computes it, and `modelspec.hash_sha256`; with None the file has no metadata at all.
    UserError if a value overflows in `dtype` or the file cannot be written.
    """
    assert all(isinstance(value, str) for value in (metadata or {}).values()), "safetensors metadata holds strings only"
    data = _serialized(components, architecture, state, dtype)
    body = _body(data)
    if metadata is not None:
        digest = hashlib.sha256(body).hexdigest()
        metadata = {**metadata, "sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"}
    write_atomic(path, _header(data, metadata or {}) + body)


def holds(
    path: Path,
    components: Mapping[str, nn.Module],
    *,
    architecture: str,
    state: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
) -> bool:
    """Whether there is a whole file at `path` with the tensors that `save_adapter` would write; its metadata may be others."""
    try:
        read_header(path)
        data = _serialized(components, architecture, state, dtype)
        return tensors_hash(path) == hashlib.sha256(_body(data)).hexdigest()
    except UserError:
        return False


def add_metadata(path: Path, entries: Mapping[str, str]) -> None:
    """Adds entries to the metadata of a file that `save_adapter` wrote; its tensors stay as they are, which is checked at the end.

    UserError if it cannot be read or written, or is damaged.
    """
    metadata = read_header(path).metadata
    if entries.items() <= metadata.items():
        return
    data = read_regular(path, sys.maxsize)
    write_atomic(path, _header(data, {**metadata, **entries}) + _body(data))
    require_whole(path)


def require_whole(path: Path) -> None:
    """UserError unless an adapter file has the tensors' bytes that `save_adapter` wrote, by the hash in its metadata.

    Other programs may edit the metadata. If they removed the hash, only the header is checked.
    """
    try:
        header = read_header(path)
    except UserError:
        header = None
    if header is None or not header.tensors:
        raise UserError(f"{path} is damaged")
    expected = header.metadata.get("sshs_model_hash")
    if expected is not None and tensors_hash(path) != expected:
        raise UserError(f"{path} is damaged (its tensors are not those that were written)")


def tensors_hash(path: Path) -> str:
    """SHA-256 of a safetensors file without its header, as kohya's sd-scripts and A1111 compute it (`sshs_model_hash`).

    UserError if the file cannot be read.
    """
    with readable(), open(path, "rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        return hashlib.file_digest(file, "sha256").hexdigest()


def problem_of(path: Path) -> str | None:
    """What is wrong with an adapter file that `save_adapter` wrote, as a sentence; None if it is whole."""
    if not os.path.lexists(path):
        return f"{path} is missing"
    try:
        require_whole(path)
    except UserError as error:
        return str(error)
    return None


def verify_saved(
    path: Path,
    components: Mapping[str, nn.Module],
    *,
    architecture: str,
    state: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
) -> None:
    """Reloads a file written by `save_adapter` and compares it with the trained adapter.

    The UNet's pairs are loaded as diffusers' pipelines do, which needs no base weights and takes about 1.5 s for SDXL.
    AdapterFileError names the first difference: an unexpected or missing key, a module that diffusers drops or adds, a matrix that
    is not bit for bit the trained one cast to `dtype`, or a wrong scale. diffusers itself reports none of these.
    """
    from diffusers import loaders
    from safetensors import SafetensorError, safe_open

    expected = file_tensors(components, architecture, state, dtype)
    try:
        with safe_open(path, "pt") as file:
            keys = list(file.keys())
    except OSError as error:
        raise disk_error(f"cannot read back {path}", error) from error
    except SafetensorError as error:
        raise AdapterFileError(f"{path} cannot be read back ({error})") from None
    _require_same(path, "the key", keys, expected)
    unet = components["unet"]
    # As in the pipelines' load_lora_weights: only SDXL's passes the UNet's config, which enables the renaming of blocks.
    formats = ARCHITECTURES[architecture].formats()
    loader = getattr(loaders, formats.ADAPTER_LOADER)
    config = {"unet_config": unet.config} if formats.STABILITY_NAMES else {}
    tensors, network_alphas = loader.lora_state_dict(str(path), use_safetensors=True, local_files_only=True, **config)
    bare = _weightless_unet(unet.to_json_string(), dtype)
    assert not adapter_modules(bare), "the UNet of an earlier file still has its adapter"
    names = kohya_unet_names(architecture, adapter_modules(unet), layers_per_block(components))
    try:
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # of peft, about those scales
            loader.load_lora_into_unet(
                tensors, network_alphas=network_alphas, unet=bare, adapter_name=ADAPTER, low_cpu_mem_usage=True
            )
        _require_same(path, "the module", adapter_modules(bare), names)
        for module_path, layer in adapter_modules(bare).items():
            _require_equal(path, module_path, layer, names[module_path], expected)
        bare.unload_lora()
    except BaseException:
        _weightless_unet.cache_clear()  # what is left in it must not count for the next file
        raise


def is_uniform(settings: Iterable[tuple[int, float]]) -> bool:
    """Whether all modules of an adapter have one rank and one alpha."""
    return len(set(settings)) == 1


def _require_equal(
    path: Path, module_path: str, loaded: LoraLayer, name: str, expected: Mapping[str, torch.Tensor]
) -> None:
    """AdapterFileError unless the loaded layer has the `expected` tensors of the file, and the scale that they say."""
    for matrix, module, part in (("lora_A", loaded.lora_A[ADAPTER], DOWN), ("lora_B", loaded.lora_B[ADAPTER], UP)):
        if not torch.equal(module.weight, expected[name + part]) or module.weight.dtype != expected[name + part].dtype:
            raise AdapterFileError(f"{path}: {matrix} of {module_path} differs from the trained matrix")
    rank = len(expected[name + DOWN])
    scale = expected[name + ALPHA].item() / rank if name + ALPHA in expected else 1.0
    if loaded.scaling[ADAPTER] != scale:
        raise AdapterFileError(f"{path}: the scale of {module_path} is {loaded.scaling[ADAPTER]}, not {scale}")


@functools.lru_cache(maxsize=1)
def _weightless_unet(config: str, dtype: torch.dtype) -> nn.Module:
    """A UNet without memory for weights: every parameter is one CPU number expanded to the parameter's shape.

    `config` is JSON. The last one is kept for the next file, because building it takes half the time of verifying one.
    """
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads(config))
    # peft moves loaded matrices to the device and dtype of their layer. On the meta device they would lose their values, and
    # with another dtype they would be cast; hence real CPU numbers of the file's dtype.
    number = torch.zeros((), dtype=dtype)
    for module in unet.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(number.expand(parameter.shape), requires_grad=False))
    return unet


def _require_same(path: Path, what: str, found: Iterable[str], expected: Iterable[str]) -> None:
    extra, missing = set(found) - set(expected), set(expected) - set(found)
    if extra:
        raise AdapterFileError(f"{path}: {what} {min(extra)} should not be there")
    if missing:
        raise AdapterFileError(f"{path}: {what} {min(missing)} is missing")


def _serialized(
    components: Mapping[str, nn.Module], architecture: str, state: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> bytes:
    """The file without metadata."""
    import safetensors.torch

    return safetensors.torch.save(file_tensors(components, architecture, state, dtype))


def file_tensors(
    components: Mapping[str, nn.Module], architecture: str, state: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The tensors of the file by name; UserError if a value overflows (fp16's maximum is 65,504)."""
    assert len(state) == len(adapter_parameters(components)), "the state does not belong to these adapters"
    for name, tensor in state.items():
        if not torch.isfinite(tensor.detach().to(dtype)).all():
            raise UserError(
                f"the adapter's {name} has values that {str(dtype).removeprefix('torch.')} cannot hold: check whether the loss "
                "diverged, which is most likely, or set lora.save_dtype to float32."
            )
    return tensors_of(
        architecture,
        trained_entries(components, state),
        layout="kohya",
        dtype=dtype,
        layers_per_block=layers_per_block(components),
    )


def layers_per_block(components: Mapping[str, Any]) -> int:
    """That of the UNet's config, by which Stability numbers the blocks."""
    return components["unet"].config.layers_per_block


def _body(data: bytes) -> bytes:
    """Serialised safetensors without the header."""
    return data[8 + int.from_bytes(data[:8], "little") :]


def _header(data: bytes, metadata: Mapping[str, str]) -> bytes:
    """The header of serialised safetensors with this metadata, in sorted order; the library's own order is random."""
    return header_bytes(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]), metadata)
