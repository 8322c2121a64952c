"""Times two variants of a step: alternating rounds, the median of paired ratios, its interval, a sign test.

On a shared machine, wall-clock times drift by far more than the differences of interest, so A and B are timed alternately. A
round consists of four blocks, ABBA or BAAB in random order. A linear drift within a round affects A and B equally, and any
remaining bias favours A as often as B. This module does not depend on what a step does.
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
from statistics import median
from typing import Any, Literal

MIN_ROUNDS = 9
ORDERS = ("ABBA", "BAAB")
PRESSURE = Path("/proc/pressure/cpu")

Step = Callable[[int], Any]


@dataclass(frozen=True)
class Round:
    """One round: its order, the mean seconds per call of each variant, and how busy the machine was.

    `a` and `b` are wall-clock times, `a_cpu` and `b_cpu` the CPU time of this process. `load` is the machine's load average over
    the last minute, `pressure` the share of the round in which some task waited for a CPU; either is None if the system does
    not report it. `status`: only "kept" rounds count; "warm-up" rounds come first, "busy" ones had too much pressure. A round
    is dropped for both variants.
    """

    order: str
    a: float
    b: float
    a_cpu: float
    b_cpu: float
    load: float | None
    pressure: float | None
    status: Literal["warm-up", "busy", "kept"]


@dataclass(frozen=True)
class TimingComparison:
    """`ratio`: the median over rounds of A's time / B's; `low` to `high` is its 95 % interval.

    `p_value`: the probability that two equal variants give rounds at least as one-sided as these.
    """

    ratio: float
    low: float
    high: float
    p_value: float
    rounds: int


def cpu_waited() -> float | None:
    """Seconds since boot in which some task waited for a CPU; None if the kernel does not count them."""
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
    """The number of calls with which a block of the faster variant takes about `seconds`.

    Calls each variant twice; both must have run before.
    """
    each = []
    for step in (a, b):
        synchronize()
        start = clock()
        for index in (first, first + 1):
            step(index)
        synchronize()
        each.append((clock() - start) / 2)
    return max(1, math.ceil(seconds / min(each)))


@dataclass(frozen=True)
class Clocks:
    """The clocks of a timing: wall and CPU seconds, seconds in which a task waited for a CPU, the load average."""

    wall: Callable[[], float] = time.perf_counter
    cpu: Callable[[], float] = time.process_time
    waited: Callable[[], float | None] = cpu_waited
    load: Callable[[], float | None] = load_average


def alternate(
    a: Step,
    b: Step,
    *,
    rounds: int,
    warmup: int,
    calls: int,
    max_pressure: float,
    limit: float,
    seed: int = 0,
    first: int = 0,
    synchronize: Callable[[], None] = lambda: None,
    clocks: Clocks = Clocks(),  # noqa: B008  frozen
) -> Iterator[Round]:
    """Yields rounds as they are done: first `warmup` rounds, then until `rounds` are kept or `limit` seconds have passed.

    A step is called with an index, starting at `first`; in every round both variants get the same indices. `calls` is the number
    of calls in each of a round's four blocks. A round with a pressure above `max_pressure` is not kept. `synchronize` waits for
    the device; it is called only at the start and the end of a block.
    """
    clock, cpu_clock, waited = clocks.wall, clocks.cpu, clocks.waited
    lot, steps = Random(seed), {"A": a, "B": b}
    kept = tried = 0
    deadline = clock() + limit
    gc.collect()
    gc.freeze()  # so that gc.collect() before each block does not scan existing objects
    try:
        while kept < rounds and clock() < deadline:
            order = lot.choice(ORDERS)
            started, waited_before = clock(), waited()
            seconds, cpu, index = dict.fromkeys("AB", 0.0), dict.fromkeys("AB", 0.0), dict.fromkeys("AB", first)
            for name in order:
                gc.collect()  # so that garbage of one variant does not slow down the other
                synchronize()
                start, cpu_start = clock(), cpu_clock()
                for _ in range(calls):
                    steps[name](index[name])
                    index[name] += 1
                synchronize()
                seconds[name] += clock() - start
                cpu[name] += cpu_clock() - cpu_start
            waited_after, elapsed = waited(), clock() - started
            pressure = (
                None if waited_before is None or waited_after is None else (waited_after - waited_before) / elapsed
            )
            busy = pressure is not None and pressure > max_pressure
            status = "warm-up" if tried < warmup else "busy" if busy else "kept"
            a_each, b_each, a_cpu, b_cpu = (total[name] / (2 * calls) for total in (seconds, cpu) for name in "AB")
            yield Round(order, a_each, b_each, a_cpu, b_cpu, clocks.load(), pressure, status)
            kept, tried, first = kept + (status == "kept"), tried + 1, first + 2 * calls
    finally:
        gc.unfreeze()


def compare_timings(a: Sequence[float], b: Sequence[float]) -> TimingComparison:
    """Compares the seconds of A and B in the kept rounds, paired by round; their number is odd and at least MIN_ROUNDS."""
    assert len(a) == len(b) >= MIN_ROUNDS
    ratios = [one / other for one, other in zip(a, b, strict=True)]
    low, high = bootstrap_interval(ratios)
    return TimingComparison(median(ratios), low, high, sign_test(ratios), len(ratios))


def bootstrap_interval(ratios: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """The exact percentile bootstrap interval of the median of an odd number n of ratios (Efron 1979, section 3).

    The median of n ratios sampled with replacement is at most the k-th smallest ratio if more than half of the samples are.
    This has the probability P(Binomial(n, k/n) > n/2), so no resampling is needed. For 9 ratios the interval goes from the
    second smallest to the second largest, and contains the true median with probability 1 - 20/512 = 96.1 % for any
    distribution of the ratios. For 15 it goes from the fourth to the twelfth, with 96.5 %.
    """
    n, ordered = len(ratios), sorted(ratios)
    assert n % 2 == 1

    def at_most(k: int) -> float:
        return sum(math.comb(n, j) * (k / n) ** j * (1 - k / n) ** (n - j) for j in range(n // 2 + 1, n + 1))

    k = next(k for k in range(1, n + 1) if at_most(k) >= (1 - level) / 2)
    return ordered[k - 1], ordered[n - k]


def sign_test(ratios: Sequence[float]) -> float:
    """The two-sided p-value of the sign test against a median ratio of 1; ties are skipped.

    Equal to `scipy.stats.binomtest(above, above + below).pvalue`.
    """
    above, below = sum(ratio > 1 for ratio in ratios), sum(ratio < 1 for ratio in ratios)
    n, fewer = above + below, min(above, below)
    tail = sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n
    return min(1.0, 2 * tail)


def sentence(result: Mapping[str, Any]) -> str:
    """A result file as readable text."""
    found, cpu, names, each = result["time"], result["cpu_time"], result["variants"], result["seconds_per_step"]
    busy = f", {result['discarded']} more skipped because the machine was busy" if result["discarded"] else ""
    lines = [
        f"{result['model']}: a step {names['a']} takes {found['ratio']:.2f} times as long as one {names['b']} "
        f"(95 %: {found['low']:.2f}-{found['high']:.2f}, {found['rounds']} rounds{busy}; "
        f"sign test p = {found['p_value']:.2g})",
        f"  by CPU time: {cpu['ratio']:.2f} times (95 %: {cpu['low']:.2f}-{cpu['high']:.2f})",
    ]
    if found["low"] <= 1 <= found["high"]:
        lines.append("  the first interval contains 1: in wall-clock time, no difference has been shown")
    machine = result["machine"]
    lines.append(
        f"  on this machine: {each['a'] * 1e3:.4g} ms and {each['b'] * 1e3:.4g} ms per step with batch size "
        f"{result['config']['batch_size']} ({machine['device']}, {machine['cpus']} CPUs, {machine['threads']} thread(s))"
    )
    counts, parity = result["counts"], result["parity"]
    lines.append(
        f"  ops {counts['a']['ops']:,} and {counts['b']['ops']:,}, of which dtype copies {counts['a']['dtype_copies']:,} and "
        f"{counts['b']['dtype_copies']:,}; saved for the backward pass {counts['a']['saved_bytes']:,} and "
        f"{counts['b']['saved_bytes']:,} bytes"
    )
    lines.append(
        f"  the losses of the first {parity['steps']} steps have a relative difference of at most "
        f"{parity['largest_relative_difference']:.1g}"
    )
    if result["memory"] is not None:
        memory = {name: f"{bytes_ / 2**30:.2f} GiB" for name, bytes_ in result["memory"].items()}
        lines.append(f"  peak memory {memory['a']} and {memory['b']}")
    return "\n".join(lines)


TABLE_HEAD = (
    "| pair | model, profile | device | A / B (95 %) | by CPU time | rounds | p | A, B: ms per step | A, B: ops | "
    "A, B: dtype copies | file |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def table_row(result: Mapping[str, Any], file: str) -> str:
    """A result as a row of the Markdown table in docs/performance.md; `file` is the result file's name."""
    found, cpu, counts, each = result["time"], result["cpu_time"], result["counts"], result["seconds_per_step"]
    cells = (
        result["pair"],
        f"{result['model']}, {result['profile']}",
        result["machine"]["device"],
        f"{found['ratio']:.3f} ({found['low']:.3f}-{found['high']:.3f})",
        f"{cpu['ratio']:.3f} ({cpu['low']:.3f}-{cpu['high']:.3f})",
        f"{found['rounds']}",
        f"{found['p_value']:.2g}",
        f"{each['a'] * 1e3:.4g}, {each['b'] * 1e3:.4g}",
        f"{counts['a']['ops']:,}; {counts['b']['ops']:,}",
        f"{counts['a']['dtype_copies']:,}; {counts['b']['dtype_copies']:,}",
        f"`{file}`",
    )
    return f"| {' | '.join(cells)} |"
