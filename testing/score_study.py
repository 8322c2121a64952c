"""Simulates scores by a judge and counts how often the test of sushi_research/reports/score_statistics.py is right.

    python -m testing.score_study            # three minutes on one core
    python -m testing.score_study --tables   # print the tables of the stored result

It writes docs/score_study.json, whose tables are in docs/experiments.md. The result stores the SHA-256 of the code that was tested,
and tests/unit/testing/test_score_study.py fails when that has changed since.

A judge says right or wrong of each of 32 units, and each variant has three runs with the same seeds. A unit is right where
strength + its ease + the run's effect + their interaction is above 0, all but the strength normal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sushi_research.files import write_json
from sushi_research.progress import progress
from sushi_research.reports.score_statistics import sign_flip_difference
from sushi_research.reports.statistics import paired_difference
from testing.interval_study import resamples

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "docs" / "score_study.json"
INPUTS = ("sushi_research/reports/score_statistics.py", "sushi_research/reports/statistics.py")
TESTS: dict[str, Callable[..., Any]] = {"bootstrap-t": paired_difference, "sign flips": sign_flip_difference}
UNITS, RUNS, PAIRS = 32, 3, 8
# Name, standard deviation of the run's effect, in units of that of a unit's ease.
SEED_EFFECTS = ((1, 0.0), (3, 0.0), (3, 0.2), (3, 0.5))
# Shares of right units of the equal variants; and of the reference and of the candidate.
EQUAL = (0.05, 0.3, 0.7, 0.95)
DIFFERENT = ((0.05, 0.5), (0.05, 0.95), (0.5, 0.95), (0.3, 0.6))


def scores(rng: np.random.Generator, shares: tuple[float, float], runs: int, seed: float) -> list[np.ndarray]:
    """0 or 1 of two variants, [S, N, 1] each, with the expected shares of ones; units are equally easy for both."""
    from scipy.stats import norm

    ease = rng.standard_normal((1, UNITS))
    total = np.sqrt(1 + seed**2 + 0.25)
    made = []
    for share in shares:
        run = seed * rng.standard_normal((runs, 1)) + 0.5 * rng.standard_normal((runs, UNITS))
        made.append((norm.ppf(share) * total + ease + run > 0).astype(float)[..., None])
    return made


def found(shares: tuple[float, float], runs: int, seed: float, trials: int, pairs: int) -> dict[str, float]:
    """Percent of trials in which each test calls the pair different, at the level of Holm's first step among `pairs`."""
    rng, hits = np.random.default_rng([runs, int(100 * seed)]), dict.fromkeys(TESTS, 0)
    for _ in range(trials):
        reference, candidate = scores(rng, shares, runs, seed)
        for name, test in TESTS.items():
            d = test(reference, candidate, same_seeds=runs > 1, pairs=pairs)
            # Resamples of equal differences do not vary: what `_not_too_sure` of experiments/pairs.py did.
            constant = d.value != 0 and d.standard_error <= 1e-9 * abs(d.value)
            p = max(d.p_value, 2.0 ** (1 - d.images)) if constant and name == "bootstrap-t" else d.p_value
            hits[name] += p * pairs <= 0.05
    return {name: round(100 * count / trials, 1) for name, count in hits.items()}


def input_hashes() -> dict[str, str]:
    """SHA-256 of each file that the result depends on, by its path from the repository's root."""
    return {name: hashlib.sha256((ROOT / name).read_bytes()).hexdigest() for name in INPUTS}


def study(trials: int, *, show_progress: bool = True) -> dict[str, Any]:
    """Level and power of both tests; each row has `trials` simulated pairs."""
    level, power = [], []
    total = len(SEED_EFFECTS) * (len(EQUAL) + len(DIFFERENT))
    with resamples(3_999), progress(total=total, description="scores", unit="rows", disable=not show_progress) as bar:
        for runs, seed in SEED_EFFECTS:
            for share in EQUAL:
                level.append({"runs": runs, "seed": seed, "share": share})
                level[-1] |= found((share, share), runs, seed, trials, 1)
                bar.update()
            for shares in DIFFERENT:
                power.append({"runs": runs, "seed": seed, "shares": list(shares)})
                power[-1] |= found(shares, runs, seed, trials, PAIRS)
                bar.update()
    return {"inputs": input_hashes(), "settings": {"trials": trials, "pairs": PAIRS}, "level": level, "power": power}


def table_rows(result: dict[str, Any]) -> list[str]:
    """The rows of the two tables in docs/experiments.md, in Markdown."""
    lines = []
    for kind in ("level", "power"):
        for row in result[kind]:
            share = [row["share"]] * 2 if kind == "level" else row["shares"]
            what = " and ".join(f"{100 * each:.0f} %" for each in share)
            lines.append(
                f"| {row['runs']} | {row['seed']:g} | {what} | {row['bootstrap-t']:.1f} | **{row['sign flips']:.1f}** |"
            )
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m testing.score_study", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tables", action="store_true", help="print the tables of the stored result and do nothing else"
    )
    parser.add_argument("--trials", type=int, default=1000)
    given = parser.parse_args(arguments)
    if not given.tables:
        write_json(RESULT, study(given.trials))
    print("\n".join(table_rows(json.loads(RESULT.read_text(encoding="utf-8")))))


if __name__ == "__main__":
    main()
