"""Opens HF datasets: a saved folder, tables in a folder, or a hub id. A dataset's own text names only files of that dataset.

The `datasets` library converts tables into a copy in the user's cache, which it finds again by the tables' paths and modification
times (`DataFilesList.origin_metadata`). A table that was replaced on the same date would give its old rows, so our copies are in a
folder that is named after the tables' content. A saved folder is read in place, and a hub dataset's copy is named after its commit.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from sushi_research.data.images import MAX_BYTES, BadImage
from sushi_research.data.names import in_any_form
from sushi_research.errors import UserError, first_line
from sushi_research.fingerprints import HashCache, folder_hash


@dataclass(frozen=True)
class Table:
    """The rows of a split. `folders` are those that hold the dataset's own files; relative paths start at the first of them."""

    rows: Any
    folders: tuple[Path, ...]
    files: tuple[Path, ...] = ()


def open_saved(folder: Path, split: str) -> Table:
    """A split of a dataset from `save_to_disk`. A single `Dataset` counts as the split it came from, or "train" if unknown."""
    import datasets

    with _readable(f"the data set in {folder} cannot be read", "save it again"):
        files = tuple(_saved_files(folder))
        saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.Dataset):
        own = str(saved.split or "train")
        saved = {own: saved, own.partition("[")[0]: saved}
    if split not in saved:
        raise UserError(f"{folder} has no split {split}: set data.split to one of {', '.join(saved)}.")
    return Table(saved[split], (folder,), files)


def open_folder(folder: Path, split: str) -> Table:
    """A split of the parquet or arrow files in a folder. Raises UserError if it cannot be loaded, or names files elsewhere."""
    import datasets

    with _unloadable(str(folder)):
        files = _table_files(folder)
        # A hash cache of this call alone: the rows are read anyway, so no modification time has to be trusted.
        hashes = HashCache(Path(os.devnull))
        content = folder_hash(files, hashes)
        copies = Path(datasets.config.HF_DATASETS_CACHE) / "by_content" / content
        rows = datasets.load_dataset(str(folder), split=split, cache_dir=str(copies))
        if folder_hash(files, hashes) != content:
            shutil.rmtree(copies, ignore_errors=True)
            raise UserError(f"the tables in {folder} were changed while they were read: run the same command again.")
    return Table(rows, (folder, copies), tuple(files))


def open_hub(name: str, split: str, revision: str | None) -> Table:
    """A split of a hub dataset. Raises UserError if it cannot be loaded."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    with _unloadable(name):
        rows = datasets.load_dataset(name, split=split, revision=revision)
    # What was downloaded: the files of this repository, and what `datasets` unpacked.
    own = Path(HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}"
    return Table(rows, (own, Path(datasets.config.HF_DATASETS_CACHE) / "downloads"))


def read_image(cell: dict[str, Any] | None, folders: tuple[Path, ...]) -> bytes:
    """The bytes of an image cell: its `bytes`, or else the file at its `path` if that is in one of `folders`, links resolved.

    A dataset that was downloaded must not be able to name a private file of this machine: training, its sample images and W&B
    would carry it away. Raises BadImage if there is no image or the file is elsewhere, OSError if it cannot be read.
    """
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise BadImage("the row has no image")
    if cell["bytes"] is not None:
        return cell["bytes"]
    name = cell["path"]
    if "://" in name or "\0" in name:
        raise BadImage(f"its image is {name}, which is not a file: store the image itself in the row")
    path = Path(os.path.realpath(in_any_form(folders[0], name)))
    if not any(path.is_relative_to(os.path.realpath(folder)) for folder in folders):
        raise BadImage(
            f"its image {name} is outside of the data set and is not read: store the image itself in the row, "
            "or move it into the data set's folder"
        )
    if path.exists() and not path.is_file():
        raise BadImage(f"its image {name} is not a file")
    if path.stat().st_size > MAX_BYTES:
        raise BadImage(f"its image {name} has more than {MAX_BYTES:,} bytes")
    return path.read_bytes()


def _table_files(folder: Path) -> list[Path]:
    """The files that `datasets` would read for the folder: those it finds, or those that the folder's README.md names."""
    import datasets

    for source, name in _named_in_cards(folder):  # before `datasets` looks for them, which may ask a server
        _own_file(folder, name, source)
    found = datasets.load_dataset_builder(str(folder)).config.data_files
    return [_own_file(folder, name, "README.md") for names in found.values() for name in names]


def _named_in_cards(folder: Path) -> Iterator[tuple[str, str]]:
    """(card, pattern) of each `data_files` and `data_dir` of the two files in which `datasets` looks for them."""
    import yaml
    from huggingface_hub import DatasetCard

    if (folder / "README.md").is_file():
        yield from (("README.md", name) for name in _patterns(DatasetCard.load(folder / "README.md").data.to_dict()))
    if (folder / ".huggingface.yaml").is_file():
        content = yaml.safe_load((folder / ".huggingface.yaml").read_text(encoding="utf-8"))
        yield from ((".huggingface.yaml", name) for name in _patterns(content))


def _patterns(content: Any, inside: bool = False) -> Iterator[str]:
    """Every text below a key `data_files` or `data_dir`; split names are among them and do no harm."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _patterns(value, inside or key in ("data_files", "data_dir"))
    elif isinstance(content, list):
        for value in content:
            yield from _patterns(value, inside)
    elif inside and isinstance(content, str):
        yield content


def _saved_files(folder: Path) -> Iterator[Path]:
    """The files that `load_from_disk` reads for the rows of a saved Dataset or DatasetDict."""
    parts = [folder]
    if (folder / "dataset_dict.json").exists():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        parts = [_own_file(folder, split, "dataset_dict.json") for split in splits]
    for part in parts:
        for file in json.loads((part / "state.json").read_text(encoding="utf-8"))["_data_files"]:
            yield _own_file(part, file["filename"], "state.json")


def _own_file(folder: Path, name: str, source: str) -> Path:
    """The path of a file that a dataset's own text names. UserError if the name leads out of the folder.

    An absolute name in the folder is fine. Links are not resolved: a link is a part of the folder as its user sees it, and the
    hub's cache consists of links. The scan notes those that lead out of it.
    """
    own = name.removeprefix(os.path.realpath(folder) + os.sep)  # `datasets` returns absolute, resolved paths
    if PurePath(own).is_absolute() or ".." in PurePath(own).parts or "::" in own or "://" in own:
        raise UserError(
            f"the data set in {folder} names {name} in its {source}, which is outside of the folder and is not read: correct "
            "that, or move the file into the folder."
        )
    return folder / own


@contextmanager
def _readable(problem: str, advice: str, kinds: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turns the errors that damaged datasets were seen to raise into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, *kinds) as error:
        raise UserError(f"{problem} ({first_line(_disk_error_in(error) or error).rstrip('.')}): {advice}.") from error


def _disk_error_in(error: BaseException | None) -> OSError | None:
    """The error of the system behind an error of `datasets`, which does not name it, for example a full disk; None without one."""
    while error is not None and not (isinstance(error, OSError) and error.errno):
        error = error.__cause__
    return error


def _unloadable(source: str) -> Any:
    import datasets
    import yaml

    advice = "check data.path, data.split, data.revision and, for the hub, your connection and `hf auth login`"
    kinds = (datasets.exceptions.DatasetsError, yaml.YAMLError)
    return _readable(f"the data set {source} could not be loaded", advice, kinds)
