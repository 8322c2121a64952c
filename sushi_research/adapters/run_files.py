"""Adapter files by the run that wrote them: a run folder, or a run folder and a step, in place of a file's path."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sushi_research import stopping
from sushi_research.config.other_scripts import BASE_KEYS
from sushi_research.errors import UserError, some
from sushi_research.runs import records
from sushi_research.runs.run_folder import RunFolder
from sushi_research.terminal import say

FORMS = "an adapter file, a run folder (runs/mycat), or a run folder and a step (runs/mycat@250, runs/mycat@best, runs/mycat@ema)"
# What `text@which` may have after the last @; anything else is part of a path.
_WHICH = re.compile(r"(.+)@(best|ema|[0-9]{1,18})", re.DOTALL)


def resolve(text: str) -> Path:
    """The adapter file that `text` names: FORMS.

    A run folder means its finished file; without one, the file of its newest step, and a line says so. UserError if a run folder
    has no such file; the path of a file is returned as it is, and reading it gives the error.
    """
    run, which = _parts(text)
    if run is None:
        return Path(text)
    steps, best = run.step_adapters(), run.best_adapters()
    if which is None:
        if run.adapter.is_file():
            return run.adapter
        if steps:
            if stopping.is_first():
                say(f"{text} is not finished: its newest adapter file is used, {run.step_adapter(max(steps)).name}")
            return steps[max(steps)]
    elif which == "ema":
        if run.average.is_file():
            return run.average
    elif which == "best":
        if best:
            return best[max(best)]  # the earlier one is kept for a run that may go on from before this one
    elif int(which) in steps:
        return steps[int(which)]
    elif run.adapter.is_file() and _finished_at(run) == int(which):
        return run.adapter
    elif int(which) in best:
        return best[int(which)]
    raise UserError(f"{text}{_missing(run, which)}; {_there(run)}.")


def resolve_all(texts: Sequence[str]) -> list[str]:
    """`resolve` for each. UserError if two are the same file, which would be measured or drawn twice."""
    found: dict[str, str] = {}
    for text in texts:
        path = str(resolve(text))
        if path in found:
            raise UserError(f"{found[path]} and {text} are the same adapter file, {path}: give it once.")
        found[path] = text
    return list(found)


def run_folder_of(text: str) -> RunFolder | None:
    """The run folder that `text` names, None if it is the path of a file."""
    return _parts(text)[0]


def model_settings(texts: Sequence[str]) -> dict[str, Any]:
    """What the config.yaml of the run folders among `texts` says about their base: BASE_KEYS that are set.

    UserError if there is none among them, if two differ, or if one cannot be read.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        if (run := run_folder_of(text)) is not None:
            if not (os.path.lexists(run.config) or run.adapter.is_file() or run.step_adapters()):
                raise UserError(f"{text}{_missing(run, None)}; {_there(run)}.")
            model = records.read_config(run.config, "restore it, or give the base").get("model")
            if not isinstance(model, dict) or not isinstance(model.get("base"), str):
                raise UserError(f"{run.config} has no model.base: restore it, or give the base.")
            found[text] = {key: model[key] for key in BASE_KEYS if model.get(key) is not None}
    lost = [text for text in texts if not os.path.lexists(text) and not text.endswith(".safetensors")]
    if not found and lost:
        raise UserError(f"{lost[0]} does not exist: give {FORMS}.")
    if not found:
        raise UserError(f"base is missing: give --base VALUE, or a run folder among the adapters ({FORMS}).")
    (first, settings), *others = found.items()
    for text, other in others:
        for key in BASE_KEYS:
            if settings.get(key) != other.get(key):
                raise UserError(
                    f"{first} and {text} were trained with different bases (model.{key} is {settings.get(key)} and "
                    f"{other.get(key)}): give --base, or sample one of them at a time."
                )
    return settings


def _parts(text: str) -> tuple[RunFolder | None, str | None]:
    """(the run folder, what follows its @); the first is None for the path of a file."""
    if os.path.isdir(text):
        return _run_folder(text), None
    match = _WHICH.fullmatch(text)
    if match and not os.path.lexists(text) and os.path.isdir(match[1]):
        return _run_folder(match[1]), match[2]
    return None, None


def _run_folder(text: str) -> RunFolder:
    """The run in a folder. Its files have the name of the folder itself, not that of a link to it."""
    path = Path(text)
    return RunFolder(path.resolve() if path.is_symlink() or path.name == ".." else path, None)


def _missing(run: RunFolder, which: str | None) -> str:
    if which is None:
        return f" is a folder without the adapter file {run.adapter.name}"
    if which == "ema":
        return f": {run.path} has no average, which ema.decay keeps"
    if which == "best":
        return f": {run.path} has no file of a best step, which evaluation.keep_best keeps"
    return f": {run.path} has no adapter file of step {int(which)}"


def _there(run: RunFolder) -> str:
    """The adapter files that a run folder has, and what to give."""
    steps, files = (
        [str(step) for step in run.step_adapters()],
        sorted(path.name for path in run.path.glob("*.safetensors")),
    )
    if steps or run.adapter.is_file():
        has = [f"those of steps {some(steps, 8)}"] if steps else []
        has += [f"the finished one of step {_finished_at(run)}"] if run.adapter.is_file() else []
        return (
            f"it has {' and '.join(has)}: give one of these, as {run.path}@{steps[-1] if steps else _finished_at(run)}"
        )
    if files:
        return f"it has {some(files)}: give the path of a file"
    return f"there is none in it: give {FORMS}"


def _finished_at(run: RunFolder) -> int | None:
    """The step of the finished file; None if run.json does not say."""
    try:
        record = run.record()
    except UserError:
        return None
    return record["steps"] if record else None
