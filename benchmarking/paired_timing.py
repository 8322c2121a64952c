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
from statistics import median
from typing import Any, Literal

MIN_ROUNDS = 9
ORDERS = ("ABBA", "BAAB")
PRESSURE = Path("/proc/pressure/cpu")

Step = Callable[[int], Any]


@dataclass(frozen=True)
class Round:
    """One round: its order, the mean seconds of a call of either variant, and how busy the machine was meanwhile.

    `a` and `b` are by the clock on the wall, `a_cpu` and `b_cpu` are the CPU time that this process spent. `load` is the
    machine's load average over the last minute; `pressure` the share of the round in which some task waited for a CPU;
    either is None where the system does not tell. `status`: only "kept" rounds count; "warm-up" is dropped by plan,
    "busy" for its pressure, for both variants alike.
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

    `p_value`: how often two equal variants would give rounds as one-sided as these, or more so.
    """

    ratio: float
    low: float
    high: float
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


@dataclass(frozen=True)
class Clocks:
    """What a timing reads: wall and CPU seconds, seconds in which a task waited for a CPU, the load average."""

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
    """Rounds as they are done: `warmup` of them, then until `rounds` are kept, or `limit` seconds have passed.

    A step is called with an index, from `first` on; in every round both variants get the same ones. `calls` is the number
    of calls in each of a round's four blocks. A round during which the pressure was above `max_pressure` is not kept.
    `synchronize` waits for the device; it is called at both ends of a block and never within.
    """
    clock, cpu_clock, waited = clocks.wall, clocks.cpu, clocks.waited
    lot, steps = Random(seed), {"A": a, "B": b}
    kept = tried = 0
    deadline = clock() + limit
    gc.collect()
    gc.freeze()  # what is there already is not looked through before every block
    try:
        while kept < rounds and clock() < deadline:
            order = lot.choice(ORDERS)
            started, waited_before = clock(), waited()
            seconds, cpu, index = dict.fromkeys("AB", 0.0), dict.fromkeys("AB", 0.0), dict.fromkeys("AB", first)
            for name in order:
                gc.collect()  # one variant does not pay for what the other left behind
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
    """Compares the seconds of A and B in the rounds that were kept, paired by round: an odd number, at least MIN_ROUNDS."""
    assert len(a) == len(b) >= MIN_ROUNDS
    ratios = [one / other for one, other in zip(a, b, strict=True)]
    low, high = bootstrap_interval(ratios)
    return TimingComparison(median(ratios), low, high, sign_test(ratios), len(ratios))


def bootstrap_interval(ratios: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """The percentile bootstrap interval of the median of an odd number n of ratios, exactly (Efron 1979, section 3).

    The median of n ratios drawn with replacement is at most the k-th smallest ratio when more than half of the draws are:
    with probability P(Binomial(n, k/n) > n/2). So nothing has to be drawn. For 9 ratios the interval is from the second
    smallest to the second largest, which holds the true median with probability 1 - 20/512 = 96.1 % whatever the
    distribution of the ratios; for 15 it is from the fourth to the twelfth, 96.5 %.
    """
    n, ordered = len(ratios), sorted(ratios)
    assert n % 2 == 1

    def at_most(k: int) -> float:
        return sum(math.comb(n, j) * (k / n) ** j * (1 - k / n) ** (n - j) for j in range(n // 2 + 1, n + 1))

    k = next(k for k in range(1, n + 1) if at_most(k) >= (1 - level) / 2)
    return ordered[k - 1], ordered[n - k]


def sign_test(ratios: Sequence[float]) -> float:
    """The two-sided p-value of as many ratios on one side of 1 when both sides are equally likely; ties are skipped.

    Equal to `scipy.stats.binomtest(above, above + below).pvalue`.
    """
    above, below = sum(ratio > 1 for ratio in ratios), sum(ratio < 1 for ratio in ratios)
    n, fewer = above + below, min(above, below)
    tail = sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n
    return min(1.0, 2 * tail)


def sentence(result: Mapping[str, Any]) -> str:
    """What a result file says, as a person reads it."""
    found, cpu, names, each = result["time"], result["cpu_time"], result["variants"], result["seconds_per_step"]
    busy = f", {result['discarded']} more left out because the machine was busy" if result["discarded"] else ""
    lines = [
        f"{result['model']}: {names['a']} a step takes {found['ratio']:.2f} times as long as {names['b']} "
        f"(95 %: {found['low']:.2f}-{found['high']:.2f}, {found['rounds']} rounds{busy}; "
        f"sign test p = {found['p_value']:.2g})",
        f"  by CPU time: {cpu['ratio']:.2f} times (95 %: {cpu['low']:.2f}-{cpu['high']:.2f})",
    ]
    if found["low"] <= 1 <= found["high"]:
        lines.append("  1 is inside the first interval: by the clock, no difference has been shown")
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
