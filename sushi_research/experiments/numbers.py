"""All numbers of a comparison as JSON values, for comparison.json."""

from __future__ import annotations

from typing import Any

import numpy as np

from sushi_research.experiments.clocks import clocks_of
from sushi_research.experiments.comparison import Comparison
from sushi_research.experiments.pairs import Pair, removed_by_seeds
from sushi_research.experiments.seeds import by_seed
from sushi_research.experiments.variants import Variant
from sushi_research.reports.outcome_tests import PairResult
from sushi_research.reports.statistics import Difference


def families_of(comparison: Comparison) -> dict[str, list[Pair]]:
    """The pairs by outcome at their common point; "seconds": what was learned at equal training time; "drift"."""
    outcomes = {{"evaluation": "learned"}.get(kind, kind): pairs for kind, pairs in comparison.outcomes.items()}
    return outcomes | {"seconds": comparison.seconds, "drift": comparison.drift}


def numbers(comparison: Comparison) -> dict[str, Any]:
    """All numbers of the page, as JSON values."""
    return {
        "variants": [_variant(variant) for variant in comparison.variants],
        "by_run": comparison.by_run,
        "differing": comparison.differing,
        "step": comparison.step,
        "results": [
            _result(pair, result, bins)
            for pair, result, bins in zip(comparison.learned, comparison.results, comparison.bins, strict=True)
        ],
        "families": {name: [_pair(pair) for pair in pairs] for name, pairs in families_of(comparison).items()},
        "warnings": comparison.warnings,
        "problems": comparison.problems,
    }


def _result(pair: Pair, result: PairResult | None, bins: list[Difference | None]) -> dict[str, Any]:
    found: dict[str, Any] = {"candidate": pair.candidate.label, "reference": pair.reference.label, "at": pair.at}
    found["mean_losses"] = pair.mean_losses and dict(zip(("reference", "candidate"), pair.mean_losses, strict=True))
    found["learned_by_timestep"] = [
        d and {"difference": d.value, "low": d.low, "high": d.high, "p_value": d.p_value} for d in bins
    ]
    if result is None:
        return found | {"result": None, "note": pair.note}
    words = {"result": result.word, "sides": result.words, "sentence": result.sentence}
    return found | words | {"disagreement": result.disagreement}


def _variant(variant: Variant) -> dict[str, Any]:
    curves = [run.evaluation for run in variant.runs if run.evaluation]
    found = {"label": variant.label, "runs": [str(run.path) for run in variant.runs], "seeds": list(variant.seeds)}
    return found | {"distinct_seeds": len(by_seed(variant.runs)), "clocks": clocks_of(curves)}


def _pair(pair: Pair) -> dict[str, Any]:
    found: dict[str, Any] = {"candidate": pair.candidate.label, "reference": pair.reference.label, "at": pair.at}
    if pair.outcome is None:
        return found | {"note": pair.note}
    d = pair.difference
    values = {name: getattr(d, name) for name in d.__dataclass_fields__}
    finite = {
        name: value if not isinstance(value, float) or np.isfinite(value) else None for name, value in values.items()
    }
    found |= {"outcome": pair.word, "adjusted_p": pair.outcome.adjusted_p, "identical": pair.identical}
    if pair.wall_seconds is not None:
        reference, candidate = pair.wall_seconds
        found |= {"clock": pair.clock, "wall_seconds": {"candidate": candidate, "reference": reference}}
    return found | {"same_seeds": pair.same_seeds, "removed_by_seeds": removed_by_seeds(pair), "difference": finite}
