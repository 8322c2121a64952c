"""The files of a component in diffusers format: its config, which files hold the weights, and loading exactly these.

diffusers and transformers choose the files by rules of their own: where a folder has both a single file and an index of shards,
diffusers loads the shards and transformers the single file; both obey keys of config.json that name other files. Here the files
are chosen once. They are hashed and loaded, and what is ambiguous is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sushi_research.errors import UserError, first_line
from sushi_research.models.components import require_finite
from sushi_research.models.header import DTYPES, read_header
from sushi_research.progress import progress
from sushi_research.user_files import parse_json, read_regular

if TYPE_CHECKING:
    from sushi_research.models.storage import Storage

# The index of SDXL's shards has 200 kB.
_MOST_JSON = 16 * 2**20
# Attention layers in VAEs that were saved before diffusers renamed them.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def read_json(path: Path) -> dict[str, Any] | None:
    """Reads a config file of a base. None if it does not exist; UserError if it is not a JSON object."""
    if not path.is_file():
        return None
    config = parse_json(read_regular(path, _MOST_JSON), str(path), "download the model again.")
    if not isinstance(config, dict):
        raise UserError(f"{path} does not hold a model's config: download the model again.")
    return config


def require_nothing_else(folder: Path) -> None:
    """UserError if something else than the usual weight files would determine the component.

    Keys of config.json that name other files are refused with every unknown setting (`settings.require`).
    """
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder} has an adapter next to its weights (adapter_config.json), which is not supported: merge it into the "
            "weights, or remove that file."
        )


def weight_files(folder: Path, stem: str, variant: str | None) -> list[Path]:
    """The safetensors file of a component, or the shards that its index names.

    UserError names what is missing or ambiguous; pickles are never read.
    """
    single = folder / _single_name(stem, variant)
    indexes = [path for name in _index_names(stem, variant) if (path := folder / name).is_file()]
    found = [path.name for path in ([single] if single.is_file() else []) + indexes]
    if len(found) > 1:
        raise UserError(
            f"{folder} has both {' and '.join(found)}, which may hold different weights: keep the one that is meant and remove the "
            "other (of a hub id, in a copy of the model)."
        )
    if single.is_file():
        return [single]
    if indexes:
        shards = [folder / name for name in sorted(set(weight_map(indexes[0]).values()))]
        missing = [path.name for path in shards if not path.is_file()]
        if missing:
            raise UserError(
                f"{folder} lacks {len(missing)} of the weight shards that its index names, the first {missing[0]}: download the "
                "model again."
            )
        return shards
    if not variant and has_weights(folder, stem, "fp16"):
        raise UserError(f"{folder} holds fp16 weights only: add --model.variant fp16.")
    if any(folder.glob(f"{stem}*-*-of-*.safetensors")):
        raise UserError(
            f"{folder} has weight shards without their index ({_index_names(stem, variant)[0]}): download the model again."
        )
    raise UserError(
        f"{folder} has no {single.name}: download the model again"
        + (", or set model.variant to null." if variant else " (pickled .bin weights are not read).")
    )


def has_weights(folder: Path, stem: str, variant: str | None) -> bool:
    """Whether a component's folder has a weight file or an index of shards of the variant. Whether it is whole is not checked."""
    return any((folder / name).is_file() for name in (_single_name(stem, variant), *_index_names(stem, variant)))


def index_file(folder: Path, stem: str, variant: str | None) -> Path | None:
    """The index of a component's shards, or None."""
    return next((path for name in _index_names(stem, variant) if (path := folder / name).is_file()), None)


def _single_name(stem: str, variant: str | None) -> str:
    return f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"


def _index_names(stem: str, variant: str | None) -> list[str]:
    """The names of an index that diffusers and transformers know; with a variant there is an older one."""
    if not variant:
        return [f"{stem}.safetensors.index.json"]
    return [f"{stem}.safetensors.index.{variant}.json", f"{stem}.safetensors.{variant}.index.json"]


def weight_map(index: Path) -> dict[str, str]:
    """Key -> name of the shard that holds it. UserError if the index is damaged, or names a file outside its folder."""
    found = (read_json(index) or {}).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise UserError(f"{index} names no shards: download the model again.")
    for name in found.values():
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name or "\\" in name:
            raise UserError(
                f"{index} names {name!r}, which is no safetensors file in its folder: download the model again."
            )
    return found


def keys_by_file(
    model: Any, folder: Path, files: Sequence[Path], index: Path | None = None
) -> dict[Path, dict[str, str]]:
    """File -> {key in it: name of the model's parameter}, from the headers alone. `index` is that of shards.

    UserError unless every parameter of the model is in exactly one place, with its shape and in a dtype that can be read, and
    there is nothing else.
    """
    shapes = {_plain(name): (name, tuple(parameter.shape)) for name, parameter in model.named_parameters()}
    found: dict[Path, dict[str, str]] = {}
    missing, wrong, indexed = set(shapes), [], weight_map(index) if index else None
    for file in files:
        found[file] = {}
        for key, tensor in read_header(file).tensors.items():
            if indexed is not None and indexed.pop(key, None) != file.name:
                raise UserError(f"{index} does not fit its shards ({key}): download the model again.")
            if key.endswith("position_ids"):  # the numbers 0 to 76
                continue
            name, shape = shapes.get(_plain(key), (None, None))
            if name is None or shape != tensor.shape or _plain(key) not in missing:
                wrong.append(key)
                continue
            if tensor.dtype not in DTYPES:
                raise UserError(
                    f"{folder} holds {tensor.dtype} weights ({key}), but only {', '.join(DTYPES)} can be read: use the "
                    "model's fp16 files."
                )
            missing.remove(_plain(key))
            found[file][key] = name
    if indexed:
        raise UserError(f"{index} does not fit its shards ({min(indexed)}): download the model again.")
    lost = sorted([*wrong, *missing])
    if lost:
        raise UserError(
            f"the weights in {folder} do not fit its config.json ({len(lost)} keys, the first {lost[0]}): "
            "download the model again."
        )
    return found


def load_weights(
    model: Any,
    keys: Mapping[Path, Mapping[str, str]],
    folder: Path,
    title: str,
    *,
    dtype: Any,
    device: Any,
    storage: Storage = "compute",
) -> None:
    """Replaces every parameter of `model` by a copy of its tensor, in `dtype` on `device`; a UNet's layers held as `storage` says.

    `keys` are those of `keys_by_file`; `title` is the component's name for the progress bar.
    UserError if a tensor is not finite.
    """
    from safetensors import SafetensorError, safe_open

    from sushi_research.models.storage import put

    total = sum(len(found) for found in keys.values())
    try:
        with progress(total=total, description=f"loading the {title}", unit="tensor", leave=False) as bar:
            for file, found in keys.items():
                with safe_open(file, "pt") as opened:
                    for key, parameter in found.items():
                        stored = opened.get_tensor(key)
                        # A copy, because a tensor of the mapped file would change with the file. It also begins where torch's own
                        # tensors do: a CPU matrix product may round differently for data that is not aligned.
                        value = stored.to(device, dtype, copy=True).contiguous()
                        require_finite(value, key, str(folder), stored)
                        put(model, parameter, value, storage)
                        bar.update()
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} could not be loaded ({first_line(error)}): download the model again.") from error


def _plain(key: str) -> str:
    """A key without what depends on the library's version: CLIP's prefix, and old names of a VAE's attention layers."""
    key = key.removeprefix("text_model.")
    return re.sub(
        r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\.", lambda old: f"{old[1]}{_OLD_ATTENTION[old[2]]}.", key
    )
