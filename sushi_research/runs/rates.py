"""How fast this machine computes a micro-batch: measured by each run, and kept for estimates of other runs.

There is one file for each machine, `rates/<name of the machine>.json` next to the caches. Only that machine writes it, and all read
it: another machine with the same device computes as fast. A rate belongs to the conditions that decide it (the device, the
precision, how a step is computed). For these it has points (FLOPs and seconds of a micro-batch), one for each size trained.
"""

from __future__ import annotations

import contextlib
import json
import math
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sushi_research.errors import UserError
from sushi_research.files import write_json
from sushi_research.user_files import parse_json

FORMAT = 1
# Sizes that are kept for each condition, those measured last.
_MOST_POINTS = 16
# Two sizes whose FLOPs differ by less are one: the newer measurement replaces the older.
_SAME = 0.02

Point = tuple[float, float]


def seconds_of(folder: Path, conditions: Mapping[str, Any], flops: float) -> float | None:
    """The estimated seconds of a micro-batch with so many FLOPs; None if nothing was measured under these conditions.

    `folder` is that of the caches. Between two measured sizes it is on the line between them, outside on the line through the two
    nearest; with a single one, as many FLOPs per second as there.
    """
    points = sorted(point for file in _files(folder) for point in _points(_read(file), conditions))
    return _estimate(points, flops) if points else None


def remember(folder: Path, conditions: Mapping[str, Any], flops: float, seconds: float) -> None:
    """Keeps what a micro-batch with so many FLOPs took. A folder that cannot be written stays as it is: these are estimates."""
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", platform.node()) or "machine"
    path, key = folder / "rates" / f"{name}.json", _key(conditions)
    rates = _read(path)
    kept = [point for point in rates.get(key, []) if abs(point[0] - flops) > _SAME * flops]
    rates[key] = [*kept, (flops, seconds)][-_MOST_POINTS:]
    with contextlib.suppress(UserError, OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"format": FORMAT, "rates": rates})


def _estimate(points: Sequence[Point], flops: float) -> float:
    """`points` are sorted, and there is one at least."""
    after = next((number for number, point in enumerate(points) if point[0] >= flops), len(points))
    low = min(max(after - 1, 0), max(len(points) - 2, 0))
    pair = points[low : low + 2]
    (first, took), (second, other) = pair[0], pair[-1]
    if math.isclose(first, second, rel_tol=_SAME):
        return took * flops / first
    slope = max(0.0, (other - took) / (second - first))
    # A smaller micro-batch takes no negative time, and a larger one no less than the smaller.
    return max(took + slope * (flops - first), min(took, other) * min(1.0, flops / first))


def _key(conditions: Mapping[str, Any]) -> str:
    return json.dumps(conditions, sort_keys=True)


def _files(folder: Path) -> list[Path]:
    try:
        return sorted((folder / "rates").glob("*.json"))
    except OSError:
        return []


def _read(path: Path) -> dict[str, list[Point]]:
    """The points by condition. A file that is missing, damaged or of another format has none: it is made again by later runs."""
    try:
        found = parse_json(path.read_bytes(), str(path))
    except (UserError, OSError):
        return {}
    rates = found.get("rates") if isinstance(found, dict) and found.get("format") == FORMAT else None
    return {key: _valid(points) for key, points in rates.items()} if isinstance(rates, dict) else {}


def _valid(points: Any) -> list[Point]:
    pairs = (
        [point for point in points if isinstance(point, list) and len(point) == 2] if isinstance(points, list) else []
    )
    numbers = [pair for pair in pairs if all(isinstance(n, int | float) and 0 < n < math.inf for n in pair)]
    return [(float(flops), float(seconds)) for flops, seconds in numbers]


def _points(rates: Mapping[str, list[Point]], conditions: Mapping[str, Any]) -> list[Point]:
    return rates.get(_key(conditions), [])
