"""A base in diffusers format: where its files are, their hashes, and each component loaded once, in the dtype of its use."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sushi_research.errors import UserError
from sushi_research.fingerprints import FileMemo, folder_hash
from sushi_research.models.detect import read_config

WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
TEXT_WEIGHTS = "model"
COMPONENT_FOLDERS = ("unet/", "vae/", "text_encoder/", "text_encoder_2/")


@dataclass(frozen=True)
class Base:
    """A base whose files are on this machine: `folder` in diffusers format, `vae_folder` holds the VAE's config and weights."""

    source: str
    revision: str | None
    folder: Path
    variant: str | None
    vae_source: str | None
    vae_folder: Path
    vae_variant: str | None

    def component(self, name: str) -> Path:
        return self.vae_folder if name == "vae" else self.folder / name

    def hash(self, name: str, memo: FileMemo) -> str:
        """Hash of a component's config and weight files: what cached results of that component are bound to."""
        folder = self.component(name)
        variant = self.vae_variant if name == "vae" else self.variant
        files = weight_files(folder, WEIGHTS.get(name, TEXT_WEIGHTS), variant)
        if name in WEIGHTS:
            return folder_hash([folder / "config.json", *files], memo)
        # What a text encoder gives depends on its tokenizer just as much.
        tokenizer = sorted(path for path in self._tokenizer(name).iterdir() if path.suffix in (".json", ".txt"))
        return folder_hash([folder / "config.json", *files, *tokenizer], memo)

    def _tokenizer(self, text_encoder: str) -> Path:
        folder = self.folder / text_encoder.replace("text_encoder", "tokenizer")
        if not folder.is_dir():
            raise UserError(f"{self.folder} has no {folder.name} folder: download the model again.")
        return folder

    def load_tokenizer(self, text_encoder: str) -> Any:
        """The `CLIPTokenizer` of `text_encoder` or `text_encoder_2`; UserError where its files are not whole."""
        import transformers

        folder = self._tokenizer(text_encoder)
        try:
            tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
        except Exception as error:
            # transformers raises many kinds here, and all of them come from the user's files.
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{folder} could not be loaded ({first_line}): download the model again.") from error
        if tokenizer.model_max_length != 77:
            raise UserError(
                f"{folder} takes {tokenizer.model_max_length} tokens, and CLIP's has 77 (tokenizer_config.json): "
                "download the model again."
            )
        return tokenizer


def resolve_base(
    source: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    vae: str | None = None,
    vae_revision: str | None = None,
) -> Base:
    """Finds a base (a folder, or a hub id that is downloaded) and the VAE that overrides its own, if one is named.

    The revision of a hub id is recorded as the commit that was downloaded. `variant="fp16"` takes the half-precision files.
    """
    folder, commit = _resolve(source, revision, (variant,), COMPONENT_FOLDERS, "model.base")
    if vae is None:
        return Base(source, commit, folder, variant, None, folder / "vae", variant)
    vae_root, vae_commit = _resolve(vae, vae_revision, (None, "fp16"), ("", "vae/"), "model.vae")
    vae_folder = vae_root / "vae" if (vae_root / "vae" / "config.json").is_file() else vae_root
    if not (vae_folder / "config.json").is_file():
        raise UserError(
            f"model.vae: {vae} has no VAE in diffusers format (no config.json): give a folder or hub id that has."
        )
    named = vae if vae_commit is None else f"{vae}@{vae_commit}"
    # model.variant speaks of the base: the override is taken as it is there, in full precision where there is a choice.
    full, half = (vae_folder / f"{WEIGHTS['vae']}{middle}.safetensors" for middle in ("", ".fp16"))
    vae_variant = "fp16" if half.is_file() and not full.is_file() else None
    return Base(source, commit, folder, variant, named, vae_folder, vae_variant)


def weight_files(folder: Path, stem: str, variant: str | None) -> list[Path]:
    """The safetensors files of a component, one or its shards; UserError names what is missing. Pickles are never read."""
    middle = f".{variant}" if variant else ""
    single = folder / f"{stem}{middle}.safetensors"
    if single.is_file():
        return [single]
    shards = sorted(folder.glob(f"{stem}{middle}-*-of-*.safetensors"))
    if shards and len(shards) == int(shards[0].stem.rsplit("-of-", 1)[1]):
        return shards
    if shards:
        raise UserError(f"{folder} has {len(shards)} of the weight shards its files name: download the model again.")
    if not variant and (folder / f"{stem}.fp16.safetensors").is_file():
        raise UserError(f"{folder} holds fp16 weights only: add --model.variant fp16.")
    raise UserError(
        f"{folder} has no {single.name}: download the model again"
        + (", or set model.variant to null." if variant else " (pickled .bin weights are not read).")
    )


