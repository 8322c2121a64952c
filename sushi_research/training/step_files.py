"""The adapter files of steps on the way, NAME-STEP.safetensors: which are kept, and what becomes of them when a run goes on.

None is deleted but by `checkpoint.keep_adapters`. Those of steps after the one from which a run starts or goes on are moved to the
folder `earlier`, because the run makes its own again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from sushi_research.errors import some
from sushi_research.files import CannotWrite, fsync_folder, make_folder, remove, writing
from sushi_research.runs.run_folder import RunFolder

logger = logging.getLogger(__name__)


def keep_latest(run: RunFolder, count: int | None) -> None:
    """Removes all step files but the latest `count`; None keeps all. A file that cannot be removed is a warning."""
    if count is None:
        return
    for path in list(run.step_adapters().values())[: -count or None]:
        try:
            remove(path)
        except CannotWrite as error:
            logger.warning("%s", error.reason)


def set_aside(run: RunFolder, step: int | None, steps: int) -> list[str]:
    """Makes room for the files that the run will write from `step` to `steps`; None: it starts, also if it did before.

    A finished adapter of an earlier end becomes the file of its step. Files of later steps than `step` are moved to `earlier`.
    Returns a sentence about what was moved. Call it before run.json is written. CannotWrite if a file cannot be moved.
    """
    begins_at = -1 if step is None else step
    record = run.record()
    end = None if record is None else record["steps"]
    moved = []
    if step is None and os.path.lexists(run.average):
        moved.append(_move(run.average, _free(run.earlier / run.average.name)))
    if os.path.lexists(run.adapter) and not begins_at == end == steps:
        # Without run.json nothing says of which step it is.
        is_known = end is not None and not os.path.lexists(run.step_adapter(end))
        moved.append(_move(run.adapter, run.step_adapter(end) if is_known else _free(run.earlier / run.adapter.name)))
    for of_step, path in run.step_adapters().items():
        if of_step > begins_at:
            moved.append(_move(path, _free(run.earlier / path.name)))
    return list(_described(run, [path for path in moved if path.parent == run.earlier], begins_at))


def _described(run: RunFolder, moved: list[Path], step: int) -> Iterator[str]:
    if moved:
        where = "the start" if step < 0 else f"step {step}"
        names = some([path.name for path in moved], 3)
        yield f"adapter files of an earlier launch, from after {where}, are moved to {run.earlier}: {names}"


def _move(source: Path, target: Path) -> Path:
    make_folder(target.parent)
    with writing("move", source):
        source.rename(target)
        fsync_folder(target.parent)
    return target


def _free(path: Path) -> Path:
    """`path`, or with a number if that is there already."""
    free, number = path, 2
    while os.path.lexists(free):
        free, number = path.with_name(f"{path.stem}-{number}{path.suffix}"), number + 1
    return free
