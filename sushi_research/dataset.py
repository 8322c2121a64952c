"""The user's images and captions: found, checked, and every file accounted for."""

from __future__ import annotations

import difflib
import json
import os
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from sushi_research.errors import UserError
from sushi_research.files import write_json
from sushi_research.fingerprints import FileMemo, FileState, content_hash, file_state
from sushi_research.images import BadImage, decode
from sushi_research.progress import progress

IMAGES = {".jpg", ".jpeg", ".png", ".webp"}
CAPTIONS = {".txt", ".caption"}
METADATA = "metadata.jsonl"
TABLES = {".parquet", ".arrow"}
# Pictures that people have in their folders, and that must not be passed over in silence.
UNSUPPORTED = set(".arw .avif .bmp .cr2 .dng .gif .heic .heif .jfif .jp2 .jxl .nef .psd .svg .tga .tif .tiff".split())


@dataclass(frozen=True)
class Sample:
    """One image with its caption. `name` is its path below the data folder, or `train[12]`: a row of a data set.

    Width and height, in pixels, are those after the EXIF rotation. An epoch shows the image `repeats` times.
    """

    name: str
    image_hash: str
    caption: str
    width: int
    height: int
    repeats: int
    load: Callable[[], bytes] = field(repr=False, compare=False)

    def read(self) -> bytes:
        """The image file's bytes. Raises UserError when they are not those that were checked."""
        try:
            data = self.load()
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{self.name} could be read before and cannot now ({reason}): put it back.") from error
        if content_hash(data) != self.image_hash:
            raise UserError(f"{self.name} was changed after it was checked: run the same command again.")
        return data


@dataclass(frozen=True)
class Problem:
    """A file, a row or a line that cannot be used, and why."""

    name: str
    reason: str


@dataclass
class Scan:
    """What a data path holds. Samples are sorted by content, so that renaming files changes nothing downstream.

    `notes` are things to know that stop nothing; `ignored` counts files that are neither image nor caption.
    """

    source: str
    samples: list[Sample] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ignored: int = 0


@dataclass(frozen=True)
class _Image:
    """An image before its check. Where there is no usable caption, that problem is on record already."""

    name: str
    caption: str | None
    repeats: int
    path: Path | None
    load: Callable[[], bytes]


