"""Writes the files of trained adapters in kohya's layout (formats/writing.py).

It is the layout that diffusers, ComfyUI, A1111, Forge and InvokeAI load completely, as far as they have the kind at all. As in
kohya's sd-scripts, SD1.5 modules are named after diffusers' blocks and SDXL modules after the blocks of Stability's code
(`input_blocks.4.1`). With any other naming, some of those programs fail or silently drop modules.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sushi_research.adapters import bundled
from sushi_research.adapters.entries import Entry, LowRank
from sushi_research.adapters.formats import writing
from sushi_research.adapters.formats.writing import header_bytes, tensors_of
from sushi_research.adapters.lora import Trained, adapter_parameters, trained_entries
from sushi_research.errors import UserError
from sushi_research.files import write_atomic
from sushi_research.models.header import read_header
from sushi_research.user_files import read_regular, readable


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
    """Writes the adapters of the components with the tensors of `state` (fp32, named as in tensor_names.py), cast to `dtype`;
    magnitudes of a DoRA stay fp32.

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


def is_uniform(settings: Iterable[tuple[int, float]]) -> bool:
    """Whether all modules of an adapter have one rank and one alpha."""
    return len(set(settings)) == 1


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
    entries, per_block = file_entries(components, state), layers_per_block(components)
    tensors = tensors_of(architecture, entries, layout="kohya", dtype=dtype, layers_per_block=per_block)
    return tensors | bundled.bundled_tensors(state, dtype)


def file_entries(components: Mapping[str, nn.Module], state: Mapping[str, torch.Tensor]) -> Trained:
    """What a file holds: `trained_entries`, with the scale of a DoRA within its second matrix, so that its alpha is its rank.

    A1111 before 1.10 applies alpha / rank after the norms, and other programs before them.
    """
    trained = trained_entries(components, state)
    return {name: {path: _with_scale_in_up(each) for path, each in found.items()} for name, found in trained.items()}


def _with_scale_in_up(entry: Entry) -> Entry:
    if not isinstance(entry, LowRank) or entry.magnitude is None:
        return entry
    return replace(entry, up=(entry.up.double() * entry.scale).float(), scale=1.0)


def layers_per_block(components: Mapping[str, Any]) -> int:
    """That of the UNet's config, by which Stability numbers the blocks."""
    return components["unet"].config.layers_per_block


def _body(data: bytes) -> bytes:
    """Serialised safetensors without the header."""
    return data[8 + int.from_bytes(data[:8], "little") :]


def _header(data: bytes, metadata: Mapping[str, str]) -> bytes:
    """The header of serialised safetensors with this metadata, in sorted order; the library's own order is random."""
    return header_bytes(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]), metadata)
