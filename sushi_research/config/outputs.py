"""What a run leaves behind: checkpoints, pictures, evaluations, numbers, and the folder of it all."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sushi_research.config.section import Section, Seed, Text


class CheckpointSection(Section):
    """What a run needs to continue."""

    every: int | None = Field(500, ge=1, description="Steps between checkpoints; null = only at the end")
    keep: int = Field(2, ge=1, description="How many of the latest checkpoints to keep")


class SampleSection(Section):
    """Pictures drawn while training."""

    enabled: bool = Field(True, description="Draw sample pictures before, during and after training")
    every: int | None = Field(250, ge=1, description="Steps between sample grids; null = only before and after")
    prompts: list[str] = Field([], description="Prompts; an empty list = the first three distinct captions of the data")
    negative_prompt: str = Field("", description="What to steer away from")
    seeds: Annotated[list[Seed], Field(min_length=1)] = Field([0], description="One picture per prompt and seed")
    steps: int = Field(25, ge=1, description="Denoising steps per picture")
    guidance: float = Field(5.0, ge=1, description="Classifier-free guidance scale; 1 = none")
    width: int | None = Field(None, ge=8, multiple_of=8, description="Width in pixels; null = data.resolution")
    height: int | None = Field(None, ge=8, multiple_of=8, description="Height in pixels; null = data.resolution")

    @model_validator(mode="after")
    def _seeds_are_distinct(self) -> SampleSection:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("sample.seeds has a seed twice: it would draw the same pictures again")
        return self


class EvaluationSection(Section):
    """The loss on held-out images, which says what the training loss cannot; there is none unless held_out or path is set."""

    held_out: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the training images to hold out, by content; 0 = none. Copies stay together",
    )
    path: Text | None = Field(
        None, description="Held-out images of their own, in place of evaluation.held_out: a folder or an HF dataset"
    )
    split: Text | None = Field(
        None, description="Split of evaluation.path, where it is an HF dataset; null = data.split"
    )
    every: int | None = Field(250, ge=1, description="Steps between evaluations; null = only before and after")
    noise_samples: int = Field(
        8,
        ge=4,
        multiple_of=4,
        description="Timesteps with noise for each image, a multiple of 4; more narrow the error",
    )
    drift_captions: list[Text] | None = Field(
        None,
        description="Captions of other things, on which the drift from the base is measured; null = sixteen everyday ones, "
        "an empty list = no drift",
    )

    @model_validator(mode="after")
    def _one_source(self) -> EvaluationSection:
        if self.held_out > 0 and self.path is not None:
            raise ValueError("evaluation.held_out and evaluation.path are both set: keep one of them")
        if self.split is not None and self.path is None:
            raise ValueError(
                "evaluation.split is set but evaluation.path is not: set evaluation.path, or remove the split"
            )
        return self


class TrackingSection(Section):
    """Where the numbers go besides the run folder's metrics.jsonl."""

    wandb: Literal["auto", "online", "offline", "off"] = Field(
        "auto", description="Weights & Biases; auto = online when logged in, else offline"
    )
    tensorboard: bool = Field(False, description="Also write TensorBoard files")
    project: Text = Field("sushi-research", description="Project name in W&B")
    entity: Text | None = Field(None, description="User or team in W&B; null = your default")
    tags: list[Text] = Field([], description="Tags of the run in W&B")


class RunSection(Section):
    """The run folder."""

    folder: Text = Field("runs", description="Folder that holds the run folders")
    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$",
        description="Name of the run's folder; null = derived from the config. The same name again continues that run",
        json_schema_extra={"allowed": "letters, digits, '.', '_', '-' (the first no '.' or '-'), or null"},
    )
