"""The part of the plan about the objective: the loss, its weights, the noise and the timesteps, where they are not the defaults."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from sushi_research.config import TrainingConfig
from sushi_research.config.loss import LossSection, gamma_of, weighting_of
from sushi_research.config.timesteps import LAST, TimestepSection
from sushi_research.errors import UserError
from sushi_research.models.prediction import Prediction
from sushi_research.objectives.objective import chosen_timesteps, chosen_weights

# A loss whose mean weight is smaller teaches nothing. It is the smallest optimizer.lr, and for the same reason: a weight in fp32 is
# not changed by so small a part of a step.
LEAST_WEIGHT = 1e-12


@dataclass(frozen=True)
class ObjectivePlan:
    """Each part in words; `weighting`, `noise` and `timesteps` are empty for the defaults."""

    loss: str
    weighting: str
    noise: tuple[str, ...]
    timesteps: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def describe(self) -> list[str]:
        """The plan's line; none for the defaults, which are the mean squared error of all timesteps alike."""
        noise = f"noise with {', '.join(self.noise)}" if self.noise else ""
        if not (self.weighting or noise or self.timesteps) and self.loss == LossSection().type:
            return []
        return [f"objective    {'; '.join(filter(None, (self.loss, self.weighting, noise, self.timesteps)))}"]


def objective_plan(config: TrainingConfig, prediction: Prediction) -> ObjectivePlan:
    """The objective that the config asks for, of a base with this prediction.

    UserError if the weighting is 0, or nearly so, at all timesteps that are drawn (`_require_weight`).
    """
    loss, gamma = config.loss, gamma_of(config.loss.snr_gamma)
    kind = loss.type
    if kind not in ("mse", "l1"):
        kind += (
            f" (c {loss.huber_c:g}{'' if loss.huber_schedule == 'constant' else f', {loss.huber_schedule} schedule'})"
        )
    arguments = {
        "min_snr": f" (gamma {gamma:g})",
        "soft_min_snr": f" (gamma {gamma:g})",
        "v_like": " (no other than none, because the base predicts v)" if prediction.type == "v_prediction" else "",
        "p2": f" (k {loss.p2_k:g}, gamma {loss.p2_gamma:g})",
    }
    name = weighting_of(loss.weighting, loss.snr_gamma)
    weighting = "" if name == "none" else f"{name} weights{arguments.get(name, '')}"
    weights = chosen_weights(config, prediction)
    if weights is not None:
        _require_weight(config, name, weights)
    noise = []
    if loss.noise_offset:
        noise.append(f"an offset of {'up to ' if loss.noise_offset_random else ''}{loss.noise_offset:g}")
    if loss.multires_iterations:
        noise.append(f"{loss.multires_iterations} resolutions (discount {loss.multires_discount:g})")
    if loss.input_perturbation:
        noise.append(f"input perturbation {loss.input_perturbation:g}")
    return ObjectivePlan(kind, weighting, tuple(noise), _timesteps(config.timesteps))


def _require_weight(config: TrainingConfig, name: str, weights: torch.Tensor) -> None:
    """UserError if the mean of the `weights` [T] over the timesteps that are drawn is below LEAST_WEIGHT.

    Most weightings are 0 at the last timestep of a base with zero terminal SNR, and `p2` falls with a power of its k.
    """
    section, weights = config.timesteps, weights.double()
    mean = float(weights @ chosen_timesteps(config, torch.device("cpu")).probabilities())
    if mean >= LEAST_WEIGHT:
        return
    in_range = weights[section.min : section.max + 1]
    if name == "p2" and in_range.any():
        remedy = "lower loss.p2_k or loss.p2_gamma"
    elif in_range.mean() < LEAST_WEIGHT:
        remedy = "lower timesteps.min"
    else:
        remedy = "lower timesteps.mean" if section.distribution == "logit_normal" else "raise timesteps.std"
    where = f"{section.min} to {section.max}"
    if section.distribution != "uniform":
        where += f" with timesteps.distribution {section.distribution}"
    raise UserError(
        f"loss.weighting {name} is {mean:.1g} on average over the timesteps that are drawn ({where}), so nothing would be learned: "
        f"{remedy}, or choose loss.weighting v_like or none."
    )


def _timesteps(section: TimestepSection) -> str:
    parts = [f"timesteps {section.min} to {section.max}"] if (section.min, section.max) != (0, LAST) else []
    if section.distribution != "uniform":
        mean = section.mean if section.distribution == "logit_normal" else 0.0
        parts.append(f"{section.distribution} timesteps (mean {mean:g}, std {section.std:g})")
    return ", ".join(parts)
