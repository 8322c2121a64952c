"""Resolves a base model (diffusers format or single file, with optional replacement components) and loads its components."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from sushi_research.config import TrainingConfig
from sushi_research.errors import UserError, first_line
from sushi_research.fingerprints import HashCache, file_state
from sushi_research.models import ARCHITECTURES, detect, hub, prediction, settings, sources, tokenizers
from sushi_research.models.attention import OrderedAttention
from sushi_research.models.components import CLASSES, build_empty
from sushi_research.models.header import read_header
from sushi_research.models.prediction import Prediction
from sushi_research.models.sources import Part
from sushi_research.models.storage import Storage
from sushi_research.models.tokenizers import Tokenizer
from sushi_research.user_files import readable


@dataclass(frozen=True)
class Hashed:
    """A component's hash, and the state of each of its files from before they were hashed (`FileState.key` by path)."""

    digest: str
    states: Mapping[Path, list[int]]


@dataclass(frozen=True)
class Base:
    """A base of a supported architecture whose files are on this machine.

    `source` is the base as the user named it, `revision` the commit of a hub id. `scheduler` is the scheduler config for
    sampling. `ignored` maps the unused keys of a single file to the reason why they are not needed. `hashed` has the components
    that were hashed so far: what is loaded must be what was hashed.
    """

    source: str
    revision: str | None
    vae_source: str | None
    architecture: str
    prediction: Prediction
    scheduler: Mapping[str, Any]
    force_zeros: bool
    parts: Mapping[str, Part]
    tokenizers: Mapping[str, Tokenizer]
    ignored: Mapping[str, str]
    hashed: dict[str, Hashed] = field(default_factory=dict, repr=False, compare=False)

    def config(self, name: str) -> dict[str, Any]:
        """The config of a component: "unet", "vae", "text_encoder" or "text_encoder_2"."""
        return self.parts[name].config

    @readable()
    def hash(self, name: str, hash_cache: HashCache) -> str:
        """Hash of a component's config and weights. It is part of the keys of cached results."""
        states = self._states(name)
        # A text encoder's output also depends on its tokenizer.
        extra = self.tokenizers[name].files if name in self.tokenizers else []
        digest = self.parts[name].hash(hash_cache, extra)
        self.hashed[name] = Hashed(digest, states)
        return digest

    def _states(self, name: str) -> dict[Path, list[int]]:
        files = [*self.parts[name].inputs, *(self.tokenizers[name].files if name in self.tokenizers else [])]
        return {path: file_state(path).key for path in files}

    @readable()
    def load(self, name: str, load: Callable[[], Any]) -> Any:
        """What `load` returns, which reads the component `name`; UserError if its files are not those that were hashed any more.

        Files that were only touched since are hashed and loaded once more.
        """
        while True:
            loaded, known = load(), self.hashed.get(name)
            # After loading: a file can be replaced at any time before. A component that was never hashed is not on record.
            if known is None or self._states(name) == known.states:
                return loaded
            if self.hash(name, HashCache(Path(os.devnull))) != known.digest:
                raise UserError(
                    f"the files of {self.parts[name].where} were replaced after this command had hashed them: run the same command "
                    "again."
                )

    @readable()
    def load_tokenizer(self, text_encoder: str) -> Any:
        """The `CLIPTokenizer` of `text_encoder` or `text_encoder_2`; UserError if incomplete or of another vocabulary."""
        tokenizer, wanted = self.tokenizers[text_encoder].load(), self.config(text_encoder).get("vocab_size", 49408)
        if len(tokenizer) != wanted:
            raise UserError(
                f"the tokenizer in {self.tokenizers[text_encoder].folder} has {len(tokenizer)} tokens and "
                f"{self.parts[text_encoder].where} has {wanted}: take the tokenizer that belongs to it (model.tokenizers)."
            )
        if CLASSES[text_encoder].endswith("WithProjection"):
            self._require_pooled_at_end(text_encoder, tokenizer)
        return tokenizer

    @readable()
    def require_loadable(self) -> None:
        """UserError unless the headers of all weights and the tokenizers are whole: what a run reads much later, opened first."""
        for part in self.parts.values():
            part.require_weights()
        for name in self.tokenizers:
            self.load_tokenizer(name)

    def _require_pooled_at_end(self, name: str, tokenizer: Any) -> None:
        """UserError unless transformers takes the pooled output at the caption's end token.

        It does so at the largest id for an `eos_token_id` of 2, else at the first `eos_token_id`; without one, at the start token.
        """
        stated, end = self.config(name).get("eos_token_id", 49407), tokenizer.eos_token_id
        largest = stated == 2 and not isinstance(stated, float) and end == len(tokenizer) - 1
        if not (largest or (type(stated) is int and stated == end != 2)):
            raise UserError(
                f"{self.parts[name].where} has eos_token_id {stated!r:.60}, but its tokenizer ends a caption with the id {end}, so "
                "the pooled output would not be taken at a caption's end: correct the number in its config.json, or take the "
                "tokenizer that belongs to it (model.tokenizers)."
            )


