"""What the scripts write by default is ignored by git, so that a clone stays clean."""

import shutil
import subprocess
from pathlib import Path

import pytest

from sushi_research.config.keys import default_values
from sushi_research.config.other_scripts import SamplingConfig, evaluation_config
from sushi_research.models import ARCHITECTURES

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_default_output_folders_are_ignored(tmp_path: Path) -> None:
    places = {"comparisons/NAME/index.html"}  # scripts/compare_runs.py
    for config_class in [SamplingConfig, *(evaluation_config(each.config_class()) for each in ARCHITECTURES.values())]:
        defaults = default_values(config_class)
        places |= {
            f"{value}/file" for key, value in defaults.items() if key in ("output", "run.folder", "cache.folder")
        }
    assert {place.partition("/")[0] for place in places} == {"comparisons", "evaluations", "samples", "runs", "cache"}
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    shutil.copy(ROOT / ".gitignore", tmp_path)
    done = subprocess.run(["git", "check-ignore", *places], cwd=tmp_path, capture_output=True, text=True)
    assert set(done.stdout.split()) == places
