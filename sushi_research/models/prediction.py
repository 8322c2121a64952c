"""What a base predicts, and whether its noise schedule ends in pure noise: read from what the base carries, or said by the user.

A base trained with v-prediction that is taken for one that predicts the noise is ruined by training, without an error. So
every piece of evidence is collected with the place where it stands, and two that contradict each other stop the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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


@dataclass(frozen=True)
class Evidence:
    """One statement about a base: the type or the zero-terminal SNR (whichever is not None), and where it stands.

    A weak one gives way to the option prediction_type: metadata is copied from file to file by merging tools.
    """

    where: str
    type: str | None = None
    zero_terminal_snr: bool | None = None
    weak: bool = False


def from_scheduler(config: Mapping[str, Any], where: str) -> list[Evidence]:
    """The evidence of a `scheduler_config.json`; a key that is not there says what diffusers takes for it."""
    return [
        Evidence(
            where, str(config.get("prediction_type", "epsilon")), config.get("rescale_betas_zero_snr") in (True, "true")
        )
    ]


def from_single_file(names: frozenset[str] | set[str], where: str) -> list[Evidence]:
    """The evidence of a single file: the empty tensors `v_pred` and `ztsnr` that tell ComfyUI, Forge and kohya. None of
    them says nothing: most files that predict the noise carry no marker."""
    found = []
    if "v_pred" in names:
        found.append(Evidence(f"the key v_pred in {where}", type="v_prediction"))
    if "ztsnr" in names:
        found.append(Evidence(f"the key ztsnr in {where}", zero_terminal_snr=True))
    return found


def from_metadata(metadata: Mapping[str, str], where: str) -> list[Evidence]:
    """The evidence of a single file's metadata: `modelspec.prediction_type` as kohya writes it, `predict_key` as ComfyUI."""
    found = []
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):
        said = _METADATA_TYPES.get(metadata.get(key, "").strip().lower())
        if said:
            found.append(Evidence(f"{key} in the metadata of {where}", type=said, weak=True))
    if metadata.get("ss_v_parameterization") == "True":
        found.append(Evidence(f"ss_v_parameterization in the metadata of {where}", type="v_prediction", weak=True))
    return found


def decide(evidence: Sequence[Evidence], asked_type: str | None = None, asked_zero: bool | None = None) -> Prediction:
    """The prediction that all evidence agrees on, with what the user asked for; nothing said is epsilon, as SD1.5 and SDXL.

    UserError for two statements that contradict each other, for a type that is neither, and for zero-terminal SNR with
    epsilon: the noise of pure noise is known, so there is nothing to learn or to draw from there.
    """
    asked = [
        Evidence("the option prediction_type", type=asked_type),
        Evidence("the option zero_terminal_snr", zero_terminal_snr=asked_zero),
    ]
    statements = [*evidence, *asked]
    if asked_type is not None:
        statements = [said for said in statements if not said.weak]
    advice = "correct the one that is wrong"
    if any(said.weak for said in statements):
        advice = "say with prediction_type which is right, or correct the one that is wrong"
    types = _agreed(
        [(said.type, said.where) for said in statements if said.type is not None], "prediction type", advice
    )
    zeros = _agreed(
        [(said.zero_terminal_snr, said.where) for said in statements if said.zero_terminal_snr is not None],
        "zero-terminal SNR",
        advice,
    )
    kind, kind_where = types or ("epsilon", "nothing says otherwise")
    zero, zero_where = zeros or (False, "")
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


def _agreed(statements: list[tuple[Any, str]], what: str, advice: str) -> tuple[Any, str] | None:
    """The one value that is stated and where, None where nothing is; UserError shows the first two that differ."""
    for value, where in statements[1:]:
        first, first_where = statements[0]
        if value != first:
            raise UserError(
                f"the base's {what} is {_show(first)} by {first_where}, but {_show(value)} by {where}: "
                f"training by the wrong one ruins the model, so {advice}."
            )
    return statements[0] if statements else None


def _show(value: Any) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)
