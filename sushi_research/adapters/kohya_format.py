"""Writes and verifies adapter files in kohya's layout, which diffusers, ComfyUI, A1111, Forge and InvokeAI load completely.

Per module: `<name>.lora_down.weight` [rank, in] or [rank, in, k, k], `<name>.lora_up.weight` [out, rank] or
[out, rank, 1, 1], and `<name>.alpha`, a scalar (readers scale by alpha / rank, or by 1 if it is missing). As in kohya's
sd-scripts, SD1.5 modules are named after diffusers' blocks and SDXL modules after the blocks of Stability's code
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
from typing import TYPE_CHECKING

import torch
from torch import nn

from sushi_research.adapters.lora import ADAPTER, adapter_modules
from sushi_research.errors import UserError
from sushi_research.files import disk_error, write_atomic
from sushi_research.models import ARCHITECTURES
from sushi_research.models.header import read_header
from sushi_research.models.original_names import unet_name
from sushi_research.user_files import read_regular, readable

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

PREFIX = "lora_unet_"
DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"


class AdapterFileError(RuntimeError):
    """A written adapter file does not load as the trained adapter."""


def kohya_unet_names(architecture: str, module_paths: Iterable[str], layers_per_block: int = 2) -> dict[str, str]:
    """Module path (as in lora.py) -> its name in an adapter file for `architecture`; one to one.

    `layers_per_block` is the UNet config's, because Stability numbers blocks by layers. The published SDXL has two; diffusers
    also reads files for UNets with one.
    """
    # diffusers' `_maybe_map_sgm_blocks_to_diffusers` is the inverse of Stability's names.
    stability = functools.partial(unet_name, layers_per_block=layers_per_block)
    rename = stability if ARCHITECTURES[architecture].formats().STABILITY_NAMES else str
    names = {path: PREFIX + rename(path).replace(".", "_") for path in module_paths}
    assert len(set(names.values())) == len(names), "two modules have one name in the adapter file"
    return names


def save_adapter(
    path: Path,
    unet: nn.Module,
    *,
    architecture: str,
    state: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    metadata: Mapping[str, str] | None,
) -> None:
    """Writes the adapter of `unet` with the tensors of `state` (fp32, named as in lora.py), cast to `dtype`.

    Equal arguments give equal bytes. The file is written atomically. Two hashes of the tensors' bytes are added to the
    metadata: `sshs_model_hash`, as A1111 computes it, and `modelspec.hash_sha256`; with None the file has no metadata at all.
    UserError if a value overflows in `dtype` or the file cannot be written.
    """
    assert all(isinstance(value, str) for value in (metadata or {}).values()), "safetensors metadata holds strings only"
    data = _serialized(unet, architecture, state, dtype)
    body = _body(data)
    if metadata is not None:
        digest = hashlib.sha256(body).hexdigest()
        metadata = {**metadata, "sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"}
    write_atomic(path, _header(data, metadata or {}) + body)


def holds(
    path: Path, unet: nn.Module, *, architecture: str, state: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> bool:
    """Whether there is a whole file at `path` with the tensors that `save_adapter` would write; its metadata may be others."""
    try:
        read_header(path)
        data = _serialized(unet, architecture, state, dtype)
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
    path: Path, unet: nn.Module, *, architecture: str, state: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> None:
    """Reloads a file written by `save_adapter` as diffusers' pipelines do, and compares it with the trained adapter.

    It needs no base weights and takes about 1.5 s for SDXL. AdapterFileError names the first difference: an unexpected or
    missing key, a module that diffusers drops or adds, a matrix that is not bit for bit the trained one cast to `dtype`, or a
    wrong scale. diffusers itself reports none of these. Where modules differ in rank or alpha (`is_uniform`) diffusers' reader
    takes wrong scales; other programs read each module's own alpha, so there the alphas in the file are compared.
    """
    from diffusers import loaders
    from safetensors import SafetensorError, safe_open

    trained = adapter_modules(unet)
    names = kohya_unet_names(architecture, trained, unet.config.layers_per_block)
    try:
        with safe_open(path, "pt") as file:
            keys = list(file.keys())
            alphas = {key: file.get_tensor(key).item() for key in keys if key.endswith(ALPHA)}
    except OSError as error:
        raise disk_error(f"cannot read back {path}", error) from error
    except SafetensorError as error:
        raise AdapterFileError(f"{path} cannot be read back ({error})") from None
    _require_same(path, "the key", keys, [name + suffix for name in names.values() for suffix in (DOWN, UP, ALPHA)])
    # As in the pipelines' load_lora_weights: only SDXL's passes the UNet's config, which enables the renaming of blocks.
    formats = ARCHITECTURES[architecture].formats()
    loader = getattr(loaders, formats.ADAPTER_LOADER)
    config = {"unet_config": unet.config} if formats.STABILITY_NAMES else {}
    tensors, network_alphas = loader.lora_state_dict(str(path), use_safetensors=True, local_files_only=True, **config)
    bare = _weightless_unet(unet.to_json_string(), dtype)
    assert not adapter_modules(bare), "the UNet of an earlier file still has its adapter"
    try:
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # of peft, about those scales
            loader.load_lora_into_unet(
                tensors, network_alphas=network_alphas, unet=bare, adapter_name=ADAPTER, low_cpu_mem_usage=True
            )
        _require_equal(path, adapter_modules(bare), trained, state, dtype)
        bare.unload_lora()
    except BaseException:
        _weightless_unet.cache_clear()  # what is left in it must not count for the next file
        raise
    if not is_uniform((layer.r[ADAPTER], layer.lora_alpha[ADAPTER]) for layer in trained.values()):
        for module_path, layer in trained.items():
            alpha = torch.tensor(float(layer.lora_alpha[ADAPTER])).item()
            if alphas[names[module_path] + ALPHA] != alpha:
                raise AdapterFileError(f"{path}: the alpha of {module_path} is not {alpha}")


def is_uniform(settings: Iterable[tuple[int, float]]) -> bool:
    """Whether all modules of an adapter have one rank and one alpha."""
    return len(set(settings)) == 1


def _require_equal(
    path: Path,
    loaded: Mapping[str, LoraLayer],
    trained: Mapping[str, LoraLayer],
    state: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
) -> None:
    """AdapterFileError unless the loaded layers are the trained ones, with the tensors of `state` cast to `dtype`."""
    _require_same(path, "the module", loaded, trained)
    uniform = is_uniform((layer.r[ADAPTER], layer.lora_alpha[ADAPTER]) for layer in trained.values())
    for module_path, layer in loaded.items():
        for matrix, module in (("lora_A", layer.lora_A[ADAPTER]), ("lora_B", layer.lora_B[ADAPTER])):
            expected = state[f"{module_path}.{matrix}.weight"].detach().to("cpu", dtype)
            if module.weight.dtype != dtype or not torch.equal(module.weight, expected):
                raise AdapterFileError(f"{path}: {matrix} of {module_path} differs from the trained matrix")
        rank = trained[module_path].r[ADAPTER]
        scale = torch.tensor(float(trained[module_path].lora_alpha[ADAPTER])).item() / rank
        if uniform and layer.scaling[ADAPTER] != scale:
            raise AdapterFileError(f"{path}: the scale of {module_path} is {layer.scaling[ADAPTER]}, not {scale}")


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


def _serialized(unet: nn.Module, architecture: str, state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> bytes:
    """The file without metadata."""
    import safetensors.torch

    modules = adapter_modules(unet)
    names = kohya_unet_names(architecture, modules, unet.config.layers_per_block)
    assert len(state) == 2 * len(names), "the state does not belong to this adapter"
    tensors = {}
    for module_path, name in names.items():
        tensors[name + DOWN] = _cast(state, f"{module_path}.lora_A.weight", dtype)
        tensors[name + UP] = _cast(state, f"{module_path}.lora_B.weight", dtype)
        # Always fp32: readers use it as a number, and the scale should be exact.
        tensors[name + ALPHA] = torch.tensor(float(modules[module_path].lora_alpha[ADAPTER]))
    return safetensors.torch.save(tensors)


def _cast(state: Mapping[str, torch.Tensor], name: str, dtype: torch.dtype) -> torch.Tensor:
    """The tensor on the CPU in `dtype`; UserError if a value overflows (fp16's maximum is 65,504)."""
    tensor = state[name].detach().to("cpu", dtype).contiguous()
    if not torch.isfinite(tensor).all():
        raise UserError(
            f"the adapter's {name} has values that {str(dtype).removeprefix('torch.')} cannot hold: check whether the loss "
            "diverged, which is most likely, or set lora.save_dtype to float32."
        )
    return tensor


def _body(data: bytes) -> bytes:
    """Serialised safetensors without the header."""
    return data[8 + int.from_bytes(data[:8], "little") :]


def _header(data: bytes, metadata: Mapping[str, str]) -> bytes:
    """The header of serialised safetensors with this metadata, in sorted order; the library's own order is random."""
    entries = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    entries.pop("__metadata__", None)
    if metadata:
        entries = {"__metadata__": dict(sorted(metadata.items()))} | entries
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text
