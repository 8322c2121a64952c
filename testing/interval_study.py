"""Simulates losses and counts how often the intervals and test results of sushi_research/reports/statistics.py are right.

    python -m testing.interval_study                 # about six minutes on one core
    python -m testing.interval_study --tables        # print the tables of the stored result

It writes docs/interval_study.json and prints its two large tables as they are in docs/experiments.md. The result stores the
SHA-256 of statistics.py, and tests/unit/testing/test_interval_study.py fails when that file has changed since.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from sushi_research.files import write_json
from sushi_research.progress import progress
from sushi_research.reports import statistics
from sushi_research.reports.statistics import paired_difference

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "docs" / "interval_study.json"
# Not randomness.py: other random numbers move the result by its own error only.
INPUTS = ("sushi_research/reports/statistics.py",)
KINDS = {
    "normal": "normal",
    "skewed": "skewed (exponential)",
    "very skewed": "very skewed (lognormal)",
    "heavy tails": "heavy tails (t, 3 degrees)",
    "uneven images": "uneven images (lognormal spread)",
}
IMAGES = (8, 16, 32, 64)
METHODS = ("t", "percentile", "BCa", "bootstrap-t, equal tails", "bootstrap-t, symmetric")
# Runs of each variant, and the standard deviation of the seed effect in units of that of the image effect.
SEEDS = ((1, 0.0), (2, 0.3), (2, 1.0), (3, 0.3), (3, 1.0), (5, 1.0))
# Distribution, runs of each variant, standard deviation of the seed effect, pairs.
POWER = (("normal", 1, 0.0, 1), ("skewed", 1, 0.0, 10), ("normal", 3, 0.3, 1))
BATCH = 500  # trials simulated at once
VARIANTS = 40


def effects(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Independent effects of mean 0 and variance 1; for "uneven images" the variance itself differs from one to the next."""
    match kind:
        case "normal":
            return rng.standard_normal(shape)
        case "skewed":  # skewness 2
            return rng.exponential(size=shape) - 1
        case "very skewed":  # skewness 6.2
            return (rng.lognormal(size=shape) - math.exp(0.5)) / math.sqrt(math.e * (math.e - 1))
        case "heavy tails":  # no fourth moment
            return rng.standard_t(3, shape) / math.sqrt(3)
        case "uneven images":
            return rng.lognormal(size=shape) * rng.standard_normal(shape) / math.e
    raise AssertionError(kind)


def differences(rng: np.random.Generator, kind: str, shape: tuple[int, int, int]) -> np.ndarray:
    """[trials, N, K] clustered differences of mean 0: half of the variance is common to the K values of an image."""
    return effects(rng, kind, shape[:-1])[..., None] + effects(rng, kind, shape)


def variant(
    rng: np.random.Generator, shape: tuple[int, ...], *, seed: float, image: float, both: float, kind: str = "normal"
) -> np.ndarray:
    """Losses [..., S, N, 1] of a variant with standard deviations of the seed effect, the image effect and their interaction.

    `kind` is the distribution of the image effect; the other two are normal.
    """
    *many, runs, images = shape
    effect = seed * rng.standard_normal((*many, runs, 1)) + image * effects(rng, kind, (*many, 1, images))
    return (effect + both * rng.standard_normal(shape))[..., None]


@contextmanager
def resamples(count: int) -> Iterator[None]:
    """`paired_difference` with fewer resamples than its 99,999; `count` + 1 must be a multiple of 20."""
    usual, statistics.RESAMPLES = statistics.RESAMPLES, count
    try:
        yield
    finally:
        statistics.RESAMPLES = usual


