"""A base, found and identified: in diffusers format or a single file, with what is taken from elsewhere in its place; and
each component loaded once, in the dtype of its use."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from sushi_research.config import TrainingConfig
from sushi_research.errors import UserError, first_line
from sushi_research.files import readable
from sushi_research.fingerprints import HashCache
from sushi_research.models import ARCHITECTURES, detect, hub, prediction, sources, tokenizers
from sushi_research.models.header import read_header
from sushi_research.models.prediction import Prediction
from sushi_research.models.sources import Part
from sushi_research.models.tokenizers import Tokenizer


@dataclass(frozen=True)
class Base:
    """A base whose files are on this machine, of an architecture that is trained here.

    `source` is as the user named it, `revision` the commit of a hub id. `scheduler` is the config that it is drawn with;
    `ignored` holds the keys of a single file that nothing uses, each with its reason.
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

    def config(self, name: str) -> dict[str, Any]:
        """The config of a component: "unet", "vae", "text_encoder" or "text_encoder_2"."""
        return self.parts[name].config

    @readable()
    def hash(self, name: str, hash_cache: HashCache) -> str:
        """Hash of a component's config and weights: what cached results of that component are bound to."""
        # What a text encoder gives depends on its tokenizer just as much.
        extra = self.tokenizers[name].files if name in self.tokenizers else []
        return self.parts[name].hash(hash_cache, extra)

    @readable()
    def load_tokenizer(self, text_encoder: str) -> Any:
        """The `CLIPTokenizer` of `text_encoder` or `text_encoder_2`; UserError where it is not whole or not the encoder's."""
        tokenizer, wanted = self.tokenizers[text_encoder].load(), self.config(text_encoder).get("vocab_size", 49408)
        if len(tokenizer) != wanted:
            raise UserError(
                f"the tokenizer in {self.tokenizers[text_encoder].folder} has {len(tokenizer)} tokens and "
                f"{self.parts[text_encoder].where} has {wanted}: take the tokenizer that belongs to it (model.tokenizers)."
            )
        return tokenizer


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
    only: str | None = None,
) -> Base:
    """Finds and identifies a base: a folder in diffusers format, a `.safetensors` file, or a hub id of either.

    `vae` and `text_encoders` name where those are taken from instead (a folder, a file, a hub id), `tokenizers` a folder or
    hub id with CLIP's vocabulary; the last two say what the base predicts where it does not say so itself. `variant="fp16"`
    takes a folder's half-precision files. `only` is the one architecture that will do. UserError for everything else, and for
    what is not whole, fitting and trained here.
    """
    path, commit = hub.locate_base(source, revision)
    opened = (
        sources.open_folder(path, variant, prediction_type) if path.is_dir() else sources.open_file(read_header(path))
    )
    architecture = opened.architecture
    if only is not None:
        detect.require(architecture, only, source)
    predicted = prediction.decide(opened.evidence, prediction_type, zero_terminal_snr)
    others, named, text_folder = {}, None, None
    if vae is not None:
        others["vae"], named = sources.other_vae(vae, vae_revision, architecture)
    if text_encoders is not None:
        found, text_folder = sources.other_text_encoders(text_encoders, architecture)
        others |= found
    parts: dict[str, Part] = dict(others)
    # The UNet comes last: a single file does not tell which part of its input is the pooled text.
    for name in ("vae", *ARCHITECTURES[architecture].formats().TEXT_ENCODERS, "unet"):
        if name not in others:
            parts[name] = opened.part(name, parts)
    if commit is not None and opened.single is None:
        hub.fetch_weights(source, commit, variant, parts.keys() - others.keys())
    ignored = sources.require_nothing_left(opened.single, parts) if opened.single else {}
    detect.require_fit(architecture, {name: part.config for name, part in parts.items()}, str(path))
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


def find_base(config: TrainingConfig, model: ModuleType) -> Base:
    """The base that the config names, refused unless it is of the model module's architecture."""
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
        only=model.NAME,
    )
    require_vae(base, model.SCALING_FACTOR)
    return base


def find_tokenizers(
    architecture: str, asked: str | None, text_folder: Path | None, base_folder: Path | None
) -> dict[str, Tokenizer]:
    """The tokenizers: asked for, next to the text encoders, or from wherever CLIP's vocabulary is at hand."""
    if asked is not None:
        return tokenizers.for_single_file(architecture, hub.locate_tokenizers(asked))
    # Text encoders may come without their tokenizers, a base in diffusers format does not.
    if text_folder and not tokenizers.has_vocabulary(text_folder / tokenizers.folder_of("text_encoder")):
        text_folder = None
    folder = text_folder or base_folder
    if folder is None:
        return tokenizers.for_single_file(architecture, None)
    return {
        name: Tokenizer(folder / tokenizers.folder_of(name))
        for name in ARCHITECTURES[architecture].formats().TEXT_ENCODERS
    }


def load_unet(base: Base, dtype: torch.dtype, device: torch.device, attention: str = "sdpa") -> Any:
    """The frozen UNet (`UNet2DConditionModel`), every weight in `dtype` on `device`.

    `attention` is "sdpa", PyTorch's own kernels and diffusers' default, or "xformers".
    """
    unet = base.parts["unet"].load(dtype, device).requires_grad_(False)
    if attention == "xformers":
        require_xformers()
        try:
            unet.enable_xformers_memory_efficient_attention()
        except Exception as error:
            # Kernels built for another torch, a GPU that they do not know: each raises a kind of its own.
            raise UserError(
                f"xformers does not run here ({first_line(error)}): leave train.attention at sdpa."
            ) from error
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
    return base.parts["vae"].load(dtype, device).requires_grad_(False)


def load_text_encoder(
    base: Base, name: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """(tokenizer, frozen text encoder) of `text_encoder` or `text_encoder_2`.

    float32 for the cache, because its output is computed once: the cache then serves every training precision.
    """
    return base.load_tokenizer(name), base.parts[name].load(dtype, device).requires_grad_(False)


def vae_dtype(base: Base, device: torch.device) -> torch.dtype:
    """float32, unless the VAE's own config says `force_upcast: false` (it is safe in fp16) and there is a GPU to gain by it.

    The key must be in the file: diffusers' default is true, and SD1.5's config does not name it. SDXL's original VAE
    overflows in fp16, which shows as black pictures and NaN losses; a single file does not tell which VAE it holds.
    """
    safe = base.config("vae").get("force_upcast") is False
    return torch.float16 if safe and device.type == "cuda" else torch.float32


def require_vae(base: Base, scaling_factor: float) -> None:
    """Refuses a VAE made for another architecture: its latents would be strangers to the UNet."""
    config = base.config("vae")
    found = config.get("scaling_factor", 0.18215)  # AutoencoderKL's default; SD1.5's config does not name it
    if found != scaling_factor or config.get("latent_channels", 4) != 4:
        raise UserError(
            f"the VAE in {base.parts['vae'].where} has scaling factor {found} and the architecture's is {scaling_factor}: it "
            "belongs to another model, so choose one made for this base (or leave model.vae out)."
        )
