"""Finds and checks the user's images and captions, and reports on every file."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sushi_research import caption_text
from sushi_research.data import findings
from sushi_research.data.hf_dataset import find_in_table, require_hub_id
from sushi_research.data.image_folder import find_in_folder
from sushi_research.data.images import BadImage, decode_and_describe
from sushi_research.data.near_duplicates import fingerprint
from sushi_research.data.own_outputs import require_apart
from sushi_research.data.samples import FoundImage, Problem, Sample, Scan
from sushi_research.data.tables import open_folder, open_hub, open_saved
from sushi_research.data.walk import note_links
from sushi_research.errors import UserError, some
from sushi_research.files import make_folder, write_json
from sushi_research.fingerprints import FileState, HashCache, content_hash, file_state
from sushi_research.progress import progress
from sushi_research.user_files import UnreadableFile


def scan(
    path: str | Path,
    *,
    split: str,
    image_column: str,
    caption_column: str,
    revision: str | None,
    hash_cache: HashCache,
    show_progress: bool,
    outputs: Mapping[Path, str] | None = None,
    key: str = "data.path",
) -> Scan:
    """Finds the images and captions at `path`, and decodes every image once (except files that `hash_cache` knows).

    `path` is a folder of images, the folder of an HF dataset (`save_to_disk`, or parquet or arrow files) or a hub id. In a
    folder of images, the caption of x.jpg is in x.txt, x.caption, or a metadata.jsonl as in HF's imagefolder
    (`file_name` and `text`, or `caption_column`). Images below a folder 10_cats are repeated ten times, as in kohya's
    sd-scripts. The maximum is 999, so 2024_trip is an ordinary folder. Of several captions in a row, or several lines in a caption,
    the first is used, and a note says so.

    What this program wrote below the folder is skipped and noted: folders of runs, caches, evaluations and comparisons, which
    `own_outputs` recognizes, and those in `outputs` (path -> what it is), which may not exist yet. `key` is the setting that
    `path` is the value of, for messages.

    Raises UserError if there is nothing to train on at `path`. Problems with single files are listed in the scan.
    """
    folder = Path(path).absolute()
    if not os.path.isdir(folder):
        require_hub_id(str(path), folder, key)
        result = Scan(source=str(path) if revision is None else f"{path}@{revision}", is_table=True)
        images = find_in_table(result, open_hub(str(path), split, revision), split, image_column, caption_column)
    else:
        if revision is not None:
            raise UserError(f"data.revision is set, but {path} is a folder, which has no revisions: leave it out.")
        result, has_tables = Scan(source=str(folder)), False
        is_saved = (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()
        if not is_saved:
            images, has_tables = find_in_folder(result, folder, caption_column, outputs or {})
        if is_saved or (has_tables and not images):
            if not is_saved:
                require_apart(key, folder, result.skipped, outputs or {})
            table = open_saved(folder, split) if is_saved else open_folder(folder, split)
            result = Scan(source=str(folder), is_table=True)
            note_links(result, folder, table.files)
            images = find_in_table(result, table, split, image_column, caption_column)
    if not images:
        others = [f"{problem.name}: {problem.reason}" for problem in result.problems] + result.skipped
        other = f" ({others[0]})" if others else ""
        raise UserError(f"{key}: {path} holds no image{other}.")
    _check(result, images, hash_cache, show_progress)
    result.samples.sort(key=lambda sample: (sample.image_hash, sample.caption, sample.name))
    result.problems.sort(key=lambda problem: (problem.name, problem.reason))
    result.notes += caption_text.note_replaced(sorted((sample.name, sample.caption) for sample in result.samples))
    copies = defaultdict(list)
    for sample in result.samples:
        copies[sample.image_hash, sample.caption].append(sample.name)
    result.notes += [
        f"{some(names, 3)}: the same image with the same caption; all are used"
        for names in copies.values()
        if len(names) > 1
    ]
    return result


def write_report(scan: Scan, path: Path, evaluation: Scan | None = None, prior: Scan | None = None) -> None:
    """Writes data_report.json: every file by name, either as used or with the reason why it is not.

    `evaluation` and `prior` are the scans of evaluation.path and evaluation.prior_path, whose names are their own. Creates the
    folder if necessary. Raises CannotWrite if that fails, or if the file cannot be written.
    """
    make_folder(path.parent)
    others = {"evaluation": evaluation, "prior_path": prior}
    write_json(path, _report(scan) | {key: _report(other) if other else None for key, other in others.items()})


def _report(scan: Scan) -> dict[str, Any]:
    return {
        "source": scan.source,
        "counts": {
            "used": len(scan.samples),
            "problems": len(scan.problems),
            "cropped": len(scan.cropped),
            "notes": len(scan.notes),
            "ignored": scan.ignored,
            "held_out": len(scan.held_out),
            "prior": len(scan.prior),
        },
        "problems": [{"name": problem.name, "reason": problem.reason} for problem in scan.problems],
        "cropped": [asdict(crop) for crop in scan.cropped],
        "notes": scan.notes,
        "used": sorted(sample.name for sample in scan.samples),
        "held_out": scan.held_out,
        "prior": scan.prior,
    }


def require_clean(scan: Scan, on_bad_file: Literal["stop", "skip"], report_path: Path | None) -> None:
    """Raises UserError if there are problems and `on_bad_file` is "stop", or if no usable image remains."""
    problems = scan.problems
    names = some([f"{problem.name} ({problem.reason})" for problem in problems], findings.SHOWN_PROBLEMS)
    report = f"; the whole list is in {report_path}" if report_path is not None else ""
    if not scan.samples:
        raise UserError(f"no image in {scan.source} can be used: {names}{report}; fix them (docs/data.md).")
    if problems and on_bad_file == "stop":
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(
            f"{count} in {scan.source}: {names}{report}; fix them, or skip them with --data.on_bad_file skip."
        )


def _check(result: Scan, images: list[FoundImage], hash_cache: HashCache, show_progress: bool) -> None:
    """Decodes the images that are not in the hash cache, one thread per core, and adds all to the scan's samples or problems."""
    known: list[Any] = [hash_cache.get(image.path) if image.path is not None else None for image in images]
    unknown = [index for index, facts in enumerate(known) if facts is None or "width" not in facts]
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        results = pool.map(_inspect, [images[index] for index in unknown])
        bar = progress(
            results,
            total=len(unknown),
            description="checking images",
            unit="image",
            disable=not (show_progress and unknown),
        )
        for index, (facts, state) in zip(unknown, bar, strict=True):
            known[index] = facts
            if state is not None:
                hash_cache.put(images[index].path, facts, state)
    finally:  # so that an interrupted check can continue where it stopped
        pool.shutdown(cancel_futures=True)
        hash_cache.save()
    used: dict[str, dict[str, Any]] = {}
    for image, facts in zip(images, known, strict=True):
        if isinstance(facts, str):
            result.problems.append(Problem(image.name, facts))
        elif image.caption is not None:
            size = (facts["width"], facts["height"])
            image_fingerprint = int(facts["fingerprint"], 16)
            sample = Sample(
                image.name,
                facts["hash"],
                image.caption,
                *size,
                image.repeats,
                image.load,
                image_fingerprint,
                bool(facts["converted_from"]),
            )
            result.samples.append(sample)
            used[image.name] = facts
    result.notes += _colour_notes(used)


