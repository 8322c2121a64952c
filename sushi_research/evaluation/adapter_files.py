"""What scripts/evaluate.py found: a folder for the base and each adapter at each strength, which compare_runs.py reads like a
run's; and the sweep over strengths as a table, a curve and a grid of pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sushi_research.adapters.loading import label_of
from sushi_research.errors import UserError
from sushi_research.evaluation import drift, validation_set
from sushi_research.evaluation.drift import Drift
from sushi_research.evaluation.results import Results
from sushi_research.files import disk_error, write_atomic, write_json
from sushi_research.fingerprints import content_hash
from sushi_research.sampling import plots as pictures
from sushi_research.sampling import sample_grids

# The step under which an adapter file's results stand; the base's stand under 0.
STEP = 1


@dataclass(frozen=True)
class Result:
    """One evaluated state: losses and the base's [N, draws], drift [captions, draws] or None, pictures in rows' order."""

    name: str
    strength: float
    loss: np.ndarray
    base_loss: np.ndarray
    drift: np.ndarray | None
    rows: Sequence[tuple[str, str]]
    pictures: Sequence[Image.Image]


def folder_names(paths: Sequence[str], strengths: Sequence[float]) -> dict[tuple[int, float], str]:
    """(number of the file, strength) -> its folder's name: the file's, with a number where two are called alike.

    UserError for a file that is not there: told before anything is loaded.
    """
    for path in paths:
        if not Path(path).is_file():
            raise UserError(f"the adapter {path} is not there: give the path of a .safetensors file.")
    labels = [label_of(Path(path)) for path in paths]
    often = Counter([*labels, "base"])
    names = [f"{label}-{number}" if often[label] > 1 else label for number, label in enumerate(labels)]
    return {
        (number, strength): name if strength == 1 else f"{name}-strength-{strength:g}"
        for number, name in enumerate(names)
        for strength in strengths
    }


def adapter_facts(path: Path, strength: float, changes_text: bool) -> dict[str, Any]:
    """What provenance.json says of an adapter file: its name, the hash of its bytes, and how it was applied."""
    return {
        "file": path.name,
        "hash": content_hash(path.read_bytes()),
        "strength": strength,
        "adapts_text_encoders": changes_text,
    }


def write(
    output: Path, result: Result, pack: validation_set.Pack, measure: Drift | None, entry: dict[str, Any]
) -> None:
    """Writes the result's folder below `output`, anew; UserError where the disk refuses."""
    folder, step = output / result.name, 0 if entry["adapter"] is None else STEP
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in (folder / "evaluation.parquet", folder / "drift.parquet"):
            old.unlink(missing_ok=True)
        if result.pictures:
            sample_grids.write_pictures(folder / f"samples/step-{step:08d}", result.rows, result.pictures)
    except OSError as error:
        raise disk_error(f"output: cannot write into {folder}", error) from error
    Results(folder / "evaluation.parquet").append(pack, step, result.loss, result.base_loss)
    if measure and result.drift is not None:
        Results(folder / "drift.parquet").append(measure.pack, step, result.drift, np.zeros_like(result.drift))
    write_json(folder / "evaluation_pack.json", pack.describe())
    write_json(folder / "provenance.json", [entry])


def finish(output: Path, results: Sequence[Result], pack: validation_set.Pack) -> str:
    """Writes evaluation.json, the curve over strengths and the grid; returns the table and the paths for the terminal."""
    numbers = {result.name: _numbers(result, pack) for result in results}
    write_json(output / "evaluation.json", {"pack": pack.hash, "results": numbers})
    written = {"numbers": output / "evaluation.json"}
    rows = results[0].rows
    if results[0].pictures:
        cells = [[result.pictures[row] for result in results] for row in range(len(rows))]
        written["pictures"] = output / "grid.png"
        sheet = pictures.grid(cells, [label for _, label in rows], [result.name for result in results])
        sheet.save(written["pictures"])
    if len({result.strength for result in results}) > 2:
        written["sweep"] = output / "strengths.png"
        pictures.strengths([(result.strength, numbers[result.name]) for result in results], written["sweep"])
    table = _table(numbers)
    write_atomic(output / "evaluation.md", (table + "\n").encode())
    paths = "\n".join(f"  {what:<9} {path}" for what, path in written.items())
    return f"{table}\n\n{paths}\n  compare with runs: python scripts/compare_runs.py RUN {output}/NAME"


def _numbers(result: Result, pack: validation_set.Pack) -> dict[str, float]:
    found = validation_set.summary(result.loss, result.base_loss, pack.timesteps())
    found = found | (drift.summary(result.drift) if result.drift is not None else {})
    return {"strength": result.strength} | found


def _table(numbers: dict[str, dict[str, float]]) -> str:
    """Markdown; errors are standard errors over images (over captions for the drift)."""
    lines = ["| | held-out loss | over the base | drift |", "|---|---:|---:|---:|"]
    for name, found in numbers.items():
        cells = [
            f"{found[key]:{form}} +- {found.get(f'{key}_se', 0):.2g}" if key in found else ""
            for key, form in (
                ("evaluation/loss", ".5f"),
                ("evaluation/loss_over_base", "+.5f"),
                ("evaluation/drift", ".3g"),
            )
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
