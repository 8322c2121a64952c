"""What can be configured: the sections that both training scripts share, and what each architecture adds.

Every model is frozen, refuses keys that it does not know, and takes a value only in its own type (an int where a
float is wanted is the one exception). Layers and overrides are the business of `command_line.py`; the texts here
are what its `--help` prints. A validator speaks of keys by their dotted names, after which the source is put in.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Text = Annotated[str, Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Scalar = bool | int | float | str
TargetPreset = Literal["attention", "attention_ff", "kohya", "kohya_conv"]

HUB = "folder in the diffusers format, .safetensors file, or hub id (owner/name, owner/name/file.safetensors)"
NULL_REVISION = "null = main; a commit hash makes the run repeatable for good"
TOKENIZERS = (
    "Folder or hub id with CLIP's vocabulary (vocab.json, merges.txt; a model in diffusers format has it); null = the base's "
    "own, and for a single file the hub's cache, or the hub"
)
PREDICTION = (
    "What the base predicts; null = what it says of itself (its scheduler config, the key v_pred of a single file), else "
    "epsilon. Saying otherwise than the base is an error"
)
ZERO_TERMINAL_SNR = (
    "Whether the base's noise ends in pure noise; null = what it says of itself (its scheduler config, the key ztsnr)"
)


class Section(BaseModel):
    """What holds for every section: frozen, strict, no unknown keys, no infinities."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Model(Section):
    """The frozen base model."""

    base: Text = Field(description=f"Base model: {HUB}")
    revision: Text | None = Field(None, description=f"Branch, tag or commit of a hub id; {NULL_REVISION}")
    variant: Literal["fp16"] | None = Field(None, description="Load the repository's fp16 files: half the download")
    vae: Text | None = Field(None, description=f"Another VAE in place of the base model's own: {HUB}")
    vae_revision: Text | None = Field(None, description="As model.revision, for model.vae")
    text_encoders: Text | None = Field(
        None, description=f"Text encoders in place of the base model's own, or for a file that has none: {HUB}"
    )
    tokenizers: Text | None = Field(None, description=TOKENIZERS)
    prediction_type: Literal["epsilon", "v_prediction"] | None = Field(None, description=PREDICTION)
    zero_terminal_snr: bool | None = Field(None, description=ZERO_TERMINAL_SNR)

    @model_validator(mode="after")
    def _vae_revision_has_a_vae(self) -> Model:
        if self.vae_revision is not None and self.vae is None:
            raise ValueError("model.vae_revision is set but model.vae is not: set model.vae, or remove the revision")
        return self


class SD15Model(Model):
    """The frozen base model: Stable Diffusion 1.5."""

    clip_skip: int = Field(
        1, ge=1, le=11, description="Which CLIP layer conditions: 1 = the last, 2 = the last but one (anime models)"
    )


class SDXLModel(Model):
    """The frozen base model: Stable Diffusion XL."""

    text_encoder_1_layer: Literal["penultimate", "last"] = Field(
        "penultimate",
        description="Layer of text encoder 1: penultimate is what SDXL was trained with and what every other program "
        "uses; last (after the final layer norm) repeats this project's founding recipe",
    )


class Data(Section):
    """The training images and their captions."""

    path: Text = Field(
        description="Training images: a folder with captions beside them, an HF dataset folder, or a hub dataset id"
    )
    revision: Text | None = Field(None, description=f"Branch, tag or commit of a hub dataset; {NULL_REVISION}")
    split: Text = Field("train", description="Split of an HF dataset")
    image_column: Text = Field("image", description="Column of an HF dataset with the images")
    caption_column: Text = Field("text", description="Column of an HF dataset or a metadata.jsonl with the captions")
    resolution: int = Field(description="Buckets keep about this area: resolution x resolution pixels", ge=8)
    bucket_step: int = Field(64, ge=8, multiple_of=8, description="Sides of buckets are multiples of this many pixels")
    bucket_min_side: int | None = Field(None, ge=8, description="Shortest side of a bucket; null = resolution / 2")
    bucket_max_side: int | None = Field(None, ge=8, description="Longest side of a bucket; null = resolution * 2")
    upscale: bool = Field(False, description="Enlarge images that are smaller than their bucket")
    flip: float = Field(0.0, ge=0, le=1, description="Probability of mirroring an image, drawn anew each epoch")
    on_bad_file: Literal["stop", "skip"] = Field(
        "stop", description="After naming the files that cannot be used: stop before training, or train without them"
    )

    @model_validator(mode="after")
    def _sides_fit(self) -> Data:
        below = self.resolution // self.bucket_step * self.bucket_step
        if below != self.resolution:
            near = f"{below} or {below + self.bucket_step}" if below else f"{self.bucket_step}"
            raise ValueError(
                f"data.resolution is {self.resolution}, not a multiple of data.bucket_step, "
                f"which is {self.bucket_step}: choose {near}"
            )
        if self.bucket_min_side is not None and self.bucket_min_side > self.resolution:
            raise ValueError(
                f"data.bucket_min_side is {self.bucket_min_side}, above data.resolution, which is {self.resolution}"
            )
        if self.bucket_max_side is not None and self.bucket_max_side < self.resolution:
            raise ValueError(
                f"data.bucket_max_side is {self.bucket_max_side}, below data.resolution, which is {self.resolution}"
            )
        return self


