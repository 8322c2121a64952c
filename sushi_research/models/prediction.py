"""Determines what a base predicts and on which noise schedule, from its files or the user's options.

Training a v-prediction base as an epsilon base ruins it without any error. So all evidence is collected together with its
source, and contradictory evidence is an error.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from sushi_research.errors import UserError

PredictionType = Literal["epsilon", "v_prediction", "rectified_flow"]
# SwarmUI's v-prediction with zero-terminal SNR.
_ZERO_TYPE = "v-zsnr"
# Values that trainers and merging tools write into a file's metadata. SwarmUI writes and reads "sd3" for a flow of SDXL's UNet.
_METADATA_TYPES = {
    **dict.fromkeys(("epsilon", "eps"), "epsilon"),
    **dict.fromkeys(("v", "v_prediction", "v-prediction", "velocity", _ZERO_TYPE), "v_prediction"),
    **dict.fromkeys(("rectified_flow", "rectified-flow", "rectified flow", "rf", "sd3"), "rectified_flow"),
    **dict.fromkeys(("flow", "flow_matching", "flow-matching", "flow_prediction"), "rectified_flow"),
    **{other: other for other in ("sample", "edm")},
}
# diffusers' schedulers that sample rectified flows alone. Others do with `use_flow_sigmas`.
FLOW_CLASSES = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
_NOTHING = "nothing says otherwise"
# What files of rectified flows are called, which mostly have no other sign: NoobAI-RectifiedFlow, ChenkinNoob_RF, nai-v2-fm ...
_FLOW_NAME = re.compile(
    r"(?i:rectified|flow[ ._-]?match|nyaflow|big[ ._-]?asp[ ._-]*v?2[ ._-]*5)"
    r"|(?<![A-Za-z])(?i:rf|fm|flow)(?![A-Za-z])|(?<![A-Z])(?:RF|FM)(?![A-Za-z])"
)


@dataclass(frozen=True)
class Prediction:
    """`type` is what the UNet predicts; `zero_terminal_snr`: whether the last timestep is pure noise (arXiv 2305.08891).

    A rectified flow predicts noise - image on the straight line x = (1 - sigma) image + sigma noise (arXiv 2209.03003) and always
    ends in pure noise. Its `shift` moves the noise levels: sigma = shift u / (1 + (shift - 1) u) for equally spaced u (arXiv
    2403.03206, section 5.3.2). It is 1 for the other types, where it means nothing.
    """

    type: PredictionType = "epsilon"
    zero_terminal_snr: bool = False
    shift: float = 1.0

    def describe(self) -> str:
        """All of it as text: "v_prediction, zero-terminal SNR", "rectified_flow, shift 3"."""
        if self.type == "rectified_flow":
            return f"{self.type}, shift {self.shift:g}"
        return f"{self.type}, zero-terminal SNR" if self.zero_terminal_snr else self.type

    def facts(self) -> dict[str, Any]:
        """What is recorded and hashed. The shift is there for rectified flow alone, because records of before had none."""
        shift = {"shift": self.shift} if self.type == "rectified_flow" else {}
        return {"type": self.type, "zero_terminal_snr": self.zero_terminal_snr, **shift}


class Evidence(NamedTuple):
    """One piece of evidence and its source: the type, the zero-terminal SNR and the shift, whichever is not None.

    The option overrides `weak` evidence of the same fact, such as metadata, which merging tools copy from file to file. It always
    overrides a shift, which is no fact of the weights: they know every noise level, and the shift only says how often each is used.
    A `hint` is no evidence of a rectified flow, but enough not to guess.
    """

    where: str
    type: str | None = None
    zero_terminal_snr: bool | None = None
    weak: bool = False
    shift: float | None = None
    hint: bool = False


def from_scheduler(config: Mapping[str, Any], where: str, kind: str | None = None) -> list[Evidence]:
    """The evidence in a `scheduler_config.json`; a missing key means diffusers' default.

    `kind` is the scheduler's class if the config does not name it. A scheduler for flows that was made from another one carries the
    settings of that; if they say that the base predicts something else, this is evidence too, and contradicts the class.
    """
    kind = config.get("_class_name", kind)
    zero = bool(config.get("rescale_betas_zero_snr", False))  # schedulers.py refuses what is not true, false or null
    if kind in FLOW_CLASSES:
        found = [Evidence(f"the class {kind} in {where}", "rectified_flow", zero, shift=config.get("shift"))]
        carried = config.get("prediction_type")
        return found if carried is None else [*found, Evidence(f"prediction_type in {where}", _of_diffusers(carried))]
    said = Evidence(where, _of_diffusers(config.get("prediction_type", "epsilon")), zero)
    if config.get("use_flow_sigmas") is not True:
        return [said]
    return [said, Evidence(f"use_flow_sigmas in {where}", "rectified_flow", shift=config.get("flow_shift"))]


def _of_diffusers(prediction_type: Any) -> str:
    return "rectified_flow" if prediction_type == "flow_prediction" else str(prediction_type)


def from_single_file(names: Collection[str], where: str) -> list[Evidence]:
    """The evidence in a single file's tensor names: the empty tensors `v_pred` and `ztsnr` that ComfyUI, Forge and kohya read.

    No marker is no evidence: most epsilon models have none.
    """
    markers = {"v_pred": {"type": "v_prediction"}, "ztsnr": {"zero_terminal_snr": True}}
    return [Evidence(f"the key {name} in {where}", **said) for name, said in markers.items() if name in names]


def from_metadata(metadata: Mapping[str, str], where: str) -> list[Evidence]:
    """The evidence in a single file's metadata, as kohya, ComfyUI, SwarmUI and SushiUI write it. "none" and an empty text are none.

    SushiUI writes what the base predicts ("velocity") and the process that it belongs to ("ddpm" or "flow").
    """
    said: dict[str, Evidence] = {}
    is_flow = metadata.get("modelspec.noise_process", "").strip().lower() == "flow"
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):
        text = metadata.get(key, "").strip().lower()
        if text not in ("", "none", "null"):
            found = _METADATA_TYPES.get(text, ascii(text)[1:-1][:60])
            found = "rectified_flow" if is_flow and found == "v_prediction" else found
            said[key] = Evidence(f"{key} in the metadata of {where}", found, weak=True)
            if text == _ZERO_TYPE:
                said[f"{key}, zero"] = Evidence(said[key].where, zero_terminal_snr=True, weak=True)
    for key, fact in (
        ("ss_v_parameterization", {"type": "v_prediction"}),
        ("ss_zero_terminal_snr", {"zero_terminal_snr": True}),
        ("modelspec.noise_process", {"type": "rectified_flow"}),
    ):
        if metadata.get(key, "").strip().lower() == ("flow" if key == "modelspec.noise_process" else "true"):
            said[key] = Evidence(f"{key} in the metadata of {where}", **fact, weak=True)
    return list(said.values())


def from_names(file: str, metadata: Mapping[str, str]) -> list[Evidence]:
    """A hint if the name of a single file, or the title in its metadata, is like that of a rectified flow."""
    title = metadata.get("modelspec.title", "")
    names = {f"the name {file}": file, f"the title {ascii(title)[1:-1][:60]} of {file}": title}
    return [Evidence(where, hint=True) for where, name in names.items() if _FLOW_NAME.search(name)][:1]


def decide(
    evidence: Sequence[Evidence],
    asked_type: str | None = None,
    asked_zero: bool | None = None,
    asked_shift: float | None = None,
) -> Prediction:
    """The prediction that all evidence and the user's options agree on; epsilon without any, as in SD1.5 and SDXL.

    UserError for contradictory evidence, for an unsupported type, for zero-terminal SNR where it means nothing, and for a shift
    that has no effect. Epsilon with zero-terminal SNR is one such: where the input is pure noise, predicting the noise is trivial
    and gives no information about the image.
    """

    def overridden(each: Evidence) -> bool:
        if each.type:
            return each.weak and asked_type is not None
        # Who asks for a flow cannot say anything about zero-terminal SNR, which is none of its settings.
        return each.weak and (asked_zero is not None or asked_type == "rectified_flow")

    said = [each for each in evidence if not overridden(each)]
    said += [
        Evidence("the option prediction_type", asked_type),
        Evidence("the option zero_terminal_snr", None, asked_zero),
    ]
    kind, kind_where = _agreed(said, "type", "prediction type") or ("epsilon", _NOTHING)
    zero, zero_where = _agreed(said, "zero_terminal_snr", "zero-terminal SNR") or (False, "")
    if kind not in get_args(PredictionType):
        raise UserError(
            f"the base predicts {kind} ({kind_where}), and this suite trains epsilon, v_prediction and rectified_flow only."
        )
    hint = next((each.where for each in evidence if each.hint), None)
    if hint and kind != "rectified_flow" and not any(each.type and not each.weak for each in said):
        otherwise = (
            "nothing in it says so"
            if kind_where == _NOTHING
            else f"{kind_where} says {kind}, as trainers of flows write"
        )
        raise UserError(
            f"{hint} is like that of a rectified flow, but {otherwise}: set prediction_type to rectified_flow, or to {kind} if "
            "that is what the base predicts (its model page says it)."
        )
    if kind != "rectified_flow" and asked_shift is not None:
        raise UserError(
            f"flow_shift has no effect, because the base predicts {kind} ({kind_where}): remove it, or set prediction_type to "
            "rectified_flow if that is what the base was trained with."
        )
    if zero and kind == "rectified_flow":
        raise UserError(
            f"zero-terminal SNR ({zero_where}) cannot be used with rectified_flow ({kind_where}), which always ends in pure noise: "
            "remove it, or correct the prediction type."
        )
    if zero and kind == "epsilon":
        raise UserError(
            f"zero-terminal SNR ({zero_where}) cannot be used with epsilon ({kind_where}), which has nothing to predict in pure "
            "noise: set prediction_type to v_prediction if that is what the base was trained with."
        )
    shifts = [asked_shift, *(each.shift for each in evidence if kind == "rectified_flow")]
    return Prediction(kind, zero, float(next((shift for shift in shifts if shift is not None), 1.0)))


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
