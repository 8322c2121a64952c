"""What a base predicts, and whether its noise schedule ends in pure noise: read from what the base carries, or said by the user.

A base trained with v-prediction that is taken for one that predicts the noise is ruined by training, without an error. So
every piece of evidence is collected with the place where it was found, and two that contradict each other stop the run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from sushi_research.errors import UserError

PredictionType = Literal["epsilon", "v_prediction"]
# What trainers and merging tools write into a file's metadata.
_METADATA_TYPES = {
    **dict.fromkeys(("epsilon", "eps"), "epsilon"),
    **dict.fromkeys(("v", "v_prediction", "v-prediction", "velocity"), "v_prediction"),
    **{other: other for other in ("sample", "edm", "flow", "flow_matching", "rectified_flow")},
}


@dataclass(frozen=True)
class Prediction:
    """`type` is what the UNet predicts; `zero_terminal_snr` says that the last timestep is noise alone (arXiv 2305.08891)."""

    type: PredictionType = "epsilon"
    zero_terminal_snr: bool = False

    def describe(self) -> str:
        """The two as a person reads them: "v_prediction, zero-terminal SNR"."""
        return f"{self.type}, zero-terminal SNR" if self.zero_terminal_snr else self.type


class Evidence(NamedTuple):
    """One statement about a base and where it was found: the type or the zero-terminal SNR, whichever is not None.

    A weak one gives way to the option prediction_type: metadata is copied from file to file by merging tools.
    """

    where: str
    type: str | None = None
    zero_terminal_snr: bool | None = None
    weak: bool = False


def from_scheduler(config: Mapping[str, Any], where: str) -> list[Evidence]:
    """The evidence of a `scheduler_config.json`; a key that is not there says what diffusers takes for it."""
    zero = config.get("rescale_betas_zero_snr") in (True, "true")
    return [Evidence(where, str(config.get("prediction_type", "epsilon")), zero)]


def from_single_file(names: Collection[str], where: str) -> list[Evidence]:
    """The evidence of a single file: the empty tensors `v_pred` and `ztsnr` that tell ComfyUI, Forge and kohya. None of
    them says nothing: most files that predict the noise carry no marker."""
    markers = {"v_pred": {"type": "v_prediction"}, "ztsnr": {"zero_terminal_snr": True}}
    return [Evidence(f"the key {name} in {where}", **said) for name, said in markers.items() if name in names]


def from_metadata(metadata: Mapping[str, str], where: str) -> list[Evidence]:
    """The evidence of a single file's metadata: `modelspec.prediction_type` as kohya writes it, `predict_key` as ComfyUI."""
    keys = ("modelspec.prediction_type", "modelspec.predict_key")
    said = {key: _METADATA_TYPES.get(metadata.get(key, "").strip().lower()) for key in keys}
    said["ss_v_parameterization"] = "v_prediction" if metadata.get("ss_v_parameterization") == "True" else None
    return [Evidence(f"{key} in the metadata of {where}", kind, weak=True) for key, kind in said.items() if kind]


def decide(evidence: Sequence[Evidence], asked_type: str | None = None, asked_zero: bool | None = None) -> Prediction:
    """The prediction that all evidence agrees on, with what the user asked for; nothing said is epsilon, as SD1.5 and SDXL.

    UserError for two statements that contradict each other, for a type that is neither, and for zero-terminal SNR with
    epsilon: the noise of pure noise is known, so there is nothing to learn or to draw from there.
    """
    said = [each for each in evidence if asked_type is None or not each.weak]
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
            f"zero-terminal SNR ({zero_where}) does not go with epsilon ({kind_where}): pure noise holds nothing that epsilon "
            "could tell, so set prediction_type to v_prediction if that is what the base was trained with."
        )
    return Prediction(kind, zero)


def _agreed(said: Sequence[Evidence], field: str, title: str) -> tuple[Any, str] | None:
    """The one value of a field that is stated, and where; None where nothing is; UserError shows the first two that differ."""
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
