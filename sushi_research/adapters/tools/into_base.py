"""Merges adapters into the weights of a base, tensor by tensor: memory holds one tensor and its change at a time.

Each tensor keeps its name, place and dtype; the changed ones are rounded once. What no adapter changes is copied byte for byte.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sushi_research.adapters.entries import Difference, Entry, changed_weight, delta
from sushi_research.adapters.formats.writing import header_bytes
from sushi_research.adapters.tools.base_weights import PIECE, BaseWeights, Weights, view_of
from sushi_research.adapters.tools.history import KEY, steps_of, text_of
from sushi_research.adapters.tools.low_rank import needs_weight
from sushi_research.adapters.tools.merging import Weighted
from sushi_research.errors import UserError
from sushi_research.files import fsync_folder, make_folder, remove, replacing, writing
from sushi_research.models.components import require_finite
from sushi_research.models.diffusers_folder import FolderPart, stem
from sushi_research.models.folder_weights import index_file
from sushi_research.models.original_names import Place
from sushi_research.progress import progress
from sushi_research.temporaries import hidden_name
from sushi_research.user_files import readable

Tensor = torch.Tensor
# Files of weights, of which a component's folder in the output has only those that were merged.
WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|msgpack|h5|onnx)$|\.index(\.\w+)?\.json$|\.safetensors\.\w+\.index\.json$"
)
# (component, parameter).
Parameter = tuple[str, str]


def changed_parameters(adapters: Sequence[Weighted]) -> dict[Parameter, list[tuple[Entry, float]]]:
    """The parameters that change, with the entries that change them and the LoRA scale of each."""
    found: dict[Parameter, list[tuple[Entry, float]]] = {}
    for located, factor in adapters:
        for component, entries in located.matches.items():
            for path, entry in entries.items():
                if not isinstance(entry, Difference) or entry.weight is not None:
                    found.setdefault((component, f"{path}.weight"), []).append((entry, factor))
                if entry.bias is not None:
                    found.setdefault((component, f"{path}.bias"), []).append((entry, factor))
    return found


def changed(value: Tensor, entries: Sequence[tuple[Entry, float]], is_bias: bool = False) -> Tensor:
    """A parameter with the adapters at their LoRA scales, in its dtype: W + sum of scale * (the weight with an adapter - W)."""
    whole = value.double()
    for entry, factor in entries:
        if is_bias:
            assert entry.bias is not None
            whole = whole + factor * entry.bias.double().reshape(value.shape)
        elif needs_weight(entry):
            whole = whole + factor * (changed_weight(entry, value).double() - value.double())
        else:
            whole = whole + factor * delta(entry, tuple(value.shape)).double()
    return whole.to(value.dtype)


def merge_into(base: BaseWeights, adapters: Sequence[Weighted], output: Path, made: Mapping[str, Any]) -> None:
    """Writes the merged base to `output`: a file if the base is one, else a folder, which must not exist.

    Nothing is left if it fails. UserError if a value overflows in the dtype of the base.
    """
    found = changed_parameters(adapters)
    with Weights(base) as weights:
        if base.path.is_dir():
            _write_folder(base, weights, found, output, made)
        else:
            _write_file(weights, base.path, output, _merged_tensors(base, found, base.path), made)


def _write_folder(
    base: BaseWeights,
    weights: Weights,
    found: Mapping[Parameter, list[tuple[Entry, float]]],
    output: Path,
    made: Mapping[str, Any],
) -> None:
    temporary = hidden_name(output)
    make_folder(temporary)
    try:
        for source in sorted(base.path.iterdir()):
            part = base.components[source.name].part if source.name in base.components else None
            if source.is_dir() and any(component == source.name for component, _ in found):
                assert isinstance(part, FolderPart)
                _copy(source, temporary / source.name, lambda path: not WEIGHTS.search(path.name))
                for file in part.files:
                    _write_file(
                        weights, file, temporary / source.name / file.name, _merged_tensors(base, found, file), made
                    )
                if index := index_file(part.folder, stem(part.name), part.variant):
                    _copy_file(index, temporary / source.name / index.name)
            elif source.is_dir() and not source.name.startswith("."):
                _copy(source, temporary / source.name, lambda path: True)
            elif source.suffix in (".json", ".md", ".txt"):
                _copy_file(source, temporary / source.name)
        with writing("write", output):
            temporary.rename(output)
            fsync_folder(output.parent)
    except BaseException:
        remove(temporary)
        raise


def _copy(source: Path, target: Path, wanted: Callable[[Path], bool]) -> None:
    """Copies a folder, with links as what they lead to."""
    make_folder(target)
    for path in sorted(source.iterdir()):
        if path.is_dir():
            _copy(path, target / path.name, wanted)
        elif wanted(path):
            _copy_file(path, target / path.name)


@readable()
def _copy_file(source: Path, target: Path) -> None:
    with open(source, "rb") as file, replacing(target) as copy:
        shutil.copyfileobj(file, copy, PIECE)


def _merged_tensors(
    base: BaseWeights, found: Mapping[Parameter, list[tuple[Entry, float]]], file: Path
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Tensor of a file -> the function that changes it; only of tensors that change."""
    changes: dict[str, list[tuple[Place, Parameter]]] = {}
    for component, parameter in found:
        path, place = base.components[component].places[parameter]
        if path == file:
            changes.setdefault(place.name, []).append((place, (component, parameter)))

    def change(stored: Tensor, places: list[tuple[Place, Parameter]]) -> Tensor:
        for place, (component, parameter) in places:
            shape = base.shape(component, parameter)
            view = view_of(stored, place, shape)
            require_finite(view, place.name, str(file))
            value = changed(view, found[component, parameter], parameter.endswith(".bias"))
            if not torch.isfinite(value).all():
                raise UserError(
                    f"the merged {place.name} has values that {str(value.dtype).removeprefix('torch.')} cannot hold: give a "
                    "smaller weight, or a base in fp32 or bf16."
                )
            view.copy_(value)
        return stored

    return {name: lambda stored, places=places: change(stored, places) for name, places in changes.items()}


@readable()
def _write_file(
    weights: Weights,
    source: Path,
    target: Path,
    changes: Mapping[str, Callable[[Tensor], Tensor]],
    made: Mapping[str, Any],
) -> None:
    """Writes a safetensors file with the tensors of `source`, some changed, in the same order and dtypes."""
    file = weights.file(source)
    header = file.header
    begin = min((tensor.begin for tensor in header.tensors.values()), default=0)
    entries = {
        name: {"dtype": each.dtype, "shape": list(each.shape), "data_offsets": [each.begin - begin, each.end - begin]}
        for name, each in header.tensors.items()
    }
    metadata = dict(header.metadata)
    metadata = {
        key: value for key, value in metadata.items() if key not in ("sshs_model_hash", "modelspec.hash_sha256")
    }
    metadata[KEY] = text_of([*steps_of(header), made])
    metadata.setdefault("format", "pt")
    total = sum(each.end - each.begin for each in header.tensors.values())
    bar = progress(total=total, description=f"writing {target.name}", unit="B", scale=True, leave=False)
    with replacing(target) as out, bar:
        out.write(header_bytes(entries, metadata))
        for name, each in header.tensors.items():
            if name in changes:
                out.write(_bytes_of(changes[name](file.get(name))))
            else:
                for piece in file.pieces(name):
                    out.write(piece)
            bar.update(each.end - each.begin)


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())
