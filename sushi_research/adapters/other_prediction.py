"""Adapter files that were trained on a base that predicts something else than the one that they are used with."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sushi_research.models.header import read_header
from sushi_research.models.prediction import Prediction, from_metadata


def notes(paths: Iterable[str | Path], base: Prediction) -> list[str]:
    """A sentence for each file whose metadata say that its base predicts v or a rectified flow, where this base does not.

    Most files of flows do not say what they are, so an adapter may know more of a base than the base's own file. A file that says
    epsilon is no sign: other trainers write that for every base.
    """
    found = []
    for path in paths:
        said = {each.type for each in from_metadata(read_header(Path(path)).metadata, str(path)) if each.type}
        if len(said) == 1 and base.type not in said and (kind := said.pop()) in ("v_prediction", "rectified_flow"):
            found.append(
                f"{path} says that the base it was trained on predicts {kind}, and this base is taken to predict {base.type}: set "
                f"prediction_type to {kind} if that is what this base predicts"
            )
    return found
