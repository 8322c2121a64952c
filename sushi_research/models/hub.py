"""Locates a base, VAE, text encoders or tokenizers: a folder, a file, or a Hugging Face hub id (through the hub's cache)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from sushi_research import progress
from sushi_research.errors import UserError, first_line
from sushi_research.models.diffusers_folder import TEXT_WEIGHTS, WEIGHTS
from sushi_research.models.tokenizers import FILES
from sushi_research.user_files import expand_path

CONFIGS = ["model_index.json", "config.json", "*/config.json", "scheduler/*.json", "tokenizer*/*"]


@contextlib.contextmanager
def only_local() -> Iterator[None]:
    """A block in which nothing is fetched from the hub: what is not in its cache is an error, as if there were no connection."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def locate_base(source: str, revision: str | None, key: str = "model.base") -> tuple[Path, str | None]:
    """(folder or file, commit if it is a hub id) of a base. `key` is the config key that names it.

    For a hub id in diffusers format only the configs are fetched, so that an unsupported model is refused before its weights
    are downloaded.
    """
    return _find(source, revision, key, CONFIGS)


def fetch_weights(source: str, commit: str, variant: str | None, names: Iterable[str]) -> None:
    """Fetches the weights of the components `names` of a hub id, next to the configs already fetched."""
    _snapshot(source, commit, _weights([f"{name}/" for name in names], (variant,)), "model.base")


def find_component(source: str, revision: str | None, folders: Sequence[str], key: str) -> tuple[Path, str | None]:
    """(folder or file, commit if it is a hub id) of the model that `key` names.

    For a hub id, fetches the configs and the weights in `folders`, in full precision and fp16.
    """
    return _find(source, revision, key, [*CONFIGS, *_weights(folders, (None, "fp16"))])


def locate_tokenizers(source: str) -> Path:
    """The folder that model.tokenizers names."""
    path, _ = _find(source, None, "model.tokenizers", [*FILES, "tokenizer*/*"])
    if path.is_file():
        raise UserError(f"model.tokenizers: {source} is a file: give the folder that holds vocab.json and merges.txt.")
    return path


def _weights(folders: Iterable[str], variants: Iterable[str | None]) -> list[str]:
    """File patterns of safetensors weights, single or sharded, and of the index that loading shards requires."""
    variants, patterns = list(variants), []
    for folder in folders:
        for name in sorted({*WEIGHTS.values(), TEXT_WEIGHTS}):
            patterns.append(f"{folder}{name}.safetensors.index*.json")
            for variant in variants:
                middle = f".{variant}" if variant else ""
                patterns += [f"{folder}{name}{middle}{shard}.safetensors" for shard in ("", "-*-of-*")]
    return patterns


def _find(source: str, revision: str | None, key: str, patterns: list[str]) -> tuple[Path, str | None]:
    found = hub_id(source, key)
    if found is None:
        if revision is not None:
            raise UserError(
                f"{key}: {source} is on this machine, where there are no revisions: leave the revision out."
            )
        return Path(expand_path(source, key=key)), None
    repository, file = found
    if file:
        return _file(repository, file, revision, key)
    return _snapshot(repository, revision, patterns, key)


def hub_id(source: str, key: str) -> tuple[str, str] | None:
    """(owner/name, file or "") of a hub id; None if `source` is a folder or a file on this machine. UserError if it is neither."""
    path = Path(expand_path(source, key=key))
    if os.path.isdir(path) or os.path.isfile(path):
        return None
    local = source.startswith((".", "/", "~")) or os.path.lexists(source)
    owner, _, rest = source.partition("/")
    name, _, file = rest.partition("/")
    if local or not owner or not name or (file and not file.endswith(".safetensors")):
        raise UserError(
            f"{key}: {source} is neither a folder nor a file on this machine, nor a hub id (owner/name, or "
            "owner/name/file.safetensors)."
        )
    return f"{owner}/{name}", file


def _snapshot(source: str, revision: str | None, patterns: list[str], key: str) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                source, revision=revision, allow_patterns=patterns, tqdm_class=progress.bars_of_libraries()
            )
        )
    except Exception as error:
        raise _unreachable(source, key, error) from error
    return folder, folder.name


def _file(source: str, file: str, revision: str | None, key: str) -> tuple[Path, str]:
    from huggingface_hub import hf_hub_download

    try:
        path = Path(hf_hub_download(source, file, revision=revision, tqdm_class=progress.bars_of_libraries()))
    except Exception as error:
        raise _unreachable(f"{source}/{file}", key, error) from error
    # .../snapshots/<commit>/<file>
    return path, path.parents[len(Path(file).parts) - 1].name


def _unreachable(source: str, key: str, error: Exception) -> UserError:
    # The errors of the hub, its network library and the disk have no common base class.
    return UserError(
        f"{key}: {source} is not on this machine and could not be fetched from the hub ({type(error).__name__}: "
        f"{first_line(error)}): check the name, the revision, the connection, the space on the disk, and `hf auth login` for a "
        "gated model."
    )
