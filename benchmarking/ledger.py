"""The ledger, benchmarks/ledger.json: what a step costs in exact numbers. Reading, comparing, writing, and its table."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarking.fake_step import TARGETS, WAYS
from sushi_research.files import write_atomic
from testing import result_pages

FILE = Path(__file__).parents[1] / "benchmarks/ledger.json"
PAGE = Path(__file__).parents[1] / "docs/performance.md"
LIBRARIES = ("accelerate", "bitsandbytes", "diffusers", "peft", "torch")

# By the row's key: "sdxl, all, ours".
Rows = Mapping[str, Mapping[str, int]]


def cases() -> list[tuple[str, str, str]]:
    """All rows: architecture, targets, way."""
    return [(architecture, targets, way) for architecture in ("sd15", "sdxl") for targets in TARGETS for way in WAYS]


def key_of(case: tuple[str, str, str]) -> str:
    """The key of a row."""
    return ", ".join(case)


def versions() -> dict[str, str]:
    """The versions on which the counts depend, without the build (`+cpu`), on which they do not."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"python": python} | {name: version(name).partition("+")[0] for name in LIBRARIES}


def read(file: Path = FILE) -> dict[str, Any]:
    """The ledger: {"steps": rows, "versions": {name: version}}."""
    return json.loads(file.read_text())


def write(rows: Rows, file: Path = FILE) -> None:
    """Writes the ledger."""
    content = {"steps": rows, "versions": versions()}
    write_atomic(file, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def differences(ledger: Mapping[str, Any], rows: Rows) -> tuple[list[str], list[str]]:
    """(what got worse, what got better) in rows that were counted again, one sentence each. A higher number is worse.

    Calls of Python functions are compared only if the versions are those of the ledger. A row or a number that the ledger lacks
    got worse.
    """
    worse, better = [], []
    same_versions = ledger["versions"] == versions()
    for key, numbers in rows.items():
        recorded = ledger["steps"].get(key, {})
        for name, number in numbers.items():
            before = recorded.get(name)
            if number == before or (name == "python_calls" and not same_versions):
                continue
            sentence = (
                f"{key}: {name} is {number:,}, and {'nothing' if before is None else f'{before:,}'} in the ledger"
            )
            (worse if before is None or number > before else better).append(sentence)
    return worse, better


HEAD = (
    "model, targets, adapter",
    "TFLOP",
    "ops",
    "whole step",
    "dtype copies",
    "whole step",
    "saved GiB",
    "peak GiB",
    "feed-forward recomputed",
    "all recomputed",
    "tensors",
    "optimizer launches",
    "Python calls",
)


def table(ledger: Mapping[str, Any]) -> str:
    """The ledger as a Markdown table with a note."""

    def cells(key: str, row: Mapping[str, int]) -> list[str]:
        gib = [f"{row[name] / 2**30:.2f}" for name in ("saved_bytes", *(f"peak_bytes_{mode}" for mode in MODES))]
        counts = ("ops", "ops_whole_step", "dtype_copies", "dtype_copies_whole_step")
        rest = ("trainable_tensors", "optimizer_launches", "python_calls")
        return [
            key,
            f"{row['flops'] / 1e12:.3f}",
            *(f"{row[name]:,}" for name in counts),
            *gib,
            *(f"{row[name]:,}" for name in rest),
        ]

    lines = result_pages.markdown(HEAD, (cells(key_of(case), ledger["steps"][key_of(case)]) for case in cases()))
    return "\n".join([*lines, "", ", ".join(f"{name} {found}" for name, found in ledger["versions"].items()) + "."])


MODES = ("none", "feed_forward", "all")
