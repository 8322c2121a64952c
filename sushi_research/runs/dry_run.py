"""What a dry run writes: the plan and the report on the data, into `dry_run/` of the run folder.

That does not begin the run: the folder gets no lock, no run.json and no provenance, and the real run starts as if there were no
dry run. A run that is going on is not disturbed.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from sushi_research.files import CannotWrite

logger = logging.getLogger(__name__)

FOLDER = "dry_run"


class DryRun:
    """The files of a dry run. A file that cannot be written is a warning: what it holds is printed too."""

    def __init__(self, run_path: Path) -> None:
        self.path = run_path / FOLDER
        self.plan = self.path / "plan.json"
        self.data_report = self.path / "data_report.json"

    @contextlib.contextmanager
    def optional(self) -> Iterator[None]:
        """A block that writes a file of this folder."""
        try:
            yield
        except CannotWrite as error:
            logger.warning("%s; the plan is printed without it", error.reason)
