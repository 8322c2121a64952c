"""Writes the results of scripts/evaluate.py: one folder for the base and for each adapter at each LoRA scale, which
compare_runs.py reads like a run folder; and the sweep over LoRA scales as a table, a plot and an image grid."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sushi_research.adapters.chosen_step import chosen_step
from sushi_research.adapters.labels import file_name_key, label_of, labels_of
from sushi_research.config.suggestions import word
from sushi_research.errors import UserError, printable
from sushi_research.evaluation.measured_sets import MeasuredSets
from sushi_research.evaluation.results import Results
from sushi_research.evaluation.summary import Losses, summary, with_error
from sushi_research.evaluation.validation_set import ValidationSet
from sushi_research.files import make_folder, remove, write_atomic, write_image, write_json
from sushi_research.fingerprints import content_hash
from sushi_research.runs import provenance
from sushi_research.runs.run_folder import RESULT_FILES
from sushi_research.sampling import plots, sample_grids

# The step under which an adapter file's results are stored; the base's are stored under 0.
STEP = 1
# Names that no adapter's folder may have: what else is in `output`, and those that lead out of it.
RESERVED = ("base", "evaluation.json", "evaluation.md", "grid.png", "lora_scales.png", ".", "..")


@dataclass(frozen=True)
class Result:
    """One evaluated state: what was measured of it, by the names of `MeasuredSets`, and images in the order of `rows`."""

    name: str
    lora_scale: float
    found: Losses
    rows: Sequence[tuple[str, str]]
    pictures: Sequence[Image.Image]


def folder_names(
    paths: Sequence[str], lora_scales: Sequence[float], output: Path | None = None
) -> dict[tuple[int, float], str]:
    """(number of the file, LoRA scale) -> folder name in `output`: the file's label (`labels_of`) and the LoRA scale if not 1.

    No two of them are one folder, and none is that of another adapter which was evaluated into `output` earlier.
    """
    suffixes = {scale: "" if scale == 1 else f"-scale-{_short(scale)}" for scale in lora_scales}

    labels: list[str] = []
    taken = [*RESERVED]

    def is_free(label: str, digest: str) -> bool:
        names = [f"{label}{suffix}" for suffix in suffixes.values()]
        others = {file_name_key(name) for name in taken}
        return not any(
            file_name_key(name) in others or (output and _holds(output / name) not in (None, digest)) for name in names
        )

    for path in paths:
        # A scale makes a label into another name, which may be the label of another file.
        others = [label_of(Path(other)) for other in paths if other != path]
        [label] = labels_of([Path(path)], [*taken, *others], is_free)
        labels.append(label)
        taken += [f"{label}{suffix}" for suffix in ("", *suffixes.values())]
    return {
        (number, scale): f"{label}{suffix}" for number, label in enumerate(labels) for scale, suffix in suffixes.items()
    }


def _short(scale: float) -> str:
    """A LoRA scale without needless digits; different scales are different texts."""
    return f"{scale:g}" if float(f"{scale:g}") == scale else repr(scale)


def _holds(folder: Path) -> str | None:
    """The hash of the adapter file whose evaluation a folder holds, "" for anything else, None if it is free."""
    if not (folder / "provenance.json").exists():
        return None if not folder.exists() or folder.is_dir() else ""
    try:
        [*_, entry] = provenance.entries(folder / "provenance.json")
        return entry["adapter"]["hash"]
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def adapter_facts(
    path: Path, lora_scale: float, changes_text: bool, unseen: bool, val_set: ValidationSet
) -> dict[str, Any]:
    """The entry of an adapter file in provenance.json: its name, the hash of its bytes, and how it was applied.

    `unseen`: whether it is known that the file was trained on none of the validation images. If its step was chosen
    (`evaluation.keep_best`), `chosen` says how, and whether on images of `val_set`.
    """
    chosen = chosen_step(path)
    return {
        "file": path.name,
        "hash": content_hash(path.read_bytes()),
        "lora_scale": lora_scale,
        "adapts_text_encoders": changes_text,
        "validation_images_unseen": unseen,
        "chosen": chosen
        and {
            "step": chosen.step,
            "among": chosen.among,
            "validation_set": chosen.validation_set,
            "on_these_images": chosen.is_of(val_set.hash, val_set.names),
        },
    }


def require_finite(name: str, lora_scale: float, measured: Iterable[np.ndarray]) -> None:
    """UserError if a measured value is NaN or infinite: what cannot be compared is not written."""
    if all(np.isfinite(values).all() for values in measured):
        return
    if name == "base":
        raise UserError("the base gives values that are not finite (NaN or infinity): take another copy of the model.")
    raise UserError(
        f"{name} gives values that are not finite (NaN or infinity) at the LoRA scale {lora_scale:g}, and the base alone does not: "
        "take another copy of the adapter, one from earlier in its training, or smaller lora_scales."
    )


def write(output: Path, result: Result, sets: MeasuredSets, entry: dict[str, Any]) -> None:
    """Writes the result's folder in `output`, replacing earlier results; UserError if it cannot be written.

    If only the samples cannot be written, that is a warning.
    """
    assert sets.validation is not None
    folder, step = output / result.name, 0 if entry["adapter"] is None else STEP
    make_folder(folder)
    for name, file in RESULT_FILES.items():
        remove(folder / file)
        if name in result.found:
            Results(folder / file).append(getattr(sets, name), step, *result.found[name])
    remove(folder / "pictures")
    write_json(folder / "validation_set.json", sets.validation.describe())
    write_json(folder / "provenance.json", [entry])
    if result.pictures:
        with plots.optional(f"{result.name} stays without all of its samples"):
            sample_grids.write_pictures(folder / f"samples/step-{step:08d}", result.rows, result.pictures)


def write_pictures(output: Path, name: str, rows: Sequence[tuple[str, str]], images: Sequence[Image.Image]) -> None:
    """Adds the measured pictures (`pictures.rows_of`) to the folder that `write` made. If they cannot be written, that is a
    warning."""
    with plots.optional(f"{name} stays without all of its pictures"):
        step = 0 if name == "base" else STEP
        sample_grids.write_pictures(sample_grids.step_folder(output / name / "pictures", step), rows, images)


def finish(output: Path, results: Sequence[Result], val_set: ValidationSet) -> str:
    """Writes evaluation.json and .md, the plot over LoRA scales and the grid; returns the paths for the terminal.

    UserError if the first two cannot be written; for the pictures that is a warning.
    """
    numbers = {result.name: _numbers(result, val_set) for result in results}
    write_json(output / "evaluation.json", {"validation_set": val_set.hash, "results": numbers})
    write_atomic(output / "evaluation.md", (table(results, val_set) + "\n").encode())
    written = {"numbers": output / "evaluation.json"}
    rows = results[0].rows
    if results[0].pictures:
        cells = [[result.pictures[row] for result in results] for row in range(len(rows))]
        grid = plots.grid(cells, [label for _, label in rows], [result.name for result in results])
        with plots.optional("the evaluation stays without its grid"):
            write_image(output / "grid.png", grid)
            written["pictures"] = output / "grid.png"
    if len({result.lora_scale for result in results}) > 2:
        sweep = output / "lora_scales.png"
        with plots.optional("the evaluation stays without its plot over LoRA scales"):
            plots.lora_scale_sweep([(result.lora_scale, numbers[result.name]) for result in results], sweep)
            written["sweep"] = sweep
    paths = "\n".join(f"  {what:<9} {path}" for what, path in written.items())
    return f"{paths}\n  compare with runs: python scripts/compare_runs.py RUN {word(str(output))}/NAME"


def _numbers(result: Result, val_set: ValidationSet) -> dict[str, float | None]:
    return {"lora_scale": result.lora_scale} | summary(result.found, val_set)


# What the table shows: the key in evaluation.json, the column, and the format of its values.
COLUMNS = (
    ("evaluation/loss", "validation loss", ".5f"),
    ("evaluation/loss_over_base", "over the base", "+.5f"),
    ("evaluation/learned", "learned", "+.3f"),
    ("evaluation/kept", "kept", "+.3f"),
    ("evaluation/prior", "kept, prior images", "+.3f"),
    ("evaluation/memorised_auc", "memorised, AUC", ".2f"),
    ("evaluation/drift", "drift", ".3g"),
    ("evaluation/pictures_learned", "pictures, learned", "+.3f"),
    ("evaluation/pictures_kept", "pictures, kept", ".3g"),
)


def table(results: Sequence[Result], val_set: ValidationSet) -> str:
    """The results as a Markdown table, with the columns of what was measured.

    Errors are standard errors over images (over captions for kept and drift); the AUC has its 95 % interval.
    """
    numbers = {result.name: _numbers(result, val_set) for result in results}
    columns = [column for column in COLUMNS if any(column[0] in found for found in numbers.values())]
    lines = [f"| | {' | '.join(title for _, title, _ in columns)} |", "|---|" + "---:|" * len(columns)]
    for name, found in numbers.items():
        cells = [_cell(found, key, form) for key, _, form in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(printable(line) for line in lines)


def _cell(found: dict[str, float | None], key: str, form: str) -> str:
    if key not in found:
        return ""
    if f"{key}_low" in found:
        return f"{found[key]:{form}} ({found[f'{key}_low']:{form}} to {found[f'{key}_high']:{form}})"
    return with_error(found, key, form)
