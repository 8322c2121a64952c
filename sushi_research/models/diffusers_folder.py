"""A base in diffusers format: the configs and files of each component, their hash, and loading."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sushi_research.errors import UserError
from sushi_research.fingerprints import HashCache, folder_hash
from sushi_research.models.components import TITLES, build_empty
from sushi_research.models.folder_weights import (
    index_file,
    keys_by_file,
    load_weights,
    read_json,
    require_nothing_else,
    weight_files,
)
from sushi_research.user_files import readable

if TYPE_CHECKING:
    from sushi_research.models.storage import Storage

# File name of a component's weights, without its extension.
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
TEXT_WEIGHTS = "model"


def stem(name: str) -> str:
    """File name of the weights of the component `name`, without variant and extension."""
    return WEIGHTS.get(name, TEXT_WEIGHTS)


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
        """The weight file or its shards, exactly those that `load` reads; UserError if any is missing."""
        require_nothing_else(self.folder)
        return weight_files(self.folder, stem(self.name), self.variant)

    @property
    def inputs(self) -> list[Path]:
        """Every file that determines the component: its config and its weights."""
        return [self.folder / "config.json", *self.files]

    def hash(self, hash_cache: HashCache, extra: Iterable[Path] = ()) -> str:
        """Hash of the config, the weights, and the files `extra`."""
        return folder_hash([*self.inputs, *extra], hash_cache)

    def require_weights(self) -> None:
        """UserError unless the headers of the weight files hold every parameter of the model, in its shape."""
        self._read_headers()

    def _read_headers(self) -> tuple[Any, dict[Path, dict[str, str]]]:
        """(the model of the config, without weights, and the keys of each file by `keys_by_file`)."""
        files, config = self.files, self.config
        try:
            model = build_empty(self.name, config)
        except ValueError as error:
            raise UserError(f"{self.folder} could not be loaded ({error}): download the model again.") from error
        index = index_file(self.folder, stem(self.name), self.variant)
        return model, keys_by_file(model, self.folder, files, index)

    @readable()
    def load(self, dtype: Any, device: Any, storage: Storage = "compute") -> Any:
        """The model with every weight in `dtype` on `device`, in evaluation mode, from exactly `files`, which are also hashed.

        A UNet's layers are held as `storage` says.
        UserError if a weight is missing, does not match the config, or is not finite.
        """
        model, keys = self._read_headers()
        load_weights(model, keys, self.folder, TITLES[self.name], dtype=dtype, device=device, storage=storage)
        return model.to(device).eval()  # moves the buffers, which are not in the files
