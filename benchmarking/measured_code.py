"""The code that a benchmark measures: a training script as a module, and what says which code it was."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import sushi_research
from sushi_research.files import write_json
from sushi_research.fingerprints import HashCache, folder_hash
from sushi_research.runs import provenance

ROOT = Path(sushi_research.__file__).parents[1]


def load_script(architecture: str) -> ModuleType:
    """The training script as a module, so that its own `training_step` is timed, not a copy of it."""
    path = ROOT / f"scripts/train_{architecture}_lora.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def code_state() -> dict[str, Any]:
    """The commit, whether tracked files differ from it, and the hash of the code that was timed."""
    sources = [*ROOT.glob("sushi_research/**/*.py"), *ROOT.glob("scripts/*.py")]
    with tempfile.TemporaryDirectory() as folder:
        digest = folder_hash(sources, HashCache(Path(folder) / "hashes.json"))
    return {"version": sushi_research.__version__, **provenance.git_state(), "hash": digest}


def code_name(code: Mapping[str, Any]) -> str:
    """What `code_state` has, short, for the name of a result file."""
    if code["commit"]:
        return f"{code['commit'][:10]}{'-dirty' if code['dirty'] else ''}"
    return f"code-{code['hash'][:10]}"


def write_result(folder: Path, name: str, result: dict[str, Any]) -> Path:
    """Writes a new file, named after the measurement and its code (`result["code"]`); never overwrites earlier results."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name}_{code_name(result['code'])}"
    names = (f"{stem}{f'_{number}' if number > 1 else ''}.json" for number in range(1, 1000))
    path = next(folder / name for name in names if not (folder / name).exists())
    write_json(path, result)
    return path
