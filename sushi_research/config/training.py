"""The training config: the sections that all training scripts share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field, model_validator

from sushi_research.config import effects
from sushi_research.config.captions import CaptionSection
from sushi_research.config.ema import EmaSection
from sushi_research.config.inputs import CacheSection, DataSection, ModelSection
from sushi_research.config.learning import OptimizerSection, ScheduleSection, TrainSection
from sushi_research.config.lora import LoraSection
from sushi_research.config.loss import LossSection
from sushi_research.config.masks import MaskSection
from sushi_research.config.outputs import (
    CheckpointSection,
    EvaluationSection,
    RunSection,
    SampleSection,
    TrackingSection,
)
from sushi_research.config.section import Section, steps_text
from sushi_research.config.sets import sets_of
from sushi_research.config.text_encoders import TextEncoderSection
from sushi_research.config.timesteps import TimestepSection


class TrainingConfig(Section):
    """The sections that all training scripts share."""

    model: ModelSection
    data: DataSection
    captions: CaptionSection = Field(default_factory=CaptionSection)
    masks: MaskSection = Field(default_factory=MaskSection)
    cache: CacheSection = Field(default_factory=CacheSection)
    lora: LoraSection = Field(default_factory=LoraSection)
    text_encoders: TextEncoderSection = Field(default_factory=TextEncoderSection)
    train: TrainSection
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    schedule: ScheduleSection = Field(default_factory=ScheduleSection)
    loss: LossSection = Field(default_factory=LossSection)
    timesteps: TimestepSection = Field(default_factory=TimestepSection)
    ema: EmaSection = Field(default_factory=EmaSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    sample: SampleSection = Field(default_factory=SampleSection)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    tracking: TrackingSection = Field(default_factory=TrackingSection)
    run: RunSection = Field(default_factory=RunSection)
    dry_run: bool = Field(
        False, description="Print the plan and exit before anything is encoded or trained; --dry-run needs no value"
    )

    rules: ClassVar[Sequence[effects.Rule]] = effects.TRAINING

    @model_validator(mode="after")
    def _every_key_has_an_effect(self) -> TrainingConfig:
        effects.require_effect(self.rules, self)
        return self

    @model_validator(mode="after")
    def _sets_fit(self) -> TrainingConfig:
        sets_of(self)
        return self

    @model_validator(mode="after")
    def _warmup_ends_within_the_run(self) -> TrainingConfig:
        warmup, steps = self.schedule.warmup, self.train.steps
        # A fraction of the run always ends within it. Of epochs, the data tell how long they are.
        if steps is not None and isinstance(warmup, int) and warmup >= steps:
            raise ValueError(
                f"schedule.warmup is {steps_text(warmup)}, but train.steps is {steps}: "
                "the warm-up must end within the run (a fraction such as 0.05 always does)"
            )
        return self