def scan(
    path: str | Path,
    *,
    split: str,
    image_column: str,
    caption_column: str,
    revision: str | None,
    memo: FileMemo,
    show_progress: bool,
) -> Scan:
    """Find the images and captions at `path`, and decode every image once (files that `memo` knows: not again).

    `path` is a folder of images, an HF data set's folder (`save_to_disk`, or parquet or arrow files) or a hub id.
    In a folder of images, the caption of x.jpg is in x.txt, x.caption, or a metadata.jsonl as HF's imagefolder
    has it (`file_name` and `text`, or `caption_column`). The images below a folder 10_cats count ten times, as in
    kohya's sd-scripts, up to 999 times: 2024_trip is an ordinary folder. A row with several captions has the first.

    Raises UserError when there is nothing at `path` to train on; single files are named in the scan's problems.
    """
    folder = Path(path).expanduser().absolute()
    if not folder.is_dir():
        _require_hub_id(str(path), folder)
        result = Scan(source=str(path) if revision is None else f"{path}@{revision}")
        images = _rows(result, _load(str(path), split, revision), split, image_column, caption_column)
    else:
        if revision is not None:
            raise UserError(f"data.revision is set, but {path} is a folder, which has no revisions: leave it out.")
        result, has_tables = Scan(source=str(folder)), False
        is_saved = (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()
        if not is_saved:
            images, has_tables = _folder(result, folder, caption_column)
        if is_saved or (has_tables and not images):
            result = Scan(source=str(folder))
            rows = _load_saved(folder, split) if is_saved else _load(str(folder), split, None)
            images = _rows(result, rows, split, image_column, caption_column)
    if not images:
        other = f" ({result.problems[0].name}: {result.problems[0].reason})" if result.problems else ""
        raise UserError(f"data.path: {path} holds no jpg, png or webp image{other}.")
    _check(result, images, memo, show_progress)
    result.samples.sort(key=lambda sample: (sample.image_hash, sample.caption, sample.name))
    result.problems.sort(key=lambda problem: (problem.name, problem.reason))
    twins = defaultdict(list)
    for sample in result.samples:
        twins[sample.image_hash, sample.caption].append(sample.name)
    result.notes += [
        f"{', '.join(names)}: the same image with the same caption; all are used"
        for names in twins.values()
        if len(names) > 1
    ]
    return result


def write_report(scan: Scan, path: Path) -> None:
    """Write data_report.json: every file by name, used or with the reason why not. Raises UserError (disk)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "source": scan.source,
        "counts": {
            "used": len(scan.samples),
            "problems": len(scan.problems),
            "notes": len(scan.notes),
            "ignored": scan.ignored,
        },
        "problems": [{"name": problem.name, "reason": problem.reason} for problem in scan.problems],
        "notes": scan.notes,
        "used": sorted(sample.name for sample in scan.samples),
    }
    write_json(path, report)


def describe_problems(scan: Scan) -> str:
    """The problems for the terminal, a line each, ten at most; empty when there are none."""
    lines = [f"{problem.name}: {problem.reason}" for problem in scan.problems[:10]]
    if len(scan.problems) > 10:
        lines.append(f"and {len(scan.problems) - 10} more, see data_report.json")
    return "\n".join(lines)


def require_clean(scan: Scan, on_bad_file: Literal["stop", "skip"], report_path: Path | None) -> None:
    """Raises UserError when there are problems and they are to stop the run, or when nothing is left to train on."""
    problems = scan.problems
    names = ", ".join(f"{problem.name} ({problem.reason})" for problem in problems[:3])
    names += f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    report = f"; the whole list is in {report_path}" if report_path is not None else ""
    if not scan.samples:
        raise UserError(f"no image in {scan.source} can be used: {names}{report}.")
    if problems and on_bad_file == "stop":
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(
            f"{count} in {scan.source}: {names}{report}; mend them, or leave them out with --data.on_bad_file skip."
        )


def _check(result: Scan, images: list[_Image], memo: FileMemo, show_progress: bool) -> None:
    """Decode what the memo does not know, in as many threads as there are cores, and sort all into the scan."""
    known: list[Any] = [memo.get(image.path) if image.path is not None else None for image in images]
    unknown = [index for index, facts in enumerate(known) if facts is None or "width" not in facts]
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        results = pool.map(_inspect, [images[index] for index in unknown])
        bar = progress(
            results, total=len(unknown), description="checking images", unit="image", disable=not show_progress
        )
        for index, (facts, state) in zip(unknown, bar, strict=True):
            known[index] = facts
            if state is not None:
                memo.put(images[index].path, facts, state)
    finally:  # an interrupted check goes on where it stopped
        pool.shutdown(cancel_futures=True)
        memo.save()
    for image, facts in zip(images, known, strict=True):
        if isinstance(facts, str):
            result.problems.append(Problem(image.name, facts))
        elif image.caption is not None:
            size = (facts["width"], facts["height"])
            result.samples.append(Sample(image.name, facts["hash"], image.caption, *size, image.repeats, image.load))


def _inspect(image: _Image) -> tuple[dict[str, Any] | str, FileState | None]:
    """An image's hash and size with the state of its file before the reading; or why it cannot be used, and None."""
    state = None
    try:
        if image.path is not None:
            if not image.path.is_file():
                return "not a file: a broken link?", None
            state = file_state(image.path)
        data = image.load()
        width, height = decode(data).size
    except BadImage as error:
        return error.reason, None
    except OSError as error:
        return f"cannot be read: {error.strerror or error}", None
    return {"hash": content_hash(data), "width": width, "height": height}, state


def _folder(result: Scan, root: Path, caption_column: str) -> tuple[list[_Image], bool]:
    """The images below a folder with their captions, and whether there are tables of an HF data set as well."""
    images: dict[str, Path] = {}
    sidecars: dict[str, dict[str, Path]] = defaultdict(dict)
    metadata: dict[str, Path] = {}
    stems, has_tables = set(), False
    for name, path in _walk(result, root):
        stem, suffix = posixpath.splitext(name)
        suffix = suffix.lower()
        if suffix in IMAGES | UNSUPPORTED:
            stems.add(stem)
        if suffix in IMAGES:
            images[name] = path
        elif suffix in UNSUPPORTED:
            result.problems.append(Problem(name, f"{suffix} is not supported: convert it to png"))
        elif suffix in CAPTIONS:
            sidecars[stem][name] = path
        elif path.name == METADATA:
            metadata[name] = path
        else:
            result.ignored += 1
            has_tables = has_tables or suffix in TABLES
    captions: dict[str, dict[str, str]] = defaultdict(dict)
    unreadable: dict[str, str] = {}
    for name in images:
        for sidecar, path in sidecars.get(posixpath.splitext(name)[0], {}).items():
            try:
                captions[name][sidecar] = _read_text(path).strip()
            except (OSError, UnicodeDecodeError):
                unreadable[name] = f"its caption cannot be read as UTF-8 text: {sidecar}"
    for name, path in metadata.items():
        for image, source, caption in _metadata(result, name, path, set(images), caption_column):
            captions[image][source] = caption
    for stem in sidecars.keys() - stems:
        result.notes += [f"{name}: a caption without an image" for name in sidecars[stem]]
    found, folders = [], Counter()
    for name, path in images.items():
        repeat_folder, repeats = _repeats(name)
        folders[repeat_folder, repeats] += 1
        reason = unreadable.get(name) or _caption_problem(name, captions[name])
        if repeats == 0:
            reason = f"its folder asks for no repeats: {repeat_folder}"
        if reason is not None:
            result.problems.append(Problem(name, reason))
        caption = next(iter(captions[name].values())) if reason is None else None
        found.append(_Image(name, caption, repeats, path, path.read_bytes))
    result.notes += [
        f"{folder}: {count} images, each shown {repeats} times per epoch"
        for (folder, repeats), count in folders.items()
        if repeats > 1
    ]
    result.notes.sort()
    return found, has_tables


def _walk(result: Scan, root: Path) -> Iterator[tuple[str, Path]]:
    """Every visible file below a folder by its name (relative, with /) and path; a folder reached twice counts once."""

    def name_of(path: str | Path) -> str:
        # Bytes in a name that are no UTF-8 are shown as \udcXX, which every terminal and file can hold.
        name = Path(path).relative_to(root).as_posix()
        return name.encode("utf-8", "backslashreplace").decode()

    def note_unreadable(error: OSError) -> None:
        result.problems.append(Problem(name_of(error.filename), f"cannot be read: {error.strerror}"))

    seen: dict[tuple[int, int], str] = {}
    for folder, folders, files in os.walk(root, onerror=note_unreadable, followlinks=True):
        status = os.stat(folder)
        first = seen.setdefault((status.st_dev, status.st_ino), name_of(folder))
        if first != name_of(folder):
            result.notes.append(f"{name_of(folder)}: the same folder as {first}, read once")
            folders.clear()
            continue
        result.ignored += sum(name.startswith(".") for name in folders + files)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in sorted(name for name in files if not name.startswith(".")):
            path = Path(folder, file)
            yield name_of(path), path


def _read_text(path: Path) -> str:
    return path.read_bytes().decode("utf-8-sig")


def _metadata(
    result: Scan, name: str, path: Path, images: set[str], caption_column: str
) -> Iterator[tuple[str, str, str]]:
    """(image, where it says so, caption) of each sound line of a metadata.jsonl; the others become problems."""

    def problem(where: str, reason: str) -> None:
        result.problems.append(Problem(where, reason))

    try:
        lines = _read_text(path).split("\n")
    except (OSError, UnicodeDecodeError):
        problem(name, "cannot be read as UTF-8 text")
        return
    first: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        source = f"{name} line {number}"
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            problem(source, f"not JSON: {error}")
            continue
        if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
            problem(source, "no file_name")
            continue
        image = posixpath.normpath(posixpath.join(posixpath.dirname(name), entry["file_name"]))
        caption = entry.get(caption_column, entry.get("text"))
        if image not in images:
            problem(source, f"{entry['file_name']} is not among the jpg, png and webp images here")
        elif not isinstance(caption, str):
            keys = " nor ".join(dict.fromkeys((caption_column, "text")))
            problem(source, f"no caption for {image}: {keys} is not a text")
        else:
            if first.setdefault(image, number) != number:
                problem(source, f"a second entry for {image}: the first is line {first[image]}")
            yield image, source, caption.strip()


def _caption_problem(name: str, captions: dict[str, str]) -> str | None:
    """Why an image has no caption that can be used, from its captions by their source; None when it has one."""
    if not captions:
        stem = posixpath.splitext(name)[0]
        return f"no caption: there is no {stem}.txt, {stem}.caption or entry in a {METADATA}"
    if len(set(captions.values())) > 1:
        return f"captions that differ: {' and '.join(captions)}"
    if not all(captions.values()):
        return f"its caption is empty: {' and '.join(captions)}"
    return None


def _repeats(name: str) -> tuple[str, int]:
    """The nearest folder above an image that is named like 10_cats, and its number; ("", 1) without such a folder."""
    for folder in map(str, PurePosixPath(name).parents):
        match = re.match(r"(\d{1,3})_.", posixpath.basename(folder))
        if match:
            return folder, int(match[1])
    return "", 1


def _rows(result: Scan, rows: Any, split: str, image_column: str, caption_column: str) -> list[_Image]:
    """The rows of a `datasets.Dataset`; their images stay undecoded."""
    import datasets

    columns = ", ".join(rows.column_names)
    for key, column in (("data.image_column", image_column), ("data.caption_column", caption_column)):
        if column not in rows.column_names:
            raise UserError(f"{result.source} has no column {column}: set {key} to one of {columns}.")
    try:
        cells = rows.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError):
        message = f"the column {image_column} of {result.source} holds no images: set data.image_column to one of"
        raise UserError(f"{message} {columns}.") from None
    images, several = [], 0
    for index, caption in enumerate(rows[caption_column][:]):
        name = f"{split}[{index}]"
        if isinstance(caption, list) and caption:
            several += len(caption) > 1
            caption = caption[0]
        caption = caption.strip() if isinstance(caption, str) else None
        if not caption:
            reason = "no caption" if caption is None else "its caption is empty"
            result.problems.append(Problem(name, f"{reason}: column {caption_column}"))
        images.append(_Image(name, caption or None, 1, None, partial(_read_cell, cells, image_column, index)))
    if several:
        result.notes.append(f"{several} rows have several captions: the first is used")
    return images