@readable()
def resolve_base(
    source: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    vae: str | None = None,
    vae_revision: str | None = None,
    text_encoders: str | None = None,
    tokenizers: str | None = None,
    prediction_type: str | None = None,
    zero_terminal_snr: bool | None = None,
    flow_shift: float | None = None,
    only: str | None = None,
) -> Base:
    """Finds and identifies a base: a folder in diffusers format, a `.safetensors` file, or a hub id of either.

    `vae` and `text_encoders` name replacement components (a folder, a file or a hub id). `tokenizers` is a folder or hub id
    with CLIP's vocabulary. `prediction_type`, `zero_terminal_snr` and `flow_shift` supply what the base does not state.
    `variant="fp16"` selects a folder's half-precision files. `only` is the required architecture. UserError for another
    architecture, an unsupported model, and missing or mismatched components.
    """
    path, commit = hub.locate_base(source, revision)
    opened = (
        sources.open_folder(path, variant, prediction_type) if path.is_dir() else sources.open_file(read_header(path))
    )
    architecture = opened.architecture
    if only is not None:
        detect.require(architecture, only, source)
    predicted = prediction.decide(opened.evidence, prediction_type, zero_terminal_snr, flow_shift)
    others, named, text_folder = {}, None, None
    if vae is not None:
        others["vae"], named = sources.other_vae(vae, vae_revision, architecture)
    if text_encoders is not None:
        found, text_folder = sources.other_text_encoders(text_encoders, architecture)
        others |= found
    parts, ignored = complete_parts(opened, others, str(path))
    if commit is not None and opened.single is None:
        hub.fetch_weights(source, commit, variant, parts.keys() - others.keys())
    return Base(
        source=source,
        revision=commit,
        vae_source=named,
        architecture=architecture,
        prediction=predicted,
        scheduler=opened.scheduler,
        force_zeros=opened.force_zeros,
        parts=parts,
        tokenizers=find_tokenizers(architecture, tokenizers, text_folder, None if opened.single else path),
        ignored=ignored,
    )


def complete_parts(
    opened: sources.Opened, others: Mapping[str, Part], where: str
) -> tuple[dict[str, Part], dict[str, str]]:
    """(the components of a base, of which `others` replace its own; its unused keys with the reasons). Reads no weights.

    UserError for a missing component, for a setting or a key that is not supported, and for components that do not fit together.
    """
    parts, architecture = dict(others), opened.architecture
    # The UNet comes last: its config in a single file needs the pooled width, which only the second text encoder shows.
    for name in ("vae", *ARCHITECTURES[architecture].formats().TEXT_ENCODERS, "unet"):
        if name not in others:
            parts[name] = opened.part(name, parts)
    for name, part in parts.items():
        settings.require(name, part.config, architecture, part.config_where)
    ignored = sources.require_nothing_left(opened.single, parts) if opened.single else {}
    detect.require_fit(architecture, {name: part.config for name, part in parts.items()}, where)
    return parts, ignored


def find_base(config: TrainingConfig, model: ModuleType) -> Base:
    """Resolves the base that the config names; UserError unless it has the model module's architecture and can be loaded."""
    base = resolve_base(
        config.model.base,
        revision=config.model.revision,
        variant=config.model.variant,
        vae=config.model.vae,
        vae_revision=config.model.vae_revision,
        text_encoders=config.model.text_encoders,
        tokenizers=config.model.tokenizers,
        prediction_type=config.model.prediction_type,
        zero_terminal_snr=config.model.zero_terminal_snr,
        flow_shift=config.model.flow_shift,
        only=model.NAME,
    )
    base.require_loadable()
    return base