def _colour_notes(used: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Notes on what was done to the colours of the used images, given their facts by name."""
    kinds = defaultdict(list)
    for name, facts in used.items():
        if facts["converted_from"]:
            kinds[f"converted to sRGB from {facts['converted_from']}"].append(name)
        if facts["transparent"]:
            kinds["transparent, and laid over white"].append(name)
    notes = [
        f"{len(names)} {'image is' if len(names) == 1 else 'images are'} {kind} (first: {min(names)})"
        for kind, names in sorted(kinds.items())
    ]
    return notes + [f"{name}: {facts['ignored']}" for name, facts in sorted(used.items()) if facts["ignored"]]


def _inspect(image: FoundImage) -> tuple[dict[str, Any] | str, FileState | None]:
    """(facts about an image; state of its file before reading), or (reason why it is unusable, None)."""
    state = None
    try:
        if image.path is not None:
            if not image.path.is_file():
                return "not a file: a broken link?", None
            state = file_state(image.path)
        data = image.load()
        decoded = decode_and_describe(data)
    except (BadImage, UnreadableFile) as error:
        return error.reason, None
    except OSError as error:
        return f"cannot be read: {error.strerror or error}", None
    return {
        "hash": content_hash(data),
        "width": decoded.image.width,
        "height": decoded.image.height,
        "fingerprint": f"{fingerprint(np.asarray(decoded.image)):x}",
        "converted_from": decoded.converted_from,
        "transparent": decoded.transparent,
        "ignored": decoded.ignored,
    }, state
