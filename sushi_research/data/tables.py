"""Opens HF datasets: a saved folder, tables in a folder, or a hub id. A dataset's own text names only files of that dataset.

The `datasets` library converts tables into a copy in the user's cache, which it finds again by the tables' paths and modification
times (`DataFilesList.origin_metadata`). A table that was replaced on the same date would give its old rows, so our copies are in a
folder that is named after the tables' content. A saved folder is read in place, and a hub dataset's copy is named after its commit.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path, PurePath
from typing import Any

from sushi_research.config.yaml12 import parse_yaml
from sushi_research.data.images import MAX_BYTES, BadImage
from sushi_research.data.names import in_any_form
from sushi_research.errors import UserError, first_line
from sushi_research.fingerprints import HashCache, content_hash, file_hash, file_state, folder_hash
from sushi_research.progress import progress
from sushi_research.user_files import open_regular, parse_json, read_regular

# Of the YAML text of a card. It can name all classes of a column: ImageNet-21k has 21,841, as keys and values. PyYAML reads it in
# some seconds.
_MOST_LETTERS, _MOST_VALUES = 2**20, 100_000


@dataclass(frozen=True)
class Table:
    """The rows of a split. `folders` are those that hold the dataset's own files; relative paths start at the first of them.

    `content` differs if the rows differ: it tells the dataset's files, which splits have them, in their order, and the split, or is
    the fingerprint of `datasets`.
    `open` gives the rows. They are opened when they are first needed: of a table whose `shape` (column names, number of rows) and
    images are known, nothing is read at a start. `about` is a hash of what else says how the files are read.
    """

    open: Callable[[], Any]
    folders: tuple[Path, ...]
    content: str
    files: tuple[Path, ...] = ()
    shape: tuple[tuple[str, ...], int] | None = None
    about: str = ""

    @cached_property
    def rows(self) -> Any:
        return self.open()

    @property
    def column_names(self) -> tuple[str, ...]:
        return tuple(self.rows.column_names) if self.shape is None else self.shape[0]

    def __len__(self) -> int:
        return len(self.rows) if self.shape is None else self.shape[1]


def open_saved(folder: Path, split: str, hashes: HashCache) -> Table:
    """A split of a dataset from `save_to_disk`. A single `Dataset` counts as the split it came from, or "train" if unknown.

    `hashes` remembers the files that were hashed and found sound before, and the shape of the table.
    """
    rows = partial(_saved_rows, folder, split)
    with _readable(*_unreadable(folder)):
        described = [folder / name for name in ("dataset_dict.json", "state.json") if (folder / name).exists()][0]
        state, shapes = file_state(described), (hashes.get(described) or {}).get("shapes", {})
        files, about = _saved_files(folder)
        for file in files:
            _require_sound(file, hashes)
        content = _content(files, hashes)
    place = content_hash(f"{content} {about} {split}".encode())
    if place not in shapes:
        opened = rows()
        shapes = shapes | {place: [opened.column_names, len(opened)]}
        hashes.put(described, {"shapes": shapes}, state)
    columns, size = shapes[place]
    # A part is a folder of the split, and its state.json has the order of its files.
    order = _hash_of([file.relative_to(folder).as_posix() for file in files])
    return Table(rows, (folder,), f"{content} {order} {split}", files, (tuple(columns), size), about)


def _saved_rows(folder: Path, split: str) -> Any:
    """The rows of a split of a saved dataset. UserError if it cannot be read, or has no such split."""
    import datasets

    with _readable(*_unreadable(folder)):
        saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.Dataset):
        own = str(saved.split or "train")
        saved = {own: saved, own.partition("[")[0]: saved}
    if split not in saved:
        raise UserError(f"{folder} has no split {split}: set data.split to one of {', '.join(saved)}.")
    return saved[split]


def _unreadable(folder: Path) -> tuple[str, str]:
    """The arguments of `_readable` for a saved dataset."""
    return f"the data set in {folder} cannot be read", "save it again"


def _itself(rows: Any) -> Any:
    """Opens a table that is open."""
    return rows


def open_folder(folder: Path, split: str, hashes: HashCache) -> Table:
    """A split of the parquet, arrow or WebDataset's tar files in a folder. Raises UserError if it cannot be loaded, or names files
    elsewhere.

    `hashes` remembers the files that were hashed and found sound before.
    """
    import datasets

    advice = f"check data.split, and the files in {folder}"
    if any(name.endswith(".tar") for name in os.listdir(folder)):
        advice += "; a tar file needs one image of the same type in each sample (WebDataset): otherwise unpack it"
    with _readable(f"the data set {folder} could not be loaded", advice):
        parts = _table_files(folder)
        files = [file for part in parts.values() for file in part]
        for file in files:
            open_regular(file).close()
            if file.suffix == ".arrow":
                _require_sound(file, hashes)
        content = _content(files, hashes)
        copies = Path(datasets.config.HF_DATASETS_CACHE) / "by_content" / content
        rows = datasets.load_dataset(str(folder), split=split, cache_dir=str(copies))
        # A file that was changed in the meantime has another state, and one that was changed just before has none.
        if _content(files, hashes) != content:
            shutil.rmtree(copies, ignore_errors=True)
            raise UserError(f"the tables in {folder} were changed while they were read: run the same command again.")
    # The folder's README.md may give the same files to other splits.
    order = _hash_of({name: [file.relative_to(folder).as_posix() for file in part] for name, part in parts.items()})
    return Table(partial(_itself, rows), (folder, copies), f"{content} {order} {split}", tuple(files))


def open_hub(name: str, split: str, revision: str | None) -> Table:
    """A split of a hub dataset. Raises UserError if it cannot be loaded."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    advice = "check its name, split and revision, your connection and `hf auth login`"
    with _readable(f"the data set {name} could not be loaded", advice):
        rows = datasets.load_dataset(name, split=split, revision=revision)
    # What was downloaded: the files of this repository, and what `datasets` unpacked.
    own = Path(HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}"
    return Table(
        partial(_itself, rows), (own, Path(datasets.config.HF_DATASETS_CACHE) / "downloads"), rows._fingerprint
    )


