"""A base in diffusers format: the files of each component, their hash, and loading by diffusers and transformers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sushi_research.errors import UserError, first_line
from sushi_research.files import readable
from sushi_research.fingerprints import HashCache, folder_hash
from sushi_research.models.components import align, model_class, require_bounded, require_finite

# File name of a component's weights, without its extension.
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
TEXT_WEIGHTS = "model"


def stem(name: str) -> str:
    """File name of the weights of the component `name`, without variant and extension."""
    return WEIGHTS.get(name, TEXT_WEIGHTS)


def read_json(path: Path) -> dict[str, Any] | None:
    """Reads a config file of a base. None if it does not exist; UserError if it is not a JSON object."""
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({first_line(error)}): download the model again.") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} does not hold a model's config: download the model again.")
    return config


@dataclass(frozen=True)
class FolderPart:
    """A component in diffusers format: a folder with a `config.json` and safetensors weights."""

    name: str
    folder: Path
    variant: str | None

    @property
    def where(self) -> str:
        return str(self.folder)

    @property
    def config_where(self) -> str:
        return str(self.folder / "config.json")

    @property
    def config(self) -> dict[str, Any]:
        """The contents of config.json; UserError if it does not exist."""
        config = read_json(self.folder / "config.json")
        if config is None:
            raise UserError(f"{self.folder} has no config.json: download the model again.")
        return config

    @property
    def files(self) -> list[Path]:
        """The weight file or its shards; UserError if any is missing."""
        return weight_files(self.folder, stem(self.name), self.variant)

    def hash(self, hash_cache: HashCache, extra: Iterable[Path] = ()) -> str:
        """Hash of the config, the weights, and the files `extra`."""
        return folder_hash([self.folder / "config.json", *self.files, *extra], hash_cache)

    @readable()
    def load(self, dtype: Any, device: Any) -> Any:
        """The model with every weight in `dtype` on `device`, in evaluation mode.

        UserError if a weight is missing, does not match the config, or is not finite.
        """
        assert self.files
        try:
            require_bounded(self.config)
        except ValueError as error:
            raise UserError(f"{self.folder}/config.json is damaged ({error}): download the model again.") from None
        dtype_name = "dtype" if self.name.startswith("text_encoder") else "torch_dtype"
        try:
            model, report = model_class(self.name).from_pretrained(
                self.folder, variant=self.variant, use_safetensors=True, output_loading_info=True, **{dtype_name: dtype}
            )
        except Exception as error:
            # Any error of the loader here is caused by the user's files: an incomplete, damaged or mismatched component.
            raise UserError(
                f"{self.folder} could not be loaded ({first_line(error)}): download the model again."
            ) from error
        lost = sorted([*report["missing_keys"], *report["unexpected_keys"], *map(str, report["mismatched_keys"])])
        lost = [key for key in lost if not key.endswith("position_ids")]
        if lost:
            raise UserError(
                f"the weights in {self.folder} do not fit its config.json ({len(lost)} keys, the first {lost[0]}): "
                "download the model again."
            )
        model.to(device)
        align(model)
        for key, parameter in model.named_parameters():
            require_finite(parameter, key, self.where)
        return model.eval()


def weight_files(folder: Path, stem: str, variant: str | None) -> list[Path]:
    """The safetensors file of a component, or its shards. UserError names what is missing; pickles are never read."""
    middle = f".{variant}" if variant else ""
    single = folder / f"{stem}{middle}.safetensors"
    if single.is_file():
        return [single]
    shards = sorted(path for path in folder.glob(f"{stem}{middle}-*-of-*.safetensors") if path.is_file())
    if shards and f"{len(shards):05d}" == shards[0].stem.rsplit("-of-", 1)[1]:
        return shards
    if shards:
        raise UserError(f"{folder} has {len(shards)} of the weight shards its files name: download the model again.")
    if not variant and (folder / f"{stem}.fp16.safetensors").is_file():
        raise UserError(f"{folder} holds fp16 weights only: add --model.variant fp16.")
    raise UserError(
        f"{folder} has no {single.name}: download the model again"
        + (", or set model.variant to null." if variant else " (pickled .bin weights are not read).")
    )
