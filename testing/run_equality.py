"""Compares the results in two run folders: adapter, logged values, evaluated losses, and the last checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sushi_research.runs.run_folder import RESULT_FILES

# Metrics that depend on the clock or the machine.
MEASURED = frozenset({"images_per_second", "gpu_seconds", "cpu_seconds", "data_wait_share", "peak_memory_gib"})
TABLES = tuple(RESULT_FILES.values())
LAST = "NAME.safetensors"


def differences(found: Path, expected: Path) -> list[str]:
    """The differences between two finished runs, compared bit for bit; a sentence each, empty if they are equal.

    It compares the tensors and dtypes of the adapter files that both have (a run that was stopped has one more), all lines of
    metrics.jsonl without `MEASURED`, all rows of the results, the step and the state of the last checkpoint, run.json without the
    W&B id, and the pixels of samples and pictures.
    """
    return [f"{found.name}: {difference}" for difference in _differences(found, expected)]


def _differences(found: Path, expected: Path) -> Iterator[str]:
    from safetensors.torch import load_file

    from sushi_research.runs.checkpoint import latest_checkpoint

    for name in ("run.json", "metrics.jsonl"):
        if (found / name).is_file() != (expected / name).is_file():
            yield f"{name} is {'there' if (found / name).is_file() else 'missing'}"
            return
    files, others = adapters(found), adapters(expected)
    if (LAST in files) != (LAST in others):
        yield f"{LAST} is {'there' if LAST in files else 'missing'}"
        return
    for name in files.keys() & others.keys():
        yield from _nested(load_file(files[name]), load_file(others[name]), f"the adapter {name}")
    yield from _nested(record(found), record(expected), "run.json")
    yield from _nested(lines(found), lines(expected), "metrics.jsonl")
    for name in TABLES:
        yield from _nested(rows(found / name), rows(expected / name), name)
    checkpoints = [latest_checkpoint(folder / "checkpoints") for folder in (found, expected)]
    if (checkpoints[0] is None) != (checkpoints[1] is None):
        yield "one has a checkpoint and the other has none"
    elif checkpoints[0] is not None:
        yield from _nested(checkpoints[0].step, checkpoints[1].step, "the last checkpoint's step")
        yield from _nested(checkpoints[0].load(), checkpoints[1].load(), "the last checkpoint")
    yield from _nested(images(found), images(expected), "images")


def adapters(run: Path) -> dict[str, Path]:
    """The adapter files of a run, by their names without that of the run: NAME.safetensors, NAME-000250.safetensors."""
    return {path.name.replace(run.name, "NAME", 1): path for path in sorted(run.glob("*.safetensors"))}


def record(run: Path) -> dict[str, Any]:
    """run.json without the W&B id, which is random."""
    found = json.loads((run / "run.json").read_text())
    return {key: value for key, value in found.items() if key != "wandb_id"}


def lines(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without `MEASURED`."""
    found = (run / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in MEASURED} for line in found]


def rows(path: Path) -> list[dict[str, Any]] | None:
    """The rows of a table of results; None if there is no such file."""
    from sushi_research.evaluation.results import Results

    table = Results(path).read()
    return None if table is None else table.to_pylist()


def images(run: Path) -> dict[str, bytes]:
    """The pixels of samples and pictures, by their path in the run folder."""
    from PIL import Image

    found = {}
    for path in sorted(path for folder in ("samples", "pictures") for path in run.glob(f"{folder}/step-*/*.png")):
        with Image.open(path) as image:
            found[str(path.relative_to(run))] = image.tobytes()
    return found


def _nested(found: Any, expected: Any, where: str) -> Iterator[str]:
    """The first difference between two nested structures of dicts, lists, tensors and plain values."""
    import torch

    if type(found) is not type(expected):
        yield f"{where} is a {type(found).__name__} in place of a {type(expected).__name__}"
    elif isinstance(expected, dict):
        if list(found) != list(expected):
            extra = sorted(map(str, found.keys() ^ expected.keys()))
            yield f"{where} has other keys: {', '.join(extra[:3]) or 'in another order'}"
            return
        for key in expected:
            difference = next(_nested(found[key], expected[key], f"{where}, {key}"), None)
            if difference is not None:
                yield difference
                return
    elif isinstance(expected, list | tuple):
        if len(found) != len(expected):
            yield f"{where} has {len(found)} entries in place of {len(expected)}"
            return
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            difference = next(_nested(one, other, f"{where}, entry {index}"), None)
            if difference is not None:
                yield difference
                return
    elif isinstance(expected, torch.Tensor):
        # Compares bits: NaN equals itself, and 0 does not equal -0.
        same = found.dtype == expected.dtype and found.shape == expected.shape
        if not same or not torch.equal(
            *(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (found, expected))
        ):
            yield f"{where} has other values"
    elif found != expected:
        yield f"{where} is {str(found)[:60]} in place of {str(expected)[:60]}"