def empty_unet(base: Base) -> Any:
    """The base's UNet without weights (on the meta device). UserError if the config of the base does not describe a UNet."""
    try:
        return build_empty("unet", base.config("unet"))
    except ValueError as error:
        raise UserError(
            f"the config of {base.parts['unet'].where} describes no UNet ({error}): download the model again."
        ) from error


def empty_text_encoder(base: Base, name: str) -> Any:
    """A text encoder of the base without weights (on the meta device). UserError if the config of the base describes none."""
    try:
        return build_empty(name, base.config(name))
    except ValueError as error:
        raise UserError(
            f"the config of {base.parts[name].where} describes no text encoder ({error}): download it again."
        ) from error


def find_tokenizers(
    architecture: str, asked: str | None, text_folder: Path | None, base_folder: Path | None
) -> dict[str, Tokenizer]:
    """The tokenizers: from `asked`, from the model in diffusers format that the text encoders come from, or any CLIP copy."""
    if asked is not None:
        return tokenizers.for_single_file(architecture, hub.locate_tokenizers(asked))
    # Replacement text encoders may come without tokenizers; a base in diffusers format always has them.
    if text_folder and not tokenizers.has_vocabulary(text_folder / tokenizers.folder_of("text_encoder")):
        text_folder = None
    folder = text_folder or base_folder
    if folder is None:
        return tokenizers.for_single_file(architecture, None)
    return {
        name: Tokenizer(folder / tokenizers.folder_of(name))
        for name in ARCHITECTURES[architecture].formats().TEXT_ENCODERS
    }


def load_unet(
    base: Base,
    dtype: torch.dtype,
    device: torch.device,
    attention: str | Sequence[str] = "sdpa",
    storage: Storage = "compute",
) -> Any:
    """The frozen UNet (`UNet2DConditionModel`), every weight in `dtype` on `device`, or held as `storage` says (storage.py).

    `attention` is "sdpa" (PyTorch's kernels, diffusers' default), "xformers", or an order of PyTorch's (`attention.BACKENDS`).
    """
    unet = base.load("unet", lambda: base.parts["unet"].load(dtype, device, storage)).requires_grad_(False)
    if attention == "xformers":
        require_xformers()
        try:
            unet.enable_xformers_memory_efficient_attention()
        except Exception as error:
            # For example kernels built for another torch version, or an unknown GPU. The error types differ.
            raise UserError(
                f"xformers does not run here ({first_line(error)}): leave train.attention at sdpa."
            ) from error
    elif attention != "sdpa":
        unet.set_attn_processor(OrderedAttention(attention))
    return unet


def require_xformers() -> None:
    """UserError unless xformers is installed and there is a GPU for its kernels."""
    if importlib.util.find_spec("xformers") is None or not torch.cuda.is_available():
        raise UserError(
            "xformers attention cannot be used here: install the extra (pip install --editable '.[xformers]') on a machine "
            "with a GPU, or leave train.attention at sdpa."
        )


def load_vae(base: Base, dtype: torch.dtype, device: torch.device) -> Any:
    """The frozen VAE (`AutoencoderKL`) in `dtype` on `device`."""
    return base.load("vae", lambda: base.parts["vae"].load(dtype, device)).requires_grad_(False)


def load_text_encoder(
    base: Base, name: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """(tokenizer, frozen text encoder) of `text_encoder` or `text_encoder_2`.

    The default float32 is for the cache: embeddings are computed once and serve every training precision.
    """
    tokenizer, encoder = base.load(name, lambda: (base.load_tokenizer(name), base.parts[name].load(dtype, device)))
    return tokenizer, encoder.requires_grad_(False)


def vae_dtype(base: Base, device: torch.device) -> torch.dtype:
    """float16 on a GPU if the VAE's config has `force_upcast: false` (safe in fp16), else float32.

    A missing key means float32: diffusers' default is true, and SD1.5's config does not set it. SDXL's original VAE overflows
    in fp16, which causes black images and NaN losses; a single file does not tell which VAE it holds.
    """
    safe = base.config("vae").get("force_upcast") is False
    return torch.float16 if safe and device.type == "cuda" else torch.float32
