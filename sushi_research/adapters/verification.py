"""Reads back the files of trained adapters, and compares them with what was trained."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sushi_research.adapters import bundled
from sushi_research.adapters.entries import Entry, LowRank
from sushi_research.adapters.formats.writing import has_one_scale, names_of
from sushi_research.adapters.kohya_format import file_entries, file_tensors, layers_per_block
from sushi_research.adapters.lora import ADAPTER, adapter_modules
from sushi_research.adapters.reading import read_adapter
from sushi_research.errors import UserError
from sushi_research.files import disk_error
from sushi_research.models import ARCHITECTURES

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


class AdapterFileError(RuntimeError):
    """A written adapter file does not load as the trained adapter."""


def verify_saved(
    path: Path,
    components: Mapping[str, nn.Module],
    *,
    architecture: str,
    state: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
) -> None:
    """Reloads a file written by `save_adapter` and compares it with the trained adapter.

    Pairs of the UNet are loaded as diffusers' pipelines do, which needs no base weights and takes about 1.5 s for SDXL. What
    diffusers does not load (other kinds), and text encoders, are read as `reading.py` does. AdapterFileError names the first
    difference: an unexpected or missing key, a module that is dropped or added, a tensor that is not bit for bit the trained one
    cast to `dtype`, or a wrong scale. diffusers itself reports none of these.
    """
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
    trained = {
        component: {where: _in_file(entry, has_one_scale(entries), dtype) for where, entry in entries.items()}
        for component, entries in file_entries(components, state).items()
    }
    if tokens := bundled.tokens_of(state):
        _require_tokens(path, tokens, dtype)
    if all(isinstance(entry, LowRank) and entry.magnitude is None for entry in trained["unet"].values()):
        _require_in_diffusers(path, components["unet"], architecture, trained.pop("unet"), dtype)
    if trained:
        _require_read(path, architecture, layers_per_block(components), trained)


def _in_file(entry: Entry, keeps_alpha: bool, dtype: torch.dtype) -> Entry:
    """The entry as the file has it: in its dtype, on the CPU, and with its scale in the tensors if there is no alpha."""
    if isinstance(entry, LowRank) and not keeps_alpha:
        entry = replace(entry, up=(entry.up.double() * entry.scale).float(), scale=1.0)
    tensors = {part: value for part, value in vars(entry).items() if isinstance(value, torch.Tensor)}
    dtypes = {"magnitude": torch.float32}  # whatever the others have
    return replace(entry, **{part: value.to("cpu", dtypes.get(part, dtype)) for part, value in tensors.items()})


def _require_in_diffusers(
    path: Path, unet: Any, architecture: str, trained: Mapping[str, Entry], dtype: torch.dtype
) -> None:
    """AdapterFileError unless diffusers loads these pairs."""
    from diffusers import loaders

    # As in the pipelines' load_lora_weights: only SDXL's passes the UNet's config, which enables the renaming of blocks.
    formats = ARCHITECTURES[architecture].formats()
    loader = getattr(loaders, formats.ADAPTER_LOADER)
    config = {"unet_config": unet.config} if formats.STABILITY_NAMES else {}
    # It refuses a file with new tokens, and takes it without them (docs/new_tokens.md).
    source: Any = bundled.without_tokens(path) or str(path)
    tensors, network_alphas = loader.lora_state_dict(source, use_safetensors=True, local_files_only=True, **config)
    bare = _weightless_unet(unet.to_json_string(), dtype)
    assert not adapter_modules(bare), "the UNet of an earlier file still has its adapter"
    try:
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # of peft, about those scales
            loader.load_lora_into_unet(
                tensors, network_alphas=network_alphas, unet=bare, adapter_name=ADAPTER, low_cpu_mem_usage=True
            )
        _require_same(path, "the module", adapter_modules(bare), trained)
        for where, layer in adapter_modules(bare).items():
            _require_equal(path, where, layer, trained[where])
        bare.unload_lora()
    except BaseException:
        _weightless_unet.cache_clear()  # what is left in it must not count for the next file
        raise


def _require_equal(path: Path, where: str, loaded: LoraLayer, trained: Entry) -> None:
    """AdapterFileError unless a loaded layer has the matrices and the scale."""
    assert isinstance(trained, LowRank)
    pairs = (("lora_A", loaded.lora_A[ADAPTER], trained.down), ("lora_B", loaded.lora_B[ADAPTER], trained.up))
    for matrix, module, values in pairs:
        if module.weight.dtype != values.dtype or not torch.equal(module.weight, values):
            raise AdapterFileError(f"{path}: {matrix} of {where} differs from the trained matrix")
    # The file has alpha in fp32.
    scale = torch.tensor(trained.alpha).item() / trained.rank
    if loaded.scaling[ADAPTER] != scale:
        raise AdapterFileError(f"{path}: the scale of {where} is {loaded.scaling[ADAPTER]}, not {scale}")


def _require_read(path: Path, architecture: str, per_block: int, trained: Mapping[str, Mapping[str, Entry]]) -> None:
    """AdapterFileError unless our own reader finds these entries."""
    try:
        found = {entry.name: entry for entry in read_adapter(path).entries}
    except UserError as error:
        raise AdapterFileError(f"{path} cannot be read back ({error})") from error
    for component, entries in trained.items():
        names = names_of(architecture, component, list(entries), "kohya", per_block)
        for where, entry in entries.items():
            if names[where] not in found:
                raise AdapterFileError(f"{path}: the module {where} of the {component} is missing")
            if difference := _difference(found[names[where]], entry):
                raise AdapterFileError(
                    f"{path}: {difference} of {where} of the {component} differs from the trained one"
                )


def _require_tokens(path: Path, tokens: bundled.Tokens, dtype: torch.dtype) -> None:
    """AdapterFileError unless our own reader finds these new tokens."""
    try:
        found = read_adapter(path).tokens
    except UserError as error:
        raise AdapterFileError(f"{path} cannot be read back ({error})") from error
    _require_same(path, "the new token", found, tokens)
    for token, own in tokens.items():
        for component, vectors in own.items():
            if not torch.equal(found[token][component], vectors.to("cpu", dtype)):
                raise AdapterFileError(f"{path}: the vectors of {token} differ from the trained ones")


def _difference(found: Entry, trained: Entry) -> str | None:
    """What differs between two entries besides their names: a part, or "the kind"; None if nothing does."""
    if type(found) is not type(trained):
        return "the kind"
    for part, wanted in vars(trained).items():
        value = getattr(found, part)
        if isinstance(wanted, torch.Tensor) or isinstance(value, torch.Tensor):
            if value is None or wanted is None or value.dtype != wanted.dtype:
                return part
            if value.numel() != wanted.numel() or not torch.equal(value.reshape(wanted.shape), wanted):
                return part
        elif part == "scale" and not abs(value - wanted) <= 1e-6 * abs(wanted):  # the file has alpha in fp32
            return part
    return None


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
