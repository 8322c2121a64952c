"""One digest for each result of a run folder, so that an outside program can compare two runs by their text.

    python -m testing.fingerprint runs/mine

Values that depend on the clock or the machine are left out: the three times in the adapter's metadata, and `MEASURED` of
run_equality.py in the metrics.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from testing.run_equality import TABLES, adapters, images, lines, record, rows

METRICS = "metrics.jsonl"
# The adapter's metadata that say when it was made.
TIMES = frozenset({"modelspec.date", "ss_training_started_at", "ss_training_finished_at"})


def fingerprint(run: Path) -> dict[str, str]:
    """The digests of a run folder by what they are of; what is missing has no entry.

    They cover the tensors and the metadata of the adapter files, the state of every checkpoint ("damaged" if it cannot be read),
    the lines of metrics.jsonl, run.json, the rows of the results, and the pixels of the sample images.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    from sushi_research.runs.checkpoint import DamagedCheckpoint, read_checkpoint

    found: dict[str, Any] = {}
    for name, path in adapters(run).items():
        with safe_open(path, "pt") as file:
            # safetensors returns it in a random order.
            metadata = {key: value for key, value in sorted((file.metadata() or {}).items()) if key not in TIMES}
        found |= {name: load_file(path), f"{name}, metadata": metadata}
    for path in sorted(run.glob("checkpoints/step-*")):
        try:
            found[f"checkpoints/{path.name}"] = read_checkpoint(path).load()
        except DamagedCheckpoint:
            found[f"checkpoints/{path.name}"] = "damaged"
    if (run / METRICS).is_file():
        found[METRICS] = lines(run)
    if (run / "run.json").is_file():
        found["run.json"] = record(run)
    found |= {name: rows(run / name) for name in TABLES if (run / name).is_file()}
    found |= images(run)
    return {what: value if value == "damaged" else digest(value) for what, value in found.items()}


def digest(value: Any) -> str:
    """A digest of nested dicts, lists, tensors and plain values, of their types and of every bit; the order of keys counts."""
    hash = hashlib.blake2b(digest_size=16)
    _feed(hash, value)
    return hash.hexdigest()


def _feed(hash: Any, value: Any) -> None:
    import torch

    hash.update(f"{type(value).__name__} ".encode())
    if isinstance(value, dict):
        hash.update(f"{len(value)} ".encode())
        for key, item in value.items():
            _feed(hash, key)
            _feed(hash, item)
    elif isinstance(value, list | tuple):
        hash.update(f"{len(value)} ".encode())
        for item in value:
            _feed(hash, item)
    elif isinstance(value, torch.Tensor):
        hash.update(f"{value.dtype} {tuple(value.shape)} ".encode())
        hash.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    else:
        data = value if isinstance(value, bytes) else repr(value).encode("utf-8", "backslashreplace")
        hash.update(f"{len(data)} ".encode() + data)


if __name__ == "__main__":
    print(json.dumps(fingerprint(Path(sys.argv[1])), indent=1))
