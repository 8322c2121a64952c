"""The configs of `scripts/sample.py` and `scripts/evaluate.py`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, create_model, model_validator

from sushi_research.config import effects
from sushi_research.config.inputs import (
    FLOW_SHIFT,
    HUB,
    NULL_REVISION,
    PREDICTION,
    TOKENIZERS,
    ZERO_TERMINAL_SNR,
    FlowShift,
)
from sushi_research.config.prompts import Prompt, as_prompts, read_entries, schema_extra, texts_of
from sushi_research.config.section import (
    Bounded,
    Guidance,
    ImageSide,
    Location,
    SamplingSteps,
    Section,
    Seed,
    Text,
    require_few_images,
    require_text,
)
from sushi_research.config.training import TrainingConfig

ADAPTERS = "Adapter files (.safetensors) from any trainer, or run folders (runs/mycat, runs/mycat@250 for a step, "
ADAPTERS += "runs/mycat@best, runs/mycat@ema)"
# The keys of SamplingConfig that a run's config.yaml has too, under model.
BASE_KEYS = ("base", "revision", "variant", "vae", "vae_revision", "text_encoders", "tokenizers")
BASE_KEYS += ("prediction_type", "zero_terminal_snr", "flow_shift", "clip_skip")


class SamplingConfig(Section):
    """A grid of sample images. Rows: prompts and seeds. Columns: the base, and each adapter at each LoRA scale."""

    base: Location | None = Field(
        None,
        description=f"Base model of any supported architecture: {HUB}; null = the base of the run folders in adapters, with the "
        "settings below as the runs have them",
    )
    revision: Text | None = Field(None, description=f"Branch, tag or commit of a hub id; {NULL_REVISION}")
    variant: Literal["fp16"] | None = Field(None, description="Load the repository's fp16 files")
    vae: Location | None = Field(None, description=f"VAE to use instead of the base model's own: {HUB}")
    vae_revision: Text | None = Field(None, description="Branch, tag or commit of vae, like revision")
    text_encoders: Location | None = Field(
        None, description=f"Text encoders to use instead of the base model's own: {HUB}"
    )
    tokenizers: Location | None = Field(None, description=TOKENIZERS)
    prediction_type: Literal["epsilon", "v_prediction", "rectified_flow"] | None = Field(None, description=PREDICTION)
    zero_terminal_snr: bool | None = Field(None, description=ZERO_TERMINAL_SNR)
    flow_shift: FlowShift | None = Field(None, description=FLOW_SHIFT)
    clip_skip: Annotated[int, Field(ge=1, le=11)] | None = Field(
        None,
        description="SD1.5 only: CLIP layer to condition on, counted from the last; 2 for anime models; null = 1, the last",
    )
    adapters: Annotated[list[Location], Bounded] = Field([], description=f"{ADAPTERS}; each is applied alone")
    lora_scales: Annotated[list[Annotated[float, Field(ge=-1000, le=1000)]], Field(min_length=1), Bounded] = Field(
        [0.5, 1.0], description="LoRA scales of each adapter; the base alone is always the first column"
    )
    prompts: Annotated[list[str | Prompt], BeforeValidator(read_entries), Bounded] = Field(
        [], description="Prompts", json_schema_extra=schema_extra()
    )
    prompts_file: Location | None = Field(
        None, description="File of prompts: a YAML list of the same, or text with one prompt per line (docs/samples.md)"
    )
    negative_prompt: str = Field("", description="Negative prompt")
    seeds: Annotated[list[Seed], Field(min_length=1), Bounded] = Field([0], description="One row per prompt and seed")
    steps: SamplingSteps = Field(25, description="Denoising steps (Euler)")
    guidance: Guidance | None = Field(None, description="Guidance scale; null = 7 for SD1.5, 5 for SDXL; 1 = none")
    width: ImageSide | None = Field(None, description="Width in pixels; null = the base's native size")
    height: ImageSide | None = Field(None, description="Height in pixels; null = the base's native size")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="Dtype of the base; see train.precision"
    )
    output: Location = Field(
        "samples/grid.png", description="File for the grid; the single images go into a folder next to it"
    )

    rules: ClassVar[Sequence[effects.Rule]] = effects.SAMPLING

    @model_validator(mode="after")
    def _every_key_has_an_effect(self) -> SamplingConfig:
        effects.require_effect(self.rules, self)
        return self

    @model_validator(mode="after")
    def _base_is_known(self) -> SamplingConfig:
        given = [key for key in BASE_KEYS[1:] if getattr(self, key) is not None]
        if self.base is None and not self.adapters:
            raise ValueError("base is missing: give --base VALUE, or a run folder in adapters")
        if self.base is None and given:
            raise ValueError(f"{given[0]} is set but base is not: set base too, or remove {given[0]}")
        if self.vae_revision is not None and self.vae is None:
            raise ValueError("vae_revision is set but vae is not: set vae, or remove the revision")
        return self

    @model_validator(mode="after")
    def _columns_are_distinct(self) -> SamplingConfig:
        if 0 in self.lora_scales:
            raise ValueError("lora_scales has a 0: the base alone is always sampled, so remove it")
        for name in ("lora_scales", "adapters", "seeds"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} has an entry twice: it would generate the same images again")
        columns = 1 + len(self.adapters) * len(self.lora_scales)
        require_few_images(len(self.prompts) * len(self.seeds), columns, "prompts, seeds, adapters and lora_scales")
        return self

    @model_validator(mode="after")
    def _prompts_are_text(self) -> SamplingConfig:
        require_text({"prompts": texts_of(self.prompts), "negative_prompt": [self.negative_prompt]})
        if any(not prompt.prompt for prompt in as_prompts(self.prompts)):
            raise ValueError("prompts has an empty prompt: write its text")
        if bool(self.prompts) == (self.prompts_file is not None):
            both = "prompts and prompts_file are both set: keep one of them"
            raise ValueError(both if self.prompts else "no prompts: give --prompts TEXT or --prompts_file FILE")
        return self


class AdapterEvaluation(Section):
    """The adapter files to evaluate, and the folder of the results."""

    adapters: Annotated[list[Location], Bounded] = Field(
        [], description=f"{ADAPTERS}; the base is always evaluated too"
    )
    lora_scales: Annotated[list[Annotated[float, Field(gt=0, le=1000)]], Field(min_length=1), Bounded] = Field(
        [1.0],
        description="LoRA scales of each adapter; with several, the results include a curve and a sample grid over the scale",
    )
    output: Location = Field(
        "evaluations", description="Folder of the results, with a subfolder for the base and for each adapter"
    )

    rules: ClassVar[Sequence[effects.Rule]] = effects.EVALUATION

    @model_validator(mode="after")
    def _distinct(self) -> AdapterEvaluation:
        for name in ("adapters", "lora_scales"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} has an entry twice: keep one of each")
        return self


@functools.cache
def evaluation_config(training: type[TrainingConfig]) -> type[AdapterEvaluation]:
    """The config class of an evaluation: the keys of a training config (such as `SDXLTraining`) and of `AdapterEvaluation`."""
    return create_model(
        f"{training.__name__}Evaluation", __base__=(AdapterEvaluation, training), __doc__=AdapterEvaluation.__doc__
    )