class SD15Data(Data):
    """The training images and their captions."""

    resolution: int = Field(512, ge=8, description="Buckets keep about this area: resolution x resolution pixels")


class SDXLData(Data):
    """The training images and their captions."""

    resolution: int = Field(1024, ge=8, description="Buckets keep about this area: resolution x resolution pixels")
    time_ids: Literal["image", "bucket"] = Field(
        "image",
        description="Sizes that SDXL is told: image = each image's true size and crop, as SDXL was trained; bucket = "
        "the bucket's size and no crop, which repeats this project's founding recipe",
    )


class Cache(Section):
    """Where encoded images and captions are kept."""

    folder: Text = Field("cache", description="Folder of the caches; runs share it")


class Lora(Section):
    """The adapter."""

    targets: TargetPreset | Annotated[list[Text], Field(min_length=1)] = Field(
        "attention",
        description="UNet modules that get an adapter: attention = to_q, to_k, to_v, to_out.0; attention_ff adds the "
        "feed-forward layers; kohya adds proj_in and proj_out, and kohya_conv the layers of the resnets, downsamplers "
        "and upsamplers, as that trainer does; or a list of name endings",
        json_schema_extra={"allowed": "attention, attention_ff, kohya, kohya_conv, or a list of name endings"},
    )
    rank: int = Field(16, ge=1, description="Rank of the two matrices of each adapter module")
    alpha: float = Field(
        16.0, gt=0, description="The adapter's output is scaled by alpha / rank; it does not follow a change of rank"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Probability of dropping an input of the adapter in training")
    init: Literal["default", "gaussian"] = Field(
        "default",
        description="How the first matrix starts: default = Kaiming uniform, gaussian = deviation 1 / rank; "
        "the second starts at zero, so that training starts from the base model exactly",
    )
    save_dtype: Literal["float16", "bfloat16", "float32"] = Field("float16", description="Dtype of the adapter file")

    @model_validator(mode="after")
    def _targets_are_distinct(self) -> Lora:
        if isinstance(self.targets, list) and len(set(self.targets)) < len(self.targets):
            raise ValueError("lora.targets names a module twice: keep one of each")
        return self


class Train(Section):
    """The length of the run, the size of a step, and its arithmetic."""

    steps: int | None = Field(None, ge=1, description="Optimizer steps of the run; set this or train.epochs")
    epochs: int | None = Field(None, ge=1, description="Passes over the data; set this or train.steps")
    batch_size: int = Field(1, ge=1, description="Samples per device and forward pass")
    accumulation: int = Field(
        1, ge=1, description="Forward passes per step: a step is batch_size x accumulation x processes samples"
    )
    seed: Seed = Field(0, description="Fixes the data's order, the noise, the timesteps and the adapter's start")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto",
        description="Dtype of the frozen weights and activations; auto = the best that the device has (bf16 on a "
        "recent GPU, fp32 on a CPU); a launcher's --mixed_precision bf16 or fp16 wins",
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: far less memory for about a third more work"
    )
    attention: Literal["sdpa", "xformers"] = Field(
        "sdpa", description="Attention kernels: PyTorch's own, or xformers (an extra to install; needs a GPU)"
    )
    max_grad_norm: float | None = Field(1.0, gt=0, description="Clip the gradients' overall norm to this; null = never")
    deterministic: bool = Field(False, description="Use only deterministic kernels: repeatable bit for bit, slower")

    @model_validator(mode="after")
    def _one_length(self) -> Train:
        if self.steps is None and self.epochs is None:
            raise ValueError("train.steps and train.epochs are both unset: set one of them")
        if self.steps is not None and self.epochs is not None:
            raise ValueError("train.steps and train.epochs are both set: keep one and set the other to null")
        return self


