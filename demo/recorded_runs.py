"""What the comparison needs of trained runs, kept in git: their records without weights and pages."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from demo.scoring import config_of

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


def keep(trained: Path, names: Iterable[str], folder: Path) -> None:
    """Copies the records of the runs `names` below `trained` to `folder`/runs, and the comparison to `folder`.

    UserError, before anything is copied, if a run has not finished.
    """
    names = list(names)
    for name in names:
        config_of(trained / name)
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
