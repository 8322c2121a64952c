from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from drawn_pictures import picture

from sushi_research import fingerprints
from sushi_research.config import SD15Training
from sushi_research.data.training_data import read_data
from sushi_research.remembered import Remembered
from sushi_research.runs.job import Job
from sushi_research.runs.run_folder import open_run_folder


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """No file counts as just changed: a test cannot give a file an old change time."""
    monkeypatch.setattr(fingerprints, "RACY_NS", 0)


@pytest.fixture
def read(tmp_path):
    """Reads `photos`, with other settings by section, as a new run; returns the data, and the run's report or None."""

    def run(on_bad_file: str = "stop", data: dict[str, str] | None = None, **evaluation):
        sections = {
            "model": {"base": "x"},
            "train": {"steps": 1},
            "cache": {"folder": str(tmp_path / "photos" / "cache")},
        }
        sections["data"] = {
            "path": str(tmp_path / "photos"),
            "resolution": 64,
            "bucket_step": 32,
            "on_bad_file": on_bad_file,
            **(data or {}),
        }
        config = SD15Training(
            **sections, evaluation=evaluation, run={"folder": str(tmp_path / "photos" / "runs"), "name": "a"}
        )
        accelerator = SimpleNamespace(main_process_first=contextlib.nullcontext, is_main_process=True, num_processes=1)
        with open_run_folder(Path(config.run.folder), "a") as run_folder:
            report = run_folder.data_report
            report.unlink(missing_ok=True)
            picture(run_folder.samples / "own.png", 99)
            job = Job(config, SimpleNamespace(NAME="sd15"), accelerator, "fp32", run_folder)
            try:
                return read_data(job, Remembered(tmp_path / "remembered"))
            finally:
                run.report = json.loads(report.read_text()) if report.exists() else None

    return run