class Optimizer(Section):
    """The optimizer."""

    name: str = Field(
        "adamw8bit",
        pattern=r"^(adamw8bit|adamw|[A-Za-z_]\w*(\.[A-Za-z_]\w*)+)$",
        description="adamw8bit (bitsandbytes), adamw (torch), or any class by its import path",
        json_schema_extra={"allowed": "adamw8bit, adamw or an import path such as torch.optim.SGD"},
    )
    lr: float = Field(1e-4, gt=0, description="Learning rate, before the schedule's factor")
    kwargs: dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], Scalar | list[Scalar]] = Field(
        {},
        description="Further arguments of the optimizer by name; in a layer, null takes an earlier layer's entry away",
        json_schema_extra={"allowed": "an argument name with a number, text, true, false or a list of these"},
    )

    @model_validator(mode="after")
    def _kwargs_leave_the_rest_alone(self) -> Optimizer:
        for name, place in {"lr": "optimizer.lr", "params": "lora.targets"}.items():
            if name in self.kwargs:
                raise ValueError(f"optimizer.kwargs.{name} is not for here: set {place}")
        return self


class Schedule(Section):
    """The learning rate over the run."""

    name: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"] = Field(
        "constant", description="Shape, by the names of diffusers' get_scheduler"
    )
    warmup: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1)] = Field(
        0,
        description="Rise from zero over this many steps, or over this fraction of the run",
        json_schema_extra={"allowed": "a whole number of steps (at least 0) or a fraction (at least 0, below 1)"},
    )
    cycles: int = Field(1, ge=1, description="Number of cosines, for cosine_with_restarts")
    power: float = Field(1.0, gt=0, description="Exponent, for polynomial")

    @model_validator(mode="after")
    def _every_key_has_an_effect(self) -> Schedule:
        if self.name == "constant" and self.warmup != 0:
            raise ValueError(
                f"schedule.warmup is {self.warmup}, but schedule.name is constant, which has no warm-up: "
                "use constant_with_warmup, or set the warm-up to 0"
            )
        if self.name != "cosine_with_restarts" and self.cycles != 1:
            raise ValueError(
                f"schedule.cycles is {self.cycles}, but schedule.name is {self.name}: "
                "only cosine_with_restarts has cycles"
            )
        if self.name != "polynomial" and self.power != 1:
            raise ValueError(
                f"schedule.power is {self.power}, but schedule.name is {self.name}: only polynomial has a power"
            )
        return self


class Loss(Section):
    """The loss: mean squared error of the predicted noise, in fp32."""

    snr_gamma: float | None = Field(
        None, gt=0, description="Min-SNR weighting: cap of the signal-to-noise ratio (5 in the paper); null = off"
    )
    noise_offset: float = Field(
        0.0, ge=0, description="Strength of a constant offset per image and channel in the noise; 0 = off"
    )


class Checkpoint(Section):
    """What a run needs to continue."""

    every: int | None = Field(500, ge=1, description="Steps between checkpoints; null = only at the end")
    keep: int = Field(2, ge=1, description="How many of the latest checkpoints to keep")


class Sample(Section):
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
    def _seeds_are_distinct(self) -> Sample:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("sample.seeds has a seed twice: it would draw the same pictures again")
        return self


class SD15Sample(Sample):
    """Pictures drawn while training."""

    guidance: float = Field(7.0, ge=1, description="Classifier-free guidance scale; 1 = none")


class Evaluation(Section):
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
    draws: int = Field(
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
    def _one_source(self) -> Evaluation:
        if self.held_out > 0 and self.path is not None:
            raise ValueError("evaluation.held_out and evaluation.path are both set: keep one of them")
        if self.split is not None and self.path is None:
            raise ValueError(
                "evaluation.split is set but evaluation.path is not: set evaluation.path, or remove the split"
            )
        return self


class Tracking(Section):
    """Where the numbers go besides the run folder's metrics.jsonl."""

    wandb: Literal["auto", "online", "offline", "off"] = Field(
        "auto", description="Weights & Biases; auto = online when logged in, else offline"
    )
    tensorboard: bool = Field(False, description="Also write TensorBoard files")
    project: Text = Field("sushi-research", description="Project name in W&B")
    entity: Text | None = Field(None, description="User or team in W&B; null = your default")
    tags: list[Text] = Field([], description="Tags of the run in W&B")


class Run(Section):
    """The run folder."""

    folder: Text = Field("runs", description="Folder that holds the run folders")
    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$",
        description="Name of the run's folder; null = derived from the config. The same name again continues that run",
        json_schema_extra={"allowed": "letters, digits, '.', '_', '-' (the first no '.' or '-'), or null"},
    )


class TrainingConfig(Section):
    """The sections that both training scripts share."""

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


class SD15Training(TrainingConfig):
    """A LoRA for Stable Diffusion 1.5."""

    model: SD15Model
    data: SD15Data
    sample: SD15Sample = Field(default_factory=SD15Sample)


class SDXLTraining(TrainingConfig):
    """A LoRA for Stable Diffusion XL."""

    model: SDXLModel
    data: SDXLData
