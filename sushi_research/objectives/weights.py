"""Weights of the loss at each timestep, as tables that are computed once for a run.

Each weighting is a weight of the squared error of x0, the clean latents, as a function of the signal-to-noise ratio alone. The
weight of the squared error of what the UNet predicts follows from it (`targets.x0_factor`), so that a weighting means the same for
bases that predict epsilon, v or rectified flow. Without a weighting, the x0 loss has the weight SNR for epsilon (Salimans & Ho
2022, arXiv 2202.00512, equation 9), SNR + 1 for v (the same, section 4, without a number), and (1 + sqrt(SNR))^2 for rectified
flow.
"""

from __future__ import annotations

import torch

from sushi_research.objectives.schedule import Schedule
from sushi_research.objectives.targets import x0_factor


def loss_weights(
    name: str, schedule: Schedule, prediction_type: str, *, gamma: float = 5.0, p2_k: float = 1.0, p2_gamma: float = 1.0
) -> torch.Tensor:
    """The weight of the loss at each timestep, [T] float32 on the schedule's device; finite, and 0 or more.

    The SNR is that of the schedule, so for zero terminal SNR it is the rescaled one. Weights of the x0 loss (where a section is
    named and no equation, the paper gives the formula no number):

    - "min_snr": min(SNR, gamma) (Hang et al. 2023, arXiv 2303.09556, section 3.4; section 4.2 divides it for epsilon and v)
    - "soft_min_snr": SNR gamma / (SNR + gamma) (Crowson et al. 2024, arXiv 2401.11605)
    - "debiased": sqrt(SNR) (Yu et al. 2023, arXiv 2310.08442), which is 1 / sqrt(SNR) for epsilon
    - "p2": SNR / (k + SNR)^p2_gamma (Choi et al. 2022, arXiv 2204.00227), 1 / (k + SNR)^p2_gamma for epsilon
    - "v_like": SNR + 1, the weight that v has without one (Salimans & Ho 2022, arXiv 2202.00512, section 4, "SNR+1")
    """
    if name == "min_snr" and prediction_type in ("epsilon", "v_prediction"):
        # In fp32 and without x0_factor, as in all runs before the other weightings came.
        snr = schedule.snr
        return snr.clamp(max=gamma) / (snr if prediction_type == "epsilon" else snr + 1.0)
    snr = schedule.snr.double()
    if name == "min_snr":
        of_x0 = snr.clamp(max=gamma)
    elif name == "soft_min_snr":
        of_x0 = snr * gamma / (snr + gamma)
    elif name == "debiased":
        of_x0 = snr.sqrt()
    elif name == "p2":
        of_x0 = snr / (p2_k + snr) ** p2_gamma
    else:
        assert name == "v_like", f"no weighting called {name}"
        of_x0 = snr + 1.0
    weights = (of_x0 * x0_factor(schedule, prediction_type)).float()
    # epsilon with zero terminal SNR, where 0 x infinity would be, is refused when a base is read.
    assert weights.isfinite().all()
    return weights
