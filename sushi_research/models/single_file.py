"""Reads a checkpoint in one `.safetensors` file, in the layout of Stability's code.

diffusers' `from_single_file` reads the same layout, but it silently skips unknown keys and needs configs from the hub. Here
every parameter of a component must be in the file, tensors are loaded one by one into their final dtype and device, and every
remaining key must be on the list `IGNORED`; any other key is an error.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sushi_research.errors import UserError
from sushi_research.fingerprints import HashCache, content_hash, file_state, folder_hash
from sushi_research.models import ARCHITECTURES, shapes
from sushi_research.models.components import TITLES, build_empty, require_finite
from sushi_research.models.header import DTYPES, Header, Tensor, read_header
from sushi_research.models.original_names import Place, clip_name, open_clip_place, unet_name, vae_name
from sushi_research.progress import progress

if TYPE_CHECKING:
    from sushi_research.models.storage import Storage

# Patterns of keys that are not needed -> the reason.
IGNORED = {
    r".*\.embeddings\.position_ids": "the numbers 0 to 76",
    r"(cond_stage_model|conditioner\.embedders\.\d)\.((transformer|model)\.)?logit_scale": "CLIP's contrastive "
    "scale, which conditioning does not use",
    r"model_ema\..*": "an averaged copy of the UNet; the file's own weights are used",
    r"betas|((sqrt|log)_)?(one_minus_)?alphas_cumprod(_prev)?|sqrt_recipm?1?_alphas_cumprod|posterior_variance|"
    r"posterior_log_variance_clipped|posterior_mean_coef[12]|logvar|lvlb_weights|denoiser\.(log_)?sigmas": "the noise "
    "schedule, which is known",
    r"scale_factor|embedding_manager\..*": "remains of training with Stability's first code",
    r"((first_stage_model\.)?loss|first_stage_model\.model_ema)\..*": "used only to train the VAE",
    r"(cond_stage_model|conditioner\.embedders\.0)\.(transformer\.)?text_projection(\.weight)?": "CLIP ViT-L's projection, "
    "which neither SD1.5 nor SDXL uses",
    r"v_pred|ztsnr": "a marker: what the model predicts",
}


class SingleFile:
    """A single file of a known architecture, of which only the header has been read."""

    def __init__(self, header: Header, architecture: str) -> None:
        self.header, self.architecture = header, architecture
        self._prefixes = {}
        for name, (prefixes, telling) in ARCHITECTURES[architecture].formats().SINGLE_FILE.items():
            found = [prefix for prefix in prefixes if prefix + telling in header.tensors]
            if found:
                self._prefixes[name] = found[0]

    def __contains__(self, name: str) -> bool:
        return name in self._prefixes

    def part(self, name: str, pooled: int | None = None) -> FilePart:
        """The component `name`, which must be in the file; `pooled` as in `shapes.unet_config`.

        UserError if its tensors do not have the architecture's structure.
        """
        prefix = self._prefixes[name]
        below = {
            key[len(prefix) :]: tensor.shape for key, tensor in self.header.tensors.items() if key.startswith(prefix)
        }
        try:
            if name == "unet":
                config = shapes.unet_config(self.architecture, below, pooled)
            elif name == "vae":
                config = shapes.vae_config(self.architecture, below)
            elif name == "text_encoder":
                config = shapes.clip_config(
                    self.architecture, {f"text_model.{key}": shape for key, shape in below.items()}
                )
            else:
                config = shapes.open_clip_config(self.architecture, below)
        except UserError as error:
            raise UserError(
                f"the {TITLES[name]} in {self.header.path} is damaged or of another model ({error}): inspect the file with "
                "scripts/inspect_model.py, or download it again."
            ) from None
        return FilePart(name, self.header, prefix, config)

    def leftovers(self, parts: Iterable[FilePart]) -> tuple[dict[str, str], list[str]]:
        """The keys that `parts` do not use: (ignored key -> reason, unknown keys).

        Keys of the file's components that are not in `parts`, because they were replaced, are skipped.
        """
        parts = list(parts)
        used = {tensor for part in parts for tensor in part.tensors}
        passed = tuple(self._prefixes[name] for name in self._prefixes.keys() - {part.name for part in parts})
        passed = tuple(prefix for prefix in passed if prefix)
        ignored, unknown = {}, []
        for key in self.header.tensors:
            if key in used or (passed and key.startswith(passed)):
                continue
            reason = next((reason for pattern, reason in IGNORED.items() if re.fullmatch(pattern, key)), None)
            if reason:
                ignored[key] = reason
            else:
                unknown.append(key)
        return ignored, unknown


@dataclass(frozen=True, eq=False)
class FilePart:
    """A component in a single file: its `config` in diffusers' or transformers' form, its tensor names begin with `prefix`."""

    name: str
    header: Header
    prefix: str
    config: dict[str, Any] = field(repr=False)

    @property
    def where(self) -> str:
        return f"the {TITLES[self.name]} in {self.header.path}"

    @property
    def config_where(self) -> str:
        return self.where

    def require_weights(self) -> None:
        """UserError unless the file holds every parameter, in its shape."""
        _ = self.places  # looks for each of them

    @functools.cached_property
    def places(self) -> dict[str, Place]:
        """Parameter name -> its place in the file, where `Place.name` is the full tensor name.

        UserError names the first tensor that is missing or has the wrong shape or an unsupported dtype.
        """
        try:
            model = build_empty(self.name, self.config)
        except ValueError as error:
            raise UserError(f"{self.where} has inconsistent sizes ({error}): download the file again.") from None
        parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        find = self._finder()
        places, missing = {}, []
        for parameter, shape in parameters.items():
            place = find(parameter)
            tensor = self.header.tensors.get(place.name)
            if tensor is None:
                missing.append(place.name)
                continue
            if not fits(tensor.shape, shape, place):
                raise UserError(
                    f"{self.where} has {place.name} with the shape {list(tensor.shape)}, where {list(shape)} belongs: the file "
                    "is damaged or of another model."
                )
            if tensor.dtype not in DTYPES:
                raise UserError(
                    f"{self.where} holds {tensor.dtype} weights ({place.name}), but only {', '.join(DTYPES)} can be read: use "
                    "the model's fp16 file."
                )
            places[parameter] = place
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(f"{self.where} lacks {missing[0]}{more}: the file is cut short or of another model.")
        return places

    def _finder(self) -> Callable[[str], Place]:
        """A function: parameter name in the model -> its place in this file."""
        if self.name == "text_encoder_2":
            inner = open_clip_place
        elif self.name == "text_encoder":
            inner = lambda name: Place(clip_name(name).removeprefix("text_model."))  # noqa: E731
        elif self.name == "vae":
            levels = len(self.config["block_out_channels"])
            inner = lambda name: Place(vae_name(name, levels=levels))  # noqa: E731
        else:
            layers, blocks = self.config["layers_per_block"], self.config["up_block_types"]
            plain = [index for index, block in enumerate(blocks) if not block.startswith("CrossAttn")]
            inner = lambda name: Place(unet_name(name, layers_per_block=layers, plain_up_blocks=plain))  # noqa: E731

        def find(name: str) -> Place:
            place = inner(name)
            linear = f"{self.prefix}{place.name}.weight"
            if place.transposed and linear in self.header.tensors:  # some tools store it so
                return Place(linear)
            return Place(self.prefix + place.name, place.third, place.transposed)

        return find

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The file's tensors that the component uses."""
        return {place.name: self.header.tensors[place.name] for place in self.places.values()}

    @property
    def inputs(self) -> list[Path]:
        """The file that determines the component."""
        return [self.header.path]

    def hash(self, hash_cache: HashCache, extra: Iterable[Path] = ()) -> str:
        """Hash of the config, this component's tensors (independent of their offsets), and the files `extra`.

        UserError if the file is no longer the one whose header was read.
        """
        key, path = f"{self.name} at {self.prefix}", self.header.path
        state = file_state(path)
        if read_header(path) != self.header:
            raise UserError(f"{path} was replaced while it was read: run the same command again.")
        facts = hash_cache.get(path) or {}
        if key not in facts:
            facts[key] = self._digest()
            hash_cache.put(path, facts, state)
        others = [folder_hash(list(extra), hash_cache)] if list(extra) else []
        return content_hash(json.dumps([self.config, facts[key], *others], sort_keys=True).encode())

    def _digest(self) -> str:
        tensors = sorted(self.tensors.items(), key=lambda item: item[1].begin)
        total = sum(tensor.end - tensor.begin for _, tensor in tensors)
        bar = progress(total=total, description=f"hashing the {TITLES[self.name]}", unit="B", scale=True, leave=False)
        entries = []
        with open(self.header.path, "rb") as file, bar:
            for name, tensor in tensors:
                digest = hashlib.blake2b(digest_size=16)
                file.seek(tensor.begin)
                for begin in range(tensor.begin, tensor.end, 1 << 22):
                    piece = file.read(min(1 << 22, tensor.end - begin))
                    digest.update(piece)
                    bar.update(len(piece))
                entries.append([name.removeprefix(self.prefix), tensor.dtype, list(tensor.shape), digest.hexdigest()])
        return content_hash(json.dumps(sorted(entries)).encode())

    def load(self, dtype: Any, device: Any, storage: Storage = "compute") -> Any:
        """The model with every weight in `dtype` on `device`, in evaluation mode; a UNet's layers held as `storage` says.

        Tensors are read one by one from the memory-mapped file, so memory holds one copy of the weights plus one tensor.
        UserError for values that are not finite.
        """
        from safetensors import SafetensorError, safe_open

        from sushi_research.models.storage import put

        places = self.places
        model = build_empty(self.name, self.config)
        bar = progress(places.items(), description=f"loading the {TITLES[self.name]}", unit="tensor", leave=False)
        try:
            with safe_open(self.header.path, "pt") as file, bar:
                for parameter, place in bar:
                    shape = model.get_parameter(parameter).shape
                    stored = read(file, place, shape)
                    value = stored.to(device, dtype, copy=True).contiguous()
                    require_finite(value, place.name, self.where, stored)
                    put(model, parameter, value, storage)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.where} could not be read ({error}): download the file again.") from error
        return model.to(device).eval()  # moves the buffers, which are not in the file


def fits(found: tuple[int, ...], wanted: tuple[int, ...], place: Place) -> bool:
    """Whether a tensor of the shape `found` holds, at `place`, a parameter of the shape `wanted`.

    A 1x1 convolution counts as a linear layer: older VAEs have such convolutions in the attention, diffusers linear layers.
    """
    if place.third is not None:
        wanted = (3 * wanted[0], *wanted[1:])
    if place.transposed:
        return found == wanted[::-1]
    return _bare(found) == _bare(wanted)


def _bare(shape: tuple[int, ...]) -> tuple[int, ...]:
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def read(file: Any, place: Place, shape: tuple[int, ...]) -> Any:
    """The parameter of shape `shape` at `place` in a `safe_open` file; a view of the mapped file if the library gives one."""
    if place.third is not None:
        rows = shape[0]
        return file.get_slice(place.name)[place.third * rows : (place.third + 1) * rows].view(shape)
    tensor = file.get_tensor(place.name)
    return tensor.T if place.transposed else tensor.view(shape)
