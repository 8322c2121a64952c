"""Checks the settings in a base's scheduler config and model_index.json: which schedulers' models this suite trains, and how.

Training uses the noise schedule and the prediction type. Sampling always uses Euler's method, with the keys of the config that
diffusers' Euler scheduler knows, and of a rectified flow with the shift alone. The settings of other samplers (solver_order,
clip_sample, skip_prk_steps and so on) belong to steps that are not taken here, so they may have any value.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sushi_research.config.inputs import SHIFTS
from sushi_research.errors import UserError
from sushi_research.models import ARCHITECTURES, detect
from sushi_research.models.prediction import FLOW_CLASSES
from sushi_research.models.settings import (
    ANY,
    BOOLEAN,
    SWITCH,
    Rule,
    one_of,
    require_settings,
    shown,
    signature_defaults,
)
from sushi_research.models.shapes import published

# Schedulers of models that predict the noise or v on Stable Diffusion's discrete noise schedule; some sample rectified flows
# too, with `use_flow_sigmas`. Others belong to models that learned something else: EDM's continuous noise levels, consistency
# (LCM, TCD), a cascade (unCLIP).
FAMILY = (
    *("DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler", "PNDMScheduler"),
    *("LMSDiscreteScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"),
    *("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverMultistepScheduler"),
    *("DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler"),
    "SASolverScheduler",
)
# Their keys stay in a config when diffusers makes a scheduler of another class from it.
CARRIED = ("LCMScheduler", "TCDScheduler")
SCHEDULE_KEYS = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
RULES = {
    "_class_name": Rule(
        lambda found: found in (*FAMILY, *FLOW_CLASSES),
        "schedulers of models that predict the noise or v on discrete timesteps, or a rectified flow",
    ),
    "_use_default_values": one_of(None, []),
    "prediction_type": Rule(lambda found: isinstance(found, str), "a text"),  # its value is evidence, see prediction.py
    "predict_epsilon": one_of(True),  # in early configs, in place of prediction_type
    "trained_betas": one_of(None),
    "rescale_betas_zero_snr": SWITCH,
    # What the Euler scheduler takes from the config:
    "timestep_spacing": one_of("leading", "linspace", "trailing"),
    "timestep_type": one_of("discrete", because=" (a continuous one belongs to EDM's noise levels)"),
    "steps_offset": one_of(0, 1),
    "interpolation_type": one_of("linear", "log_linear"),
    "final_sigmas_type": one_of("zero", "sigma_min"),
    **dict.fromkeys(SIGMAS, SWITCH),
    **dict.fromkeys(("sigma_min", "sigma_max"), one_of(None)),
    "use_flow_sigmas": SWITCH,  # evidence, as `prediction_type`
    "tensor_format": ANY,  # in early configs: "pt"
    "noise_sampler_seed": ANY,  # DPMSolverSDEScheduler's, whose arguments diffusers shows only where torchsde is installed
}
SHIFT = Rule(
    lambda found: isinstance(found, int | float) and not isinstance(found, bool) and SHIFTS[0] <= found <= SHIFTS[1],
    f"a number from {SHIFTS[0]:g} to {SHIFTS[1]:g}",
)
# For a base that predicts a rectified flow. Training and sampling use the noise levels of its shift.
FLOW_RULES = {
    **{key: RULES[key] for key in ("_class_name", "_use_default_values", "prediction_type", "rescale_betas_zero_snr")},
    "use_flow_sigmas": SWITCH,
    "num_train_timesteps": one_of(1000),
    "shift": SHIFT,
    "flow_shift": SHIFT,
    "use_dynamic_shifting": one_of(False, because=" (a shift that depends on the size of the image)"),
    "shift_terminal": one_of(None, because=" (noise levels that are stretched after the shift)"),
    "invert_sigmas": one_of(False, because=" (noise levels that count backwards)"),
    **dict.fromkeys(SIGMAS, one_of(False, because=" (a flow has the noise levels of its shift)")),
}
PIPELINES = (
    *("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"),
    *("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"),
)
# Pipelines of the same components that sample in another way.
SAMPLING_ONLY = (
    *("StableDiffusionPAGPipeline", "StableDiffusionPAGImg2ImgPipeline", "StableDiffusionKDiffusionPipeline"),
    *("StableDiffusionXLPAGPipeline", "StableDiffusionXLPAGImg2ImgPipeline", "StableDiffusionXLKDiffusionPipeline"),
    "StableDiffusionPipelineSafe",
)


def require_scheduler(config: Mapping[str, Any], architecture: str, pipeline: Mapping[str, Any], path: Path) -> None:
    """UserError, naming the setting, unless the base learned on the noise schedule that training uses.

    `pipeline` is the content of model_index.json. A missing key has the default of the scheduler's class.
    """
    import diffusers

    advice, known = detect.CHOOSE, published(architecture)["scheduler"]
    named = class_of(pipeline, "scheduler")
    rules = RULES | {
        key: one_of(known[key], because=f" ({ARCHITECTURES[architecture].label}'s noise schedule)")
        for key in SCHEDULE_KEYS
    }
    kind = config.get("_class_name", named or "EulerDiscreteScheduler")
    is_flow = kind in FLOW_CLASSES or config.get("use_flow_sigmas") is True
    if is_flow:
        rules = dict(FLOW_RULES)
    known_classes = (*FAMILY, *CARRIED, *(FLOW_CLASSES if is_flow else ()))
    defaults = signature_defaults(getattr(diffusers, kind)) if kind in (*FAMILY, *FLOW_CLASSES) else {}
    for other in known_classes:
        rules |= {key: ANY for key in signature_defaults(getattr(diffusers, other)) if key not in rules}
    require_settings(config, rules, defaults, str(path), advice)
    if config.get("prediction_type") == "flow_prediction" and not is_flow:
        raise UserError(
            f"{path} has prediction_type flow_prediction without use_flow_sigmas, so that it samples a flow on another noise "
            f"schedule: {advice}, or correct the file."
        )
    if sum(config.get(key) is True for key in SIGMAS) > 1:
        raise UserError(f"{path} sets more than one of {', '.join(SIGMAS)}: correct the file.")


def require_pipeline(pipeline: Mapping[str, Any], path: Path) -> None:
    """UserError unless model_index.json names a pipeline of this suite's architectures and its settings have their types."""
    rules = {
        "_class_name": Rule(lambda found: found in (*PIPELINES, *SAMPLING_ONLY), " or ".join(PIPELINES)),
        "force_zeros_for_empty_prompt": BOOLEAN,
        "scheduler": RULES["_class_name"],
    }
    said = {key: value for key, value in pipeline.items() if key in rules and key != "scheduler"}
    named = class_of(pipeline, "scheduler")
    require_settings(said | ({"scheduler": named} if named is not None else {}), rules, {}, str(path), detect.CHOOSE)


def require_class(pipeline: Mapping[str, Any], name: str, classes: tuple[str, ...], path: Path) -> None:
    """UserError if model_index.json names another class for the component `name`, such as AutoencoderTiny for the VAE."""
    found = class_of(pipeline, name)
    if found is not None and found not in classes:
        raise UserError(
            f"{path} has {shown(found)} as the {name}, but this suite takes only {' or '.join(classes)}: {detect.CHOOSE}, or "
            "replace the component."
        )


def class_of(pipeline: Mapping[str, Any], name: str) -> Any:
    """The class that model_index.json names for a component, in the form [library, class]; None if it names none."""
    entry = pipeline.get(name)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else None
