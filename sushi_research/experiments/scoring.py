"""Scores finished runs with the command that an experiment file names (`score`); it writes scores.json into the run folder.

scores_source.json says by which command and from which adapter the scores were made, so that a run is scored once, and again if
either has changed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sushi_research.config import user_commands
from sushi_research.errors import UserError
from sushi_research.files import remove, write_json, writing
from sushi_research.fingerprints import content_hash
from sushi_research.models.header import read_header
from sushi_research.reports.scores import read_scores
from sushi_research.runs import records
from sushi_research.runs.run_folder import RunFolder
from sushi_research.user_files import read_regular

PLACE = "{run}"
EXAMPLE = "python judge.py {run}"
# The name under which scores.json is kept that was not made by an experiment's command.
EARLIER = "scores.earlier.json"


def checked(command: str) -> str:
    """`command` itself. ValueError unless it is a command with {run} in it and no other placeholder."""
    user_commands.checked(command, [PLACE], EXAMPLE)
    if PLACE not in command:
        raise ValueError(f"it does not say which run is scored: put {PLACE} in it, as in {EXAMPLE}")
    return command


def words_of(command: str, run: Path) -> list[str]:
    """The command for one run, as words."""
    return user_commands.words_of(command, {PLACE: str(run)})


def is_scored(folder: RunFolder, command: str) -> bool:
    """Whether the run has scores that `command` made from its present adapter."""
    try:
        read_scores(folder.scores)
        return records.read_as(folder.scores_source, records.ScoresSource, "") == _source(folder, command, True)
    except UserError:
        return False


def score(folder: RunFolder, command: str, run: Callable[[Sequence[str]], tuple[int, str]]) -> None:
    """Has a finished run scored by `command`. `run` runs it and returns its exit status and the last line of its output.

    UserError if it fails, or if it does not write scores; the run then has none.
    """
    name = f"{folder.name} has no scores"
    try:
        source = _source(folder, command, False)
        _clear(folder)
        # Before the command: what it leaves behind if it fails, or if this is killed, does not count.
        write_json(folder.scores_source, source)
        status, said = run(words_of(command, folder.path))
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    if status:
        how = f"exit status {status}" if status > 0 else f"signal {-status}"
        raise UserError(f"{name}: the command {command} failed ({how}); the last that it said: {said or 'nothing'}")
    try:
        read_scores(folder.scores)
    except UserError as error:
        raise UserError(f"{name}: {error}; the last that it said: {said or 'nothing'}") from error
    write_json(folder.scores_source, source | {"complete": True})


def _source(folder: RunFolder, command: str, complete: bool) -> dict[str, Any]:
    """The content of scores_source.json for the run as it is. UserError if it has not finished or its adapter cannot be read."""
    record = folder.record()
    if record is None or record["finished_at"] is None:
        raise UserError(f"{folder.path} holds no finished run")
    # The hash of the tensors: the metadata has times, and a lost file is written again with others.
    digest = read_header(folder.adapter).metadata.get("sshs_model_hash")
    digest = digest or content_hash(read_regular(folder.adapter, sys.maxsize))
    return {"command": command, "adapter": digest, "step": record["finished_at"], "complete": complete}


def _clear(folder: RunFolder) -> None:
    """Removes the scores of an earlier command. Scores from elsewhere, such as people's votes, are kept under another name."""
    if os.path.lexists(folder.scores_source):
        remove(folder.scores)
    elif os.path.lexists(folder.scores):
        with writing("rename", folder.scores):
            folder.scores.replace(folder.path / EARLIER)
