"""What is logged and printed of an evaluation: the three outcomes (learned, kept, memorised) and the means that they are from."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from sushi_research.evaluation import drift, memorisation, outcomes, validation_set
from sushi_research.evaluation.result_arrays import over_captions
from sushi_research.evaluation.results import Measured

# The set's name in MeasuredSets -> (loss, base loss), [N, noise samples] each.
Losses = Mapping[str, tuple[np.ndarray, np.ndarray]]


def summary(found: Losses, val_set: Measured) -> dict[str, float | None]:
    """The logged metrics of what was measured. A mean that includes a value that is not finite is None."""
    values = validation_set.summary(*found["validation"], val_set.timesteps())
    if "drift" in found:
        values |= drift.summary(found["drift"][0])
    for name, key in (("base_images", "kept"), ("prior", "prior"), ("trained", "trained")):
        if name in found:
            values |= outcomes.ratio_summary(f"evaluation/{key}", *found[name])
    if "pictures_learned" in found:
        values |= outcomes.ratio_summary("evaluation/pictures_learned", *found["pictures_learned"])
    if "pictures_kept" in found:
        values |= outcomes.mean_with_error("evaluation/pictures_kept", found["pictures_kept"][0])
    if "trained" in found:
        # Each training image is measured with one caption, so an image with several captions is one here.
        loss, base = (over_captions(val_set.names, each) for each in found["validation"])
        values |= memorisation.summary(found["trained"], (loss, base))
    return values


def describe(values: Mapping[str, float | None]) -> str:
    """An evaluation as a line of text."""
    parts = [
        f"validation loss {with_error(values, 'evaluation/loss', '.5f')}, over the base "
        f"{with_error(values, 'evaluation/loss_over_base', '+.5f')}",
        f"learned {_ratio(values, 'evaluation/learned')} at the noisiest timesteps",
    ]
    if "evaluation/kept" in values:
        kept = [f"{_ratio(values, 'evaluation/kept')} on the base's own images"]
        if "evaluation/prior" in values:
            kept.append(f"{_ratio(values, 'evaluation/prior')} on prior images")
        parts.append(f"kept {', '.join(kept)}")
    elif "evaluation/prior" in values:
        parts.append(f"kept {_ratio(values, 'evaluation/prior')} on prior images")
    if "evaluation/memorised_auc" in values:
        parts.append(f"memorised {_memorised(values)}")
    if "evaluation/drift" in values:
        parts.append(f"drift {with_error(values, 'evaluation/drift', '.3g')}")
    if "evaluation/pictures_learned" in values:
        parts.append(f"pictures' distance from held-out images {_ratio(values, 'evaluation/pictures_learned')}")
    if "evaluation/pictures_kept" in values:
        parts.append(f"from the base's pictures {with_error(values, 'evaluation/pictures_kept', '.3g')}")
    return "; ".join(parts)


def with_error(values: Mapping[str, float | None], name: str, form: str) -> str:
    """A mean and its standard error, as text."""
    if values[name] is None:
        return "not finite"
    error = values.get(f"{name}_se")
    return f"{values[name]:{form}}" + ("" if error is None else f" +- {error:.2g}")


def _ratio(values: Mapping[str, float | None], name: str) -> str:
    value = values[name]
    if value is None:
        return "not finite"
    change = math.expm1(value)
    words = f"{abs(change):.1%} {'below' if change < 0 else 'above'} the base" if round(change, 3) else "as the base"
    return f"{with_error(values, name, '+.3f')} ({words})"


def _memorised(values: Mapping[str, float | None]) -> str:
    name = "evaluation/memorised_auc"
    if values[name] is None:
        return "not finite"
    low, high = (values[f"{name}_{side}"] for side in ("low", "high"))
    assert low is not None and high is not None
    words = "not shown to recognise its training images" if low <= 0.5 else "recognises its training images"
    if high < 0.5:
        words = "training images are of another kind than held-out ones, such as prior images"
    return f"AUC {values[name]:.2f} ({low:.2f} to {high:.2f}: {words})"
