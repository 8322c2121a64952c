"""Which of two variants of a step is faster: alternating rounds, the median of paired ratios, an interval, a sign test.

Wall-clock on a shared machine drifts by far more than the differences worth finding, so A and B are never timed one after
the other. A round is four blocks, ABBA or BAAB, its order drawn by lot: what drifts evenly through a round adds the same
to both, and what a round's ratio still carries is as often in favour of A as of B. Nothing here knows what a step does.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np

MIN_ROUNDS = 9
ORDERS = ("ABBA", "BAAB")
PRESSURE = Path("/proc/pressure/cpu")

Step = Callable[[int], Any]


@dataclass(frozen=True)
class Round:
    """One round: its order, the mean seconds of a call of either variant, and how busy the machine was meanwhile.

    `load` is the machine's load average over the last minute; `pressure` the share of the round's time in which some task
    waited for a CPU. Either is None where the system does not tell. `status`: only "kept" rounds count; "warm-up" is
    dropped by plan, "busy" for its pressure, for both variants alike.
    """

    order: str
    a: float
    b: float
    load: float | None
    pressure: float | None
    status: Literal["warm-up", "busy", "kept"]


@dataclass(frozen=True)
class Comparison:
    """`ratio`: the median over rounds of A's time / B's; `low` to `high` holds it with probability `level`.

    `p_value`: how often two equal variants would give rounds as one-sided as these, or more so.
    """

    ratio: float
    low: float
    high: float
    level: float
    p_value: float
    rounds: int


def cpu_waited() -> float | None:
    """Seconds since the start of the machine in which some task waited for a CPU; None where Linux does not count them."""
    try:
        text = PRESSURE.read_text()
    except OSError:
        return None
    return int(text.partition("total=")[2].split()[0]) / 1e6


def load_average() -> float | None:
    """The load average over the last minute; None on Windows, which has none."""
    return os.getloadavg()[0] if os.name == "posix" else None


def calls_per_block(
    a: Step,
    b: Step,
    seconds: float,
    *,
    first: int = 0,
    synchronize: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """How many calls make a block of the faster variant last about `seconds`; both have run before. Calls each twice."""
    each = []
    for step in (a, b):
        synchronize()
        start = clock()
        for index in (first, first + 1):
            step(index)
        synchronize()
        each.append((clock() - start) / 2)
    return max(1, math.ceil(seconds / min(each)))


def alternate(
    a: Step,
    b: Step,
    *,
    rounds: int,
    warmup: int,
    calls: int,
    max_pressure: float,
    seed: int = 0,
    first: int = 0,
    synchronize: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    waited: Callable[[], float | None] = cpu_waited,
    load: Callable[[], float | None] = load_average,
) -> Iterator[Round]:
    """Rounds as they are done: `warmup` of them, then until `rounds` are kept, or three times as many were tried.

    A step is called with an index, from `first` on; in every round both variants get the same ones. `calls` is the number
    of calls in each of a round's four blocks. A round during which the pressure was above `max_pressure` is not kept.
    `synchronize` waits for the device; it is called at both ends of a block and never within.
    """
    lot, steps = Random(seed), {"A": a, "B": b}
    kept = tried = 0
    while kept < rounds and tried < warmup + 3 * rounds:
        order = lot.choice(ORDERS)
        began, waited_before = clock(), waited()
        seconds, index = {"A": 0.0, "B": 0.0}, {"A": first, "B": first}
        for name in order:
            gc.collect()  # one variant does not pay for what the other left behind
            synchronize()
            start = clock()
            for _ in range(calls):
                steps[name](index[name])
                index[name] += 1
            synchronize()
            seconds[name] += clock() - start
        waited_after, elapsed = waited(), clock() - began
        pressure = None if waited_before is None or waited_after is None else (waited_after - waited_before) / elapsed
        busy = pressure is not None and pressure > max_pressure
        status = "warm-up" if tried < warmup else "busy" if busy else "kept"
        yield Round(order, seconds["A"] / (2 * calls), seconds["B"] / (2 * calls), load(), pressure, status)
        kept, tried, first = kept + (status == "kept"), tried + 1, first + 2 * calls


def compare(a: Sequence[float], b: Sequence[float], *, level: float = 0.95) -> Comparison:
    """Compares the seconds of A and B in the rounds that were kept, paired by round. Needs at least MIN_ROUNDS."""
    assert len(a) == len(b) >= MIN_ROUNDS
    ratios = np.asarray(a, dtype=float) / np.asarray(b, dtype=float)
    low, high = bootstrap_interval(ratios, level=level)
    return Comparison(float(np.median(ratios)), low, high, level, sign_test(ratios), len(ratios))


def bootstrap_interval(
    ratios: Sequence[float] | np.ndarray, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """The percentile bootstrap interval of the median (Efron 1979): quantiles of the medians of resampled rounds.

    For 9 rounds and 95 % these are the second smallest and the second largest ratio, which hold the true median with
    probability 1 - 20/512 = 96.1 %, whatever the distribution of the ratios.
    """
    ratios = np.asarray(ratios, dtype=float)
    chosen = np.random.default_rng(seed).integers(len(ratios), size=(resamples, len(ratios)))
    low, high = np.quantile(np.median(ratios[chosen], axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def sign_test(ratios: Sequence[float] | np.ndarray) -> float:
    """The two-sided p-value of as many ratios on one side of 1 when both sides are equally likely; ties are left out.

    Equal to `scipy.stats.binomtest(above, above + below).pvalue`.
    """
    ratios = np.asarray(ratios, dtype=float)
    above, below = int((ratios > 1).sum()), int((ratios < 1).sum())
    n, fewer = above + below, min(above, below)
    tail = sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n
    return min(1.0, 2 * tail)


def sentence(result: Mapping[str, Any]) -> str:
    """What a result file says, as a person reads it."""
    found, names, each = result["result"], result["variants"], result["result"]["seconds_per_step"]
    discarded = f", {found['discarded']} more left out as the machine was busy" if found["discarded"] else ""
    lines = [
        f"{result['model']}: {names['a']} a step takes {found['ratio']:.3g} times as long as {names['b']} "
        f"({found['level']:.0%}: {found['low']:.3g}-{found['high']:.3g}, {found['rounds']} rounds{discarded}; "
        f"sign test p = {found['p_value']:.2g})"
    ]
    if found["low"] <= 1 <= found["high"]:
        lines.append("  1 is inside the interval: no difference has been shown")
    machine = result["machine"]
    lines.append(
        f"  on this machine only: {each['a'] * 1e3:.4g} ms and {each['b'] * 1e3:.4g} ms a step of "
        f"{result['config']['batch_size']} ({machine['device']}, {machine['cpus']} CPUs, {machine['threads']} thread(s))"
    )
    counts, parity = result["counts"], result["parity"]
    lines.append(
        f"  ops {counts['a']['ops']:,} and {counts['b']['ops']:,}, of which dtype copies {counts['a']['dtype_copies']:,} and "
        f"{counts['b']['dtype_copies']:,}; saved for the backward pass {counts['a']['saved_bytes']:,} and "
        f"{counts['b']['saved_bytes']:,} bytes"
    )
    lines.append(
        f"  the losses of the first {parity['steps']} steps differ by at most {parity['largest_relative_difference']:.1g} "
        "of their size"
    )
    if result["memory"] is not None:
        memory = {name: f"{bytes_ / 2**30:.2f} GiB" for name, bytes_ in result["memory"].items()}
        lines.append(f"  peak memory {memory['a']} and {memory['b']}")
    return "\n".join(lines)


TABLE_HEAD = (
    "| pair | model, profile | device | A / B | 95 % interval | rounds | sign test p | A, B ms per step | "
    "A, B ops | A, B dtype copies | file |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def table_row(result: Mapping[str, Any], file: str) -> str:
    """A result as a row of the Markdown table in docs/performance.md; `file` is the result file's name."""
    found, counts, each = result["result"], result["counts"], result["result"]["seconds_per_step"]
    cells = (
        result["pair"],
        f"{result['model']}, {result['profile']}",
        result["machine"]["device"],
        f"{found['ratio']:.3f}",
        f"{found['low']:.3f}-{found['high']:.3f}",
        f"{found['rounds']}",
        f"{found['p_value']:.2g}",
        f"{each['a'] * 1e3:.4g}, {each['b'] * 1e3:.4g}",
        f"{counts['a']['ops']:,}; {counts['b']['ops']:,}",
        f"{counts['a']['dtype_copies']:,}; {counts['b']['dtype_copies']:,}",
        f"`{file}`",
    )
    return f"| {' | '.join(cells)} |"