def load_unet(base: Base, dtype: torch.dtype, device: torch.device, attention: str = "sdpa") -> Any:
    """The frozen UNet (`UNet2DConditionModel`), every weight in `dtype` on `device`.

    `attention` is "sdpa", PyTorch's own kernels and diffusers' default, or "xformers".
    """
    from diffusers import UNet2DConditionModel

    unet = _load(UNet2DConditionModel, base.component("unet"), base.variant, dtype)
    unet.requires_grad_(False).to(device)
    if attention == "xformers":
        require_xformers()
        try:
            unet.enable_xformers_memory_efficient_attention()
        except Exception as error:
            # Kernels built for another torch, a GPU that they do not know: each raises a kind of its own.
            reason = str(error).splitlines()[0]
            raise UserError(f"xformers does not run here ({reason}): leave train.attention at sdpa.") from error
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
    from diffusers import AutoencoderKL

    vae = _load(AutoencoderKL, base.vae_folder, base.vae_variant, dtype)
    return vae.requires_grad_(False).eval().to(device)


def load_text_encoder(base: Base, name: str, class_name: str, device: torch.device) -> tuple[Any, Any]:
    """(tokenizer, frozen text encoder in float32) of `text_encoder` or `text_encoder_2`.

    float32, because its output is computed once and cached: the cache then serves every training precision.
    """
    import transformers

    tokenizer = base.load_tokenizer(name)
    encoder = _load(getattr(transformers, class_name), base.folder / name, base.variant, torch.float32)
    return tokenizer, encoder.requires_grad_(False).eval().to(device)


def vae_dtype(base: Base, device: torch.device) -> torch.dtype:
    """float32, unless the VAE's own config says `force_upcast: false` (it is safe in fp16) and there is a GPU to gain by it.

    The key must be in the file: diffusers' default is true, and SD1.5's config does not name it. SDXL's original VAE
    overflows in fp16, which shows as black pictures and NaN losses.
    """
    config = read_config(base.vae_folder.parent, base.vae_folder.name) or {}
    return torch.float16 if config.get("force_upcast") is False and device.type == "cuda" else torch.float32


def require_vae(base: Base, scaling_factor: float) -> None:
    """Refuses a VAE made for another architecture: its latents would be strangers to the UNet."""
    config = read_config(base.vae_folder.parent, base.vae_folder.name) or {}
    found = config.get("scaling_factor", 0.18215)  # AutoencoderKL's default; SD1.5's config does not name it
    if found != scaling_factor or config.get("latent_channels", 4) != 4:
        raise UserError(
            f"the VAE in {base.vae_folder} has scaling factor {found} and the architecture's is {scaling_factor}: it belongs to "
            "another model, so choose one made for this base (or leave model.vae out)."
        )


def _load(model_class: Any, folder: Path, variant: str | None, dtype: torch.dtype) -> Any:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: download the model again.")
    stem = TEXT_WEIGHTS if folder.name.startswith("text_encoder") else WEIGHTS["unet"]
    weight_files(folder, stem, variant)
    dtype_name = "dtype" if stem == TEXT_WEIGHTS else "torch_dtype"
    try:
        model, report = model_class.from_pretrained(
            folder, variant=variant, use_safetensors=True, output_loading_info=True, **{dtype_name: dtype}
        )
    except Exception as error:
        # Whatever a loader raises here comes from the user's files: a half-downloaded, damaged or mismatched component.
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{folder} could not be loaded ({first_line}): download the model again.") from error
    lost = sorted([*report["missing_keys"], *report["unexpected_keys"], *map(str, report["mismatched_keys"])])
    lost = [key for key in lost if not key.endswith("position_ids")]
    if lost:
        raise UserError(
            f"the weights in {folder} do not fit its config.json ({len(lost)} keys, the first {lost[0]}): "
            "download the model again."
        )
    return model


def _resolve(
    source: str, revision: str | None, variants: tuple[str | None, ...], folders: tuple[str, ...], key: str
) -> tuple[Path, str | None]:
    """(local folder, commit or None): a folder as it is, a hub id through the hub's cache.

    Of a hub id only the configs, and the weights of `variants` in `folders`, are fetched.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if revision is not None:
            raise UserError(f"{key}: {source} is a folder, which has no revisions: leave the revision out.")
        return path, None
    if path.is_file():
        raise UserError(
            f"{key}: {source} is a single file, and this version reads bases in diffusers format: give a folder or hub id."
        )
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise UserError(f"{key}: {source} is neither a folder on this machine nor a hub id (owner/name).")
    from huggingface_hub import snapshot_download

    patterns = ["model_index.json", "config.json", "*/config.json", "scheduler/*.json", "tokenizer*/*"]
    for folder in folders:
        for name in {*WEIGHTS.values(), TEXT_WEIGHTS}:
            patterns.append(f"{folder}{name}.safetensors.index*.json")  # without it nobody reads the shards
            for variant in variants:
                middle = f".{variant}" if variant else ""
                patterns += [f"{folder}{name}{middle}{shard}.safetensors" for shard in ("", "-*-of-*")]
    try:
        snapshot = Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except Exception as error:
        # The hub's errors, those of its network library and those of the disk have no parent in common.
        reason = f"{type(error).__name__}: {(str(error).strip() or 'no details').splitlines()[0]}"
        raise UserError(
            f"{key}: {source} is not a folder here and could not be fetched from the hub ({reason}): check the name, "
            "the revision, the connection, the space on the disk, and `hf auth login` for a gated model."
        ) from error
    return snapshot, snapshot.name
