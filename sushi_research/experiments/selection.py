"""What it means for a comparison that its variants were searched: the best of many is chosen by the results that are shown.

The tests stay right, because they are corrected for all pairs. But the difference of the variant that looks best is too large in
expectation (the winner's curse): it was chosen for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sushi_research.experiments.pairs import Pair


def expected_best(count: int) -> float:
    """How far the best of `count` equal variants lies from their mean, in standard errors of one of them, in expectation.

    The expected maximum of so many independent standard normal values: the integral of 1 - F(x)^n - F(-x)^n over x > 0.
    """
    if count < 2:
        return 0.0
    x = np.linspace(0.0, 10.0, 20_001)
    below = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in x])
    return float(np.trapezoid(1.0 - below**count - (1.0 - below) ** count, x))


def notes(variants: int, learned: Sequence[Pair]) -> list[str]:
    """Sentences for a page whose variants were searched; none for fewer than three. `learned`: its pairs by what they learned."""
    if variants < 3:
        return []
    luck = ""
    errors = [pair.outcome.difference.standard_error for pair in learned if pair.outcome is not None]
    if errors and (typical := float(np.median(errors))) > 0:
        # The standard error of a difference is that of a variant times the square root of two.
        size = expected_best(variants) * typical / math.sqrt(2)
        luck = f" (of {variants} equal variants, the best would look better than their mean by about {size:.2g} in log loss)"
    return [
        f"The {variants} variants were searched. The best is chosen by these results, so its advantage is partly luck{luck}: "
        "train it again next to the reference, with seeds that the search did not use and, if possible, other held-out images, and "
        "report that comparison."
    ]