def read_image(cell: dict[str, Any] | None, folders: tuple[Path, ...]) -> bytes:
    """The bytes of an image cell: its `bytes`, or else those of the file at its path (`path_of_cell`).

    Raises BadImage if there is no image or the file is elsewhere, OSError if it cannot be read.
    """
    if cell is not None and cell["bytes"] is not None:
        return cell["bytes"]
    path = path_of_cell(cell, folders)
    if path.exists() and not path.is_file():
        raise BadImage(f"its image {cell['path']} is not a file")
    if path.stat().st_size > MAX_BYTES:
        raise BadImage(f"its image {cell['path']} has more than {MAX_BYTES:,} bytes")
    return path.read_bytes()


def path_of_cell(cell: dict[str, Any] | None, folders: tuple[Path, ...]) -> Path:
    """The file that an image cell without bytes names, links resolved. It must be in one of `folders`.

    A dataset that was downloaded must not be able to name a private file of this machine: training, its sample images and W&B
    would carry it away. Raises BadImage if there is no image or the file is elsewhere.
    """
    if cell is None or cell["path"] is None:
        raise BadImage("the row has no image")
    name = cell["path"]
    if "://" in name or "\0" in name:
        raise BadImage(f"its image is {name}, which is not a file: store the image itself in the row")
    path = Path(os.path.realpath(in_any_form(folders[0], name)))
    if not any(path.is_relative_to(os.path.realpath(folder)) for folder in folders):
        raise BadImage(
            f"its image {name} is outside of the data set and is not read: store the image itself in the row, "
            "or move it into the data set's folder"
        )
    return path


def _content(files: Sequence[Path], hashes: HashCache) -> str:
    """`folder_hash` of the files of a dataset; large ones with their progress, because each byte is read once."""
    unknown = {file: file.stat().st_size for file in files if "hash" not in (hashes.get(file) or {})}
    total = sum(unknown.values())
    with progress(total=total, description="hashing the tables", unit="B", scale=True, disable=total < 2**30) as bar:
        for file, size in unknown.items():
            file_hash(file, hashes)
            bar.update(size)
    return folder_hash(list(files), hashes)


def _hash_of(value: Any) -> str:
    return content_hash(json.dumps(value).encode())


