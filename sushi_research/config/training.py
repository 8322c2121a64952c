"""The config of a training: the sections that every training script shares."""

from __future__ import annotations

from pydantic import Field, model_validator

from sushi_research.config.inputs import Cache, Data, Model
from sushi_research.config.learning import Lora, Loss, Optimizer, Schedule, Train
from sushi_research.config.outputs import Checkpoint, Evaluation, Run, Sample, Tracking
from sushi_research.config.section import Section


class TrainingConfig(Section):
    """The sections that every training script shares."""

    model: Model
    data: Data
    cache: Cache = Field(default_factory=Cache)
    lora: Lora = Field(default_factory=Lora)
    train: Train
    optimizer: Optimizer = Field(default_factory=Optimizer)
    schedule: Schedule = Field(default_factory=Schedule)
    loss: Loss = Field(default_factory=Loss)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    sample: Sample = Field(default_factory=Sample)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    tracking: Tracking = Field(default_factory=Tracking)
    run: Run = Field(default_factory=Run)
    dry_run: bool = Field(
        False, description="Print the plan and stop before anything is encoded or trained; --dry-run alone is enough"
    )

    @model_validator(mode="after")
    def _warmup_ends_within_the_run(self) -> TrainingConfig:
        warmup, steps = self.schedule.warmup, self.train.steps
        # A fraction is below 1 and so below any number of steps.
        if steps is not None and warmup >= steps:
            raise ValueError(
                f"schedule.warmup is {warmup} steps, but train.steps is {steps}: "
                "the warm-up must end within the run (a fraction such as 0.05 always does)"
            )
        return self
