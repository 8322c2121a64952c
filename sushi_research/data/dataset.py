"""Finds and checks the user's images and captions, and reports on every file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.compute

from sushi_research import stopping
from sushi_research.config.masks import MaskSection
from sushi_research.data import findings, mask_scan
from sushi_research.data.assembling import assemble, from_columns, to_columns
from sushi_research.data.boxes import with_boxes
from sushi_research.data.checking import check, decoders
from sushi_research.data.folder_files import FolderFiles, list_files
from sushi_research.data.found import CaptionRule
from sushi_research.data.hf_dataset import TableImages, columns_of, find_in_table, place_of, require_hub_id
from sushi_research.data.image_folder import ImageFiles, find_in_folder
from sushi_research.data.own_outputs import require_apart
from sushi_research.data.samples import Samples
from sushi_research.data.scan import Scan
from sushi_research.data.tables import open_folder, open_hub, open_saved
from sushi_research.data.walk import note_links
from sushi_research.errors import UserError
from sushi_research.files import make_folder, write_json
from sushi_research.fingerprints import HashCache, content_hash
from sushi_research.remembered import Array, Remembered

# Increment it when the same files give other samples, problems or notes.
_VERSION = 1


def scan(
    path: str | Path,
    *,
    split: str,
    image_column: str,
    caption_column: str,
    revision: str | None,
    remembered: Remembered,
    show_progress: bool,
    outputs: Mapping[Path, str] | None = None,
    key: str = "data.path",
    caption_source: Literal["files", "folder", "name"] = "files",
    allow_empty: bool = False,
    box_column: str | None = None,
    masks: MaskSection | None = None,
    measured: bool = False,
) -> Scan:
    """Finds the images and captions at `path`, and decodes every image once (except those that are `remembered`).

    `path` is a folder of images, the folder of an HF dataset (`save_to_disk`, or parquet or arrow files) or a hub id. In a
    folder of images, the caption of x.jpg is in x.txt, x.caption, or a metadata.jsonl as in HF's imagefolder
    (`file_name` and `text`, or `caption_column`). Images below a folder 10_cats are repeated ten times, as in kohya's
    sd-scripts. The maximum is 999, so 2024_trip is an ordinary folder. All lines of a caption, or all texts of a row, are captions.

    `caption_source` and `allow_empty` are those of `CaptionRule`. `box_column`, if given, has the box of each image that is used.
    `masks` says where the images have masks. Those of images that are only `measured` are not read, but mask files next to them
    are no images either.

    What this program wrote below the folder is skipped and noted: folders of runs, caches, evaluations and comparisons, which
    `own_outputs` recognizes, and those in `outputs` (path -> what it is), which may not exist yet. `key` is the setting that
    `path` is the value of, for messages.

    Raises UserError if there is nothing to train on at `path`. Problems with single files are listed in the scan.
    """
    folder, captions = Path(path).absolute(), CaptionRule(caption_column, caption_source, allow_empty)
    if not os.path.isdir(folder):
        require_hub_id(str(path), folder, key)
        result = Scan(source=str(path) if revision is None else f"{path}@{revision}", is_table=True)
        table = open_hub(str(path), split, revision)
    else:
        if revision is not None:
            raise UserError(f"data.revision is set, but {path} is a folder, which has no revisions: leave it out.")
        result, table = Scan(source=str(folder)), None
        apart, beside = dict(outputs or {}), masks is not None and masks.source == "files" and masks.folder is None
        if masks is not None and masks.folder is not None:
            apart[Path(masks.folder)] = "the folder of masks"
        is_saved = (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()
        files = FolderFiles(str(folder)) if is_saved else list_files(result, folder, apart, with_masks=beside)
        if is_saved or (files.has_tables and not files.images.names):
            if not is_saved:
                require_apart(key, folder, result.skipped, outputs or {})
            hashes = HashCache(remembered.folder / "tables.json")
            table = (open_saved if is_saved else open_folder)(folder, split, hashes)
            if stopping.is_first():
                hashes.save()
            result = Scan(source=str(folder), is_table=True)
            note_links(result, folder, table.files)
    images = files if table is None else columns_of(result, table, image_column, captions)
    if isinstance(images, FolderFiles):
        count = _scan_folder(result, images, captions, box_column, remembered, show_progress)
    else:
        count = _scan_table(result, images, split, captions, box_column, remembered, show_progress)
    if not count:
        others = [f"{problem.name}: {problem.reason}" for problem in result.problems[:1]]
        others += result.skipped or result.notes
        other = f" ({others[0]})" if others else ""
        raise UserError(f"{key}: {path} holds no image{other}.")
    if masks is not None and not measured:
        mask_scan.add_masks(result, images, masks, remembered, show_progress)
    return result


def _scan_folder(
    result: Scan,
    files: FolderFiles,
    captions: CaptionRule,
    box_column: str | None,
    remembered: Remembered,
    show_progress: bool,
) -> int:
    """Completes the scan of a folder of images. Returns how many image files there are."""
    key = files.key([_VERSION, decoders(), asdict(captions), box_column, os.path.basename(files.root)])
    known = _find(remembered, "folder", key)
    if known is None:
        part = Scan(result.source)
        found = find_in_folder(part, files, captions, remembered, box_column)
        if box_column is not None:
            found = with_boxes(part, found, files, box_column)
        of_files, part.notes = findings.capped(part.notes), []
        facts = check(found.place, found.names, remembered, show_progress)
        assemble(part, found, facts)
        known = to_columns(part) | {"notes_of_files": pyarrow.array(of_files, pyarrow.large_string())}
        if files.settled and found.lasting and not facts.passing:
            known = _put(remembered, "folder", key, known)
    result.notes = sorted([*result.notes, *known["notes_of_files"].to_pylist()])
    from_columns(result, known, ImageFiles(files.root, files.images.column, files.odd))
    return len(files.images.names)


def _scan_table(
    result: Scan,
    images: TableImages,
    split: str,
    captions: CaptionRule,
    box_column: str | None,
    remembered: Remembered,
    show_progress: bool,
) -> int:
    """Completes the scan of a table. Returns how many rows it has."""
    place = place_of(images, result.source, remembered)
    options = [_VERSION, decoders(), place.name, split, asdict(captions), box_column, place.version]
    key = content_hash(json.dumps(options).encode())
    known = _find(remembered, "table", key)
    if known is None:
        part = Scan(result.source)
        found = find_in_table(part, images, place, split, captions)
        if box_column is not None:
            found = with_boxes(part, found, images, box_column)
        facts = check(found.place, found.names, remembered, show_progress)
        assemble(part, found, facts)
        known = to_columns(part)
        if place.settled.all() and not facts.passing:
            known = _put(remembered, "table", key, known)
    from_columns(result, known, images)
    return len(images.table)


# The largest column is in a file of its own: it is seldom read, and the other file can be unmapped when images were held out.
_APART = "fingerprints"


def _find(remembered: Remembered, kind: str, key: str) -> dict[str, Array] | None:
    """The columns of a scan that are remembered."""
    known, apart = remembered.find(kind, key), remembered.find(f"{kind}-{_APART}", key)
    return None if known is None or apart is None else known | apart


def _put(remembered: Remembered, kind: str, key: str, columns: Mapping[str, Array]) -> dict[str, Array]:
    """Remembers the columns of a scan."""
    most = {name: column for name, column in columns.items() if name != _APART}
    return remembered.put(kind, key, most) | remembered.put(f"{kind}-{_APART}", key, {_APART: columns[_APART]})


def write_report(scan: Scan, path: Path, evaluation: Scan | None = None, prior: Scan | None = None) -> None:
    """Writes data_report.json: every file by name, either as used or with the reason why it is not.

    Each list has `findings.LISTED` entries at most; the counts are of all.

    `evaluation` and `prior` are the scans of evaluation.path and evaluation.prior_path, whose names are their own. Creates the
    folder if necessary. Raises CannotWrite if that fails, or if the file cannot be written.
    """
    make_folder(path.parent)
    others = {"evaluation": evaluation, "prior_path": prior}
    write_json(path, _report(scan) | {key: _report(other) if other else None for key, other in others.items()})


def _report(scan: Scan) -> dict[str, Any]:
    samples = Samples.of(scan.samples)
    names = samples.names
    if len(samples) > findings.LISTED:
        table = pyarrow.table({"name": names})
        names = names.take(pyarrow.compute.select_k_unstable(table, findings.LISTED, [("name", "ascending")]))
    return {
        "source": scan.source,
        **({"sets": scan.sets} if scan.sets else {}),
        "counts": {
            "used": len(samples),
            "problems": len(scan.problems),
            "cropped": len(scan.cropped),
            "notes": len(scan.notes),
            "ignored": scan.ignored,
            "held_out": len(scan.held_out),
            "prior": len(scan.prior),
        },
        "problems": [{"name": problem.name, "reason": problem.reason} for problem in scan.problems[: findings.LISTED]],
        "cropped": [asdict(crop) for crop in scan.cropped[: findings.LISTED]],
        "notes": scan.notes[: findings.LISTED],
        "used": sorted(names.to_pylist()),
        "held_out": scan.held_out[: findings.LISTED],
        "prior": scan.prior[: findings.LISTED],
    }


def require_clean(scan: Scan, on_bad_file: Literal["stop", "skip"], report_path: Path | None) -> None:
    """Raises UserError if there are problems and `on_bad_file` is "stop", or if no usable image remains."""
    problems = scan.problems
    shown = [f"{problem.name} ({problem.reason})" for problem in problems[: findings.SHOWN_PROBLEMS]]
    more = len(problems) - len(shown)
    names = ", ".join(shown) + (f" and {more} more" if more else "")
    report = ""
    if report_path is not None:
        whole = "the whole list is" if len(problems) <= findings.LISTED else f"the first {findings.LISTED:,} are"
        report = f"; {whole} in {report_path}"
    if not scan.samples:
        fix = "fix them (docs/data.md)"
        if all(problem.reason.startswith("no caption") for problem in problems[: findings.SHOWN_PROBLEMS]) and problems:
            fix = "write captions, or set captions.source or captions.allow_empty (docs/captions.md)"
        raise UserError(f"no image in {scan.source} can be used: {names}{report}; {fix}.")
    if problems and on_bad_file == "stop":
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(
            f"{count} in {scan.source}: {names}{report}; fix them, or skip them with --data.on_bad_file skip."
        )