def intervals(d: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Lower and upper ends of 95 % intervals for the mean of [trials, N] values, by each of METHODS."""
    n, count = d.shape[1], statistics.RESAMPLES
    mean, error = d.mean(1), stats.sem(d, axis=1)
    centred = d - mean[:, None]
    counts = statistics._counts(n, count).astype(float).T
    # Means and t of [trials, resamples].
    means = centred @ counts / n
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.nan_to_num(means / np.sqrt((centred**2 @ counts / n - means**2).clip(0) / (n - 1)))
    first, last, symmetric = (int(share * (count + 1)) - 1 for share in (0.025, 0.975, 0.95))
    # BCa (Efron 1987): the acceleration of a mean is its skewness / (6 sqrt(n)).
    bias = stats.norm.ppf((means < 0).mean(1))[:, None]
    skewness = ((centred**3).sum(1) / (6 * (centred**2).sum(1) ** 1.5))[:, None]
    z = bias + stats.norm.ppf([0.025, 0.975])
    shares = stats.norm.cdf(bias + z / (1 - skewness * z))
    means, student = np.sort(means), stats.t.ppf(0.975, n - 1)
    corrected = np.take_along_axis(means, (shares * (count + 1)).astype(int).clip(1, count) - 1, axis=1)
    absolute = np.partition(np.abs(t), symmetric)[:, symmetric]
    t = np.partition(t, (first, last))
    ends = (
        (mean - student * error, mean + student * error),
        (mean + means[:, first], mean + means[:, last]),
        (mean + corrected[:, 0], mean + corrected[:, 1]),
        (mean - t[:, last] * error, mean - t[:, first] * error),
        (mean - absolute * error, mean + absolute * error),
    )
    return dict(zip(METHODS, ends, strict=True))


def coverage(trials: int, advance: Callable[[], Any]) -> list[dict[str, Any]]:
    """Percent of simulated 95 % intervals that hold the true mean: a row for each of KINDS and IMAGES, a key for each method."""
    rng, rows = np.random.default_rng(0), []
    with resamples(9_999):
        for kind in KINDS:
            for images in IMAGES:
                hits: dict[str, list[float]] = {method: [] for method in METHODS}
                for _ in range(0, trials, BATCH):
                    d = differences(rng, kind, (min(BATCH, trials), images, 8)).mean(2)
                    for method, (low, high) in intervals(d).items():
                        hits[method].append(float(np.mean((low <= 0) & (high >= 0))))
                    advance()
                shares = {method: round(100 * float(np.mean(found)), 2) for method, found in hits.items()}
                rows.append({"kind": kind, "images": images, **shares})
    return rows


def p_values(x: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The p-value of each pair of variants, by their places in x [variants, S, N, 1]."""
    return np.array([paired_difference(x[a], x[b]).p_value for a, b in zip(left, right, strict=True)])


def equal_variants(families: int, advance: Callable[[], Any]) -> list[dict[str, Any]]:
    """Percent of wrong results among VARIANTS equal variants on 32 images: of a single pair, and of a family of all pairs.

    "ours" is `paired_difference`, "Satterthwaite" a t-test of the summed variances with Satterthwaite's degrees of freedom.
    """
    images = 32
    left, right = np.triu_indices(VARIANTS, 1)
    pairs, rows = len(left), []
    # Every fourth variant against the next one.
    single = np.flatnonzero((left % 4 == 0) & (right == left + 1))
    for runs, seed in SEEDS:
        rng = np.random.default_rng(runs)
        alone, family = {"ours": 0.0, "Satterthwaite": 0.0}, {"ours": 0, "Satterthwaite": 0}
        for _ in range(families):
            x = variant(rng, (VARIANTS, runs, images), seed=seed, image=1.0, both=0.3)
            per_image, means = x.mean((1, 3)), x.mean((2, 3))
            gap = per_image[right] - per_image[left]
            of_images = stats.sem(gap, axis=1) ** 2
            of_seeds = np.stack(
                [stats.sem(means, axis=1)[side] ** 2 if runs > 1 else 0 * of_images for side in (left, right)]
            )
            total = of_images + of_seeds.sum(0)
            degrees = total**2 / (of_images**2 / (images - 1) + (of_seeds**2).sum(0) / max(runs - 1, 1))
            t = np.abs(gap.mean(1)) / np.sqrt(total)
            p = 2 * stats.t.sf(t, degrees)
            alone["Satterthwaite"] += float(np.mean(p[single] <= 0.05))
            family["Satterthwaite"] += int(p.min() * pairs <= 0.05)
            with resamples(3_999):
                alone["ours"] += float(np.mean(p_values(x, left[single], right[single]) <= 0.05))
            # The pairs with the largest t stand for the family. Its level needs all 99,999 resamples.
            largest = np.argsort(-t)[:4]
            family["ours"] += int(p_values(x, left[largest], right[largest]).min() * pairs <= 0.05)
            advance()
        row: dict[str, Any] = {"runs": runs, "seed": seed}
        for method in alone:
            row |= {f"one pair, {method}": round(100 * alone[method] / families, 2)}
            row |= {f"{pairs} pairs, {method}": round(100 * family[method] / families, 2)}
        rows.append(row)
    return rows


def power(trials: int, advance: Callable[[], Any]) -> list[dict[str, Any]]:
    """Percent of trials that find a planted difference of the mean `smallest_detectable`, nominally 80."""
    rows = []
    with resamples(3_999):
        for kind, runs, seed, pairs in POWER:
            rng = np.random.default_rng(2)
            shape = (trials, runs, 32)
            a, b = (variant(rng, shape, seed=seed, image=1.0, both=0.0, kind=kind) for _ in "ab")
            found = [paired_difference(x, y, pairs=pairs) for x, y in zip(a, b, strict=True)]
            # It is an estimate, because the standard error is one: planted is its mean over the trials.
            planted = float(np.mean([d.smallest_detectable for d in found]))
            again = [paired_difference(x, y - planted, pairs=pairs) for x, y in zip(a, b, strict=True)]
            share = np.mean([d.p_value * pairs <= 0.05 and d.value < 0 for d in again])
            row = {"kind": kind, "runs": runs, "seed": seed, "pairs": pairs}
            rows.append(row | {"found": round(100 * float(share), 2)})
            advance()
    return rows


def input_hashes() -> dict[str, str]:
    """SHA-256 of each file that the result depends on, by its path from the repository's root."""
    return {name: hashlib.sha256((ROOT / name).read_bytes()).hexdigest() for name in INPUTS}


def study(trials: int, families: int, *, show_progress: bool = True) -> dict[str, Any]:
    """All three simulations. `trials`: for the coverage, a multiple of 500 or fewer than that; the power takes a tenth."""
    batches = len(KINDS) * len(IMAGES) * math.ceil(trials / BATCH)
    with progress(total=batches, description="coverage", unit="batches", disable=not show_progress) as bar:
        covered = coverage(trials, bar.update)
    total = families * len(SEEDS)
    with progress(total=total, description="equal variants", unit="families", disable=not show_progress) as bar:
        equal = equal_variants(families, bar.update)
    with progress(total=len(POWER), description="power", unit="rows", disable=not show_progress) as bar:
        powers = power(max(trials // 10, 1), bar.update)
    settings = {"trials": trials, "families": families, "power trials": max(trials // 10, 1)}
    return {
        "inputs": input_hashes(),
        "settings": settings,
        "coverage": covered,
        "equal variants": equal,
        "power": powers,
    }


def table_rows(result: dict[str, Any]) -> list[str]:
    """The rows of the two tables in docs/experiments.md, in Markdown."""
    lines, kind = [], None
    for row in result["coverage"]:
        first, kind = (KINDS[row["kind"]] if row["kind"] != kind else ""), row["kind"]
        cells = [f"{row[method]:.1f}" for method in METHODS]
        cells[-1] = f"**{cells[-1]}**"
        lines.append(f"| {first} | {row['images']} | ".replace("|  |", "| |") + " | ".join(cells) + " |")
    for row in result["equal variants"]:
        runs, seed, *shares = row.values()
        lines.append(" | ".join([f"| {runs}", f"{seed:g}" if seed else "none", *(f"{s:.1f}" for s in shares)]) + " |")
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m testing.interval_study", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tables", action="store_true", help="print the tables of the stored result and do nothing else"
    )
    if parser.parse_args(arguments).tables:
        result = json.loads(RESULT.read_text(encoding="utf-8"))
    else:
        result = study(trials=10_000, families=400)
        write_json(RESULT, result)
        print(f"written: {RESULT.relative_to(ROOT)}; put these rows into docs/experiments.md")
    print("\n".join(table_rows(result)))


if __name__ == "__main__":
    main()