def _table_files(folder: Path) -> dict[str, list[Path]]:
    """The files that `datasets` would read for each split of the folder: those it finds, or those that its README.md names."""
    import datasets

    for source, name in _named_in_cards(folder):  # before `datasets` looks for them, which may ask a server
        _own_file(folder, name, source)
    found = datasets.load_dataset_builder(str(folder)).config.data_files
    return {str(split): [_own_file(folder, name, "README.md") for name in names] for split, names in found.items()}


def _named_in_cards(folder: Path) -> Iterator[tuple[str, str]]:
    """(card, pattern) of each `data_files` and `data_dir` of the two files in which `datasets` looks for them."""
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    for source in ("README.md", ".huggingface.yaml"):
        if not (folder / source).is_file():
            continue
        text = read_regular(folder / source).decode()
        block = REGEX_YAML_BLOCK.search(text) if source == "README.md" else None
        # `datasets` parses the same text, and would take minutes over aliases of aliases: what it gets is checked here.
        text = block[2] if block else "" if source == "README.md" else text
        if len(text) > _MOST_LETTERS:
            raise UserError(f"the YAML text of {folder / source} has more than {_MOST_LETTERS:,} letters: shorten it.")
        # `datasets` reads a card that has a key twice, too.
        content = parse_yaml(text, str(folder / source), unique_keys=False, most_values=_MOST_VALUES)
        if content is not None and not isinstance(content, dict):
            raise UserError(f"the YAML text of {folder / source} is not a mapping: correct or remove it.")
        yield from ((source, name) for name in _patterns(content))


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


def _saved_files(folder: Path) -> tuple[tuple[Path, ...], str]:
    """The files that `load_from_disk` reads for the rows of a saved Dataset or DatasetDict, and a hash of what it knows of them."""
    parts, found, about = [folder], [], []
    if (folder / "dataset_dict.json").exists():
        about.append(_read_json(folder / "dataset_dict.json"))
        parts = [_own_file(folder, split, "dataset_dict.json") for split in about[0]["splits"]]
    for part in parts:
        state = _read_json(part / "state.json")
        about += [state, _read_json(part / "dataset_info.json")]
        found += [_own_file(part, file["filename"], "state.json") for file in state["_data_files"]]
    return tuple(found), _hash_of(about)


def _read_json(path: Path) -> Any:
    return parse_json(read_regular(path), str(path), "save the data set again")


def _require_sound(file: Path, hashes: HashCache) -> None:
    """Raises UserError unless all offsets and texts of an Arrow file are valid.

    Arrow maps such a file into memory and reads it as it is: an offset beyond its end would end the process. The check reads the
    offsets and texts, not the images.
    """
    import pyarrow

    open_regular(file).close()
    state, facts = file_state(file), hashes.get(file) or {}
    if facts.get("sound"):
        return
    rows, most_rows = 0, 8 * file.stat().st_size
    try:
        with pyarrow.memory_map(str(file)) as source:
            try:
                batches = pyarrow.ipc.open_stream(source)
            except (OSError, pyarrow.ArrowInvalid):
                reader = pyarrow.ipc.open_file(source)
                batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
            for batch in batches:
                rows += batch.num_rows
                # A column of nothing takes no bytes, whatever number of rows it says it has.
                if rows > most_rows:
                    raise ValueError(f"it cannot have {rows:,} rows")
                batch.validate(full=True)
    except (OSError, ValueError, TypeError, RuntimeError, LookupError, MemoryError) as error:
        reason = str(first_line(error)).rstrip(".")
        raise UserError(f"the table {file} is damaged ({reason}): make it again, or download it again.") from None
    hashes.put(file, facts | {"sound": True}, state)


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
def _readable(problem: str, advice: str) -> Iterator[None]:
    """Turns the errors of libraries that read a dataset into a UserError. Damaged ones were seen to raise nearly any exception."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{problem} ({first_line(_disk_error_in(error) or error).rstrip('.')}): {advice}.") from error


def _disk_error_in(error: BaseException | None) -> OSError | None:
    """The error of the system behind an error of `datasets`, which does not name it, for example a full disk; None without one."""
    while error is not None and not (isinstance(error, OSError) and error.errno):
        error = error.__cause__
    return error
