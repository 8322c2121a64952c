"""Config sections of a run's outputs: checkpoints, sample images, evaluations, metrics, and the run folder."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from sushi_research.config import user_commands
from sushi_research.config.prompts import Prompt, read_entries, schema_extra, texts_of
from sushi_research.config.section import (
    MOST_STEPS,
    Bounded,
    Every,
    Guidance,
    ImageSide,
    Location,
    SamplingSteps,
    Section,
    Seed,
    Steps,
    Text,
    require_few_images,
    require_text,
)

# A repository of the hub: owner/name, or a name for one of the user's own.
HUB_REPOSITORY = r"([A-Za-z0-9][A-Za-z0-9._-]{0,95}/)?[A-Za-z0-9_][A-Za-z0-9._-]{0,95}"
COMMAND_PLACES = ("{run}", "{step}", "{checkpoint}", "{adapter}")
COMMAND_EXAMPLE = "rsync {adapter} server:loras/"


def checked_command(command: str) -> str:
    """`command` itself. ValueError unless it is a command that has no other placeholders than COMMAND_PLACES."""
    return user_commands.checked(command, COMMAND_PLACES, COMMAND_EXAMPLE)


class CheckpointSection(Section):
    """Checkpoints, from which a run can resume."""

    every: Every = Field(
        500, description="How often to save one: steps, epochs or a fraction of the run; null = only at the end"
    )
    keep: Steps = Field(2, description="How many of the latest checkpoints to keep")
    keep_adapters: Annotated[int, Field(ge=0, le=MOST_STEPS)] | None = Field(
        None,
        description="How many of the latest adapter files of steps on the way to keep, NAME-STEP.safetensors, one for each "
        "checkpoint; null = all, 0 = write none",
    )
    command: Annotated[Text, AfterValidator(checked_command)] | None = Field(
        None,
        exclude=True,  # so that no run folder, tracker or printed config has it, and a stranger's run folder runs nothing
        description="Command to run after each checkpoint and its adapter file, without a shell; {run}, {step}, {checkpoint} and "
        "{adapter} are replaced by the run folder, the step and the paths. Its failure is a warning. It is not stored with the run",
    )


class SampleSection(Section):
    """Sample images, generated while training."""

    enabled: bool = Field(True, description="Generate sample images before, during and after training")
    every: Every = Field(
        250,
        description="How often to generate them: steps, epochs or a fraction of the run; null = only before and after training",
    )
    prompts: Annotated[list[str | Prompt], BeforeValidator(read_entries), Bounded] = Field(
        [],
        description="Prompts; an empty list = the first three distinct captions of the data",
        json_schema_extra=schema_extra(),
    )
    prompts_file: Location | None = Field(
        None, description="File of prompts: a YAML list of the same, or text with one prompt per line (docs/samples.md)"
    )
    negative_prompt: str = Field("", description="Negative prompt")
    seeds: Annotated[list[Seed], Field(min_length=1), Bounded] = Field([0], description="One image per prompt and seed")
    steps: SamplingSteps = Field(25, description="Denoising steps per image")
    guidance: Guidance = Field(5.0, description="Classifier-free guidance scale; 1 = none")
    width: ImageSide | None = Field(None, description="Width in pixels; null = data.resolution")
    height: ImageSide | None = Field(None, description="Height in pixels; null = data.resolution")

    @model_validator(mode="after")
    def _seeds_are_distinct(self) -> SampleSection:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("sample.seeds has a seed twice: it would generate the same images again")
        require_few_images(len(self.prompts), len(self.seeds), "sample.prompts and sample.seeds")
        if self.prompts and self.prompts_file is not None:
            raise ValueError("sample.prompts and sample.prompts_file are both set: keep one of them")
        return self

    @model_validator(mode="after")
    def _prompts_are_text(self) -> SampleSection:
        require_text({"sample.prompts": texts_of(self.prompts), "sample.negative_prompt": [self.negative_prompt]})
        return self


class EvaluationSection(Section):
    """Evaluation on held-out images: validation loss and drift from the base. Off unless held_out or path is set."""

    held_out: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Fraction of the training images to hold out, those of evaluation.prior_path aside; 0 = none. The choice "
        "depends on image content only, and near-duplicates stay together",
    )
    path: Location | None = Field(
        None, description="Separate held-out images, instead of evaluation.held_out: a folder or an HF dataset"
    )
    split: Text | None = Field(None, description="Split of evaluation.path if it is an HF dataset; null = data.split")
    every: Every = Field(
        250,
        description="How often to evaluate: steps, epochs or a fraction of the run; null = only before and after training",
    )
    noise_samples: int = Field(
        8,
        ge=4,
        le=4096,
        multiple_of=4,
        description="Noise samples (timestep and noise) per image, a multiple of 4; more of them reduce the standard error",
    )
    drift_captions: Annotated[list[Annotated[str, Field(min_length=1)]], Bounded] | None = Field(
        None,
        description="Captions that are unrelated to the training data, for measuring the drift from the base; null = 16 "
        "built-in everyday captions, empty list = no drift",
    )
    prior_path: Location | None = Field(
        None,
        description="Images of what the base knows already (prior, regularisation or class images), for measuring what is kept: "
        "a folder or an HF dataset. Of a folder below data.path, a quarter of the images, at most 8, are held out of training",
    )
    pictures: int = Field(
        0,
        ge=0,
        le=64,
        description="Pictures to draw and measure at each evaluation: of so many held-out captions, and of as many of "
        "evaluation.drift_captions, as sample sets steps, guidance and size; 0 = none",
    )
    keep_best: bool = Field(
        False, description="Keep the adapter file of the best evaluation so far, NAME-best-STEP.safetensors"
    )

    @model_validator(mode="after")
    def _one_source(self) -> EvaluationSection:
        if self.held_out > 0 and self.path is not None:
            raise ValueError("evaluation.held_out and evaluation.path are both set: keep one of them")
        return self

    @model_validator(mode="after")
    def _captions_are_text(self) -> EvaluationSection:
        require_text({"evaluation.drift_captions": self.drift_captions or []})
        return self


class TrackingSection(Section):
    """Trackers that receive the metrics in addition to the run folder's metrics.jsonl."""

    wandb: Literal["auto", "online", "offline", "off"] = Field(
        "auto", description="Weights & Biases; auto = online when logged in, else offline"
    )
    tensorboard: bool = Field(False, description="Also write TensorBoard files")
    project: Text = Field("sushi-research", description="Project name in W&B")
    entity: Text | None = Field(None, description="User or team in W&B; null = your default")
    tags: Annotated[list[Text], Bounded] = Field([], description="Tags of the run in W&B")


class RunSection(Section):
    """The run folder."""

    folder: Location = Field("runs", description="Folder that holds the run folders")
    name: str | None = Field(
        None,
        max_length=200,
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$",
        description="Name of the run's folder; null = derived from the config. Reusing a name continues that run",
        json_schema_extra={"allowed": "at most 200 letters, digits, '.', '_', '-' (the first no '.' or '-'), or null"},
    )
    push_to_hub: str | None = Field(
        None,
        exclude=True,  # so that a config of a run, given to another one, does not upload over the first one's files
        pattern=f"^{HUB_REPOSITORY}$",
        description="Repository of the Hugging Face hub (owner/name) to upload the adapter to at the end, with a model card made "
        "from the run. Its failure is a warning. It is not stored with the run",
        json_schema_extra={"allowed": "owner/name, a name, or null"},
    )