def _read_cell(cells: Any, column: str, index: int) -> bytes:
    """The bytes of a row's image file. Raises BadImage where there is none, OSError where it cannot be read."""
    cell = cells[index][column]
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise BadImage("the row has no image")
    return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()


def _load_saved(folder: Path, split: str) -> Any:
    """The split of what `save_to_disk` wrote; a single `Dataset` is the split that it came from, or else "train"."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, LookupError, TypeError) as error:  # all that damaged folders were seen to raise
        raise UserError(f"the data set in {folder} cannot be read ({_first_line(error)}): save it again.") from error
    if isinstance(saved, datasets.Dataset):
        own = str(saved.split or "train")
        saved = {own: saved, own.partition("[")[0]: saved}
    if split not in saved:
        raise UserError(f"{folder} has no split {split}: set data.split to one of {', '.join(saved)}.")
    return saved[split]


def _load(source: str, split: str, revision: str | None) -> Any:
    """A split of a data set on the hub, or of a folder with parquet or arrow files."""
    import datasets

    try:
        return datasets.load_dataset(source, split=split, revision=revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"the data set {source} could not be loaded ({_first_line(error)}): check data.path, data.split,"
            " data.revision and, for the hub, your connection and `hf auth login`."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _require_hub_id(text: str, path: Path) -> None:
    """Raises UserError unless `text`, which is no folder, can only be meant as a hub id."""
    if path.exists():
        raise UserError(f"data.path: {text} is a file: give a folder of images, or a hub id such as org/name.")
    if not path.parent.is_dir() and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", text):
        return
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = "".join(f" (there is {path.parent / name})" for name in difflib.get_close_matches(path.name, siblings, n=1))
    raise UserError(f"data.path: there is no {text}{near}: give a folder of images, or a hub id such as org/name.")
