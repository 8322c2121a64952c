"""Determines a base's prediction type and whether it has zero terminal SNR, from its files or the user's options.

Training a v-prediction base as an epsilon base ruins it without any error. So all evidence is collected together with its
source, and contradictory evidence is an error.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from sushi_research.errors import UserError

PredictionType = Literal["epsilon", "v_prediction"]
# Values that trainers and merging tools write into a file's metadata.
_METADATA_TYPES = {
    **dict.fromkeys(("epsilon", "eps"), "epsilon"),
    **dict.fromkeys(("v", "v_prediction", "v-prediction", "velocity"), "v_prediction"),
    **{other: other for other in ("sample", "edm", "flow", "flow_matching", "rectified_flow")},
}


@dataclass(frozen=True)
class Prediction:
    """`type` is what the UNet predicts; `zero_terminal_snr`: whether the last timestep is pure noise (arXiv 2305.08891)."""

    type: PredictionType = "epsilon"
    zero_terminal_snr: bool = False

    def describe(self) -> str:
        """Both as text: "v_prediction, zero-terminal SNR"."""
        return f"{self.type}, zero-terminal SNR" if self.zero_terminal_snr else self.type


class Evidence(NamedTuple):
    """One piece of evidence and its source: the type or the zero-terminal SNR, whichever is not None.

    The option overrides `weak` evidence of the same fact, such as metadata, which merging tools copy from file to file.
    """

    where: str
    type: str | None = None
    zero_terminal_snr: bool | None = None
    weak: bool = False


def from_scheduler(config: Mapping[str, Any], where: str) -> list[Evidence]:
    """The evidence in a `scheduler_config.json`; a missing key means diffusers' default."""
    zero = bool(config.get("rescale_betas_zero_snr", False))  # schedulers.py refuses what is not true, false or null
    return [Evidence(where, str(config.get("prediction_type", "epsilon")), zero)]


def from_single_file(names: Collection[str], where: str) -> list[Evidence]:
    """The evidence in a single file's tensor names: the empty tensors `v_pred` and `ztsnr` that ComfyUI, Forge and kohya read.

    No marker is no evidence: most epsilon models have none.
    """
    markers = {"v_pred": {"type": "v_prediction"}, "ztsnr": {"zero_terminal_snr": True}}
    return [Evidence(f"the key {name} in {where}", **said) for name, said in markers.items() if name in names]


def from_metadata(metadata: Mapping[str, str], where: str) -> list[Evidence]:
    """The evidence in a single file's metadata, as kohya and ComfyUI write it. "none" and an empty text are no evidence."""
    said: dict[str, Evidence] = {}
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):
        text = metadata.get(key, "").strip().lower()
        if text not in ("", "none", "null"):
            said[key] = Evidence(
                f"{key} in the metadata of {where}", _METADATA_TYPES.get(text, ascii(text)[1:-1][:60]), weak=True
            )
    for key, fact in (
        ("ss_v_parameterization", {"type": "v_prediction"}),
        ("ss_zero_terminal_snr", {"zero_terminal_snr": True}),
    ):
        if metadata.get(key, "").strip().lower() == "true":
            said[key] = Evidence(f"{key} in the metadata of {where}", **fact, weak=True)
    return list(said.values())


def decide(evidence: Sequence[Evidence], asked_type: str | None = None, asked_zero: bool | None = None) -> Prediction:
    """The prediction that all evidence and the user's options agree on; epsilon without any, as in SD1.5 and SDXL.

    UserError for contradictory evidence, for an unsupported type, and for epsilon with zero-terminal SNR: where the input is
    pure noise, predicting the noise is trivial and gives no information about the image.
    """

    def overridden(each: Evidence) -> bool:
        return each.weak and (asked_type if each.type else asked_zero) is not None

    said = [each for each in evidence if not overridden(each)]
    said += [
        Evidence("the option prediction_type", asked_type),
        Evidence("the option zero_terminal_snr", None, asked_zero),
    ]
    kind, kind_where = _agreed(said, "type", "prediction type") or ("epsilon", "nothing says otherwise")
    zero, zero_where = _agreed(said, "zero_terminal_snr", "zero-terminal SNR") or (False, "")
    if kind not in ("epsilon", "v_prediction"):
        raise UserError(
            f"the base predicts {kind} ({kind_where}), and this suite trains epsilon and v_prediction only."
        )
    if zero and kind == "epsilon":
        raise UserError(
            f"zero-terminal SNR ({zero_where}) cannot be used with epsilon ({kind_where}), which has nothing to predict in pure "
            "noise: set prediction_type to v_prediction if that is what the base was trained with."
        )
    return Prediction(kind, zero)


def _agreed(said: Sequence[Evidence], field: str, title: str) -> tuple[Any, str] | None:
    """(value, source) of a field; None if no evidence states it. UserError names two sources that contradict each other."""
    stated = [(value, each.where) for each in said if (value := getattr(each, field)) is not None]
    for value, where in stated[1:]:
        if value != stated[0][0]:
            choice = "say with prediction_type which is right, or " if any(each.weak for each in said) else ""
            first, second = (str(each).lower() if isinstance(each, bool) else each for each in (stated[0][0], value))
            raise UserError(
                f"the base's {title} is {first} by {stated[0][1]}, but {second} by {where}: training by the wrong one ruins "
                f"the model, so {choice}correct the one that is wrong."
            )
    return stated[0] if stated else None
