"""What the comparison needs of trained runs, kept in git: their records without weights and pages."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from sushi_research.errors import UserError
from sushi_research.runs.run_folder import RunFolder

KEPT = (
    "*.parquet",
    "config.yaml",
    "metrics.jsonl",
    "plan.json",
    "provenance.json",
    "run.json",
    "scores*.json",
    "validation_set.json",
)


def keep(trained: Path, names: Iterable[str], folder: Path, unfinished: Iterable[str] = ()) -> None:
    """Copies the records of the runs `names` below `trained` to `folder`/runs, and the comparison to `folder`.

    UserError, before anything is copied, if a run has not finished and is not among those that may be `unfinished`.
    """
    names, unfinished = list(names), set(unfinished)
    for name in names:
        record = RunFolder(trained / name, None).record()
        if record is None or (record["finished_at"] is None and name not in unfinished):
            raise UserError(
                f"{trained / name} holds no finished run: `make experiment` with the experiment's file trains it to its end."
            )
    if not (trained / "comparison").is_dir():
        raise UserError(
            f"{trained} has no comparison of its runs: `make experiment` with the experiment's file makes it."
        )
    for name in names:
        source, into = trained / name, folder / "runs" / name
        shutil.rmtree(into, ignore_errors=True)
        into.mkdir(parents=True)
        for pattern in KEPT:
            for path in source.glob(pattern):
                shutil.copyfile(path, into / path.name)
    for path in (trained / "comparison").iterdir():
        if path.suffix in (".json", ".md", ".png"):
            shutil.copyfile(path, folder / path.name)
