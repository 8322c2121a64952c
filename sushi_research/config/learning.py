"""Config sections of the training itself: adapter, run length, step size, optimizer, schedule and loss."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from sushi_research.config.section import (
    Bounded,
    Location,
    Memory,
    Scalar,
    Section,
    Seed,
    Steps,
    Text,
    Warmup,
    require_text,
)

# Of one step on one process. Its samples are chosen at once; the largest published trainings of these models use some thousand.
MOST_SAMPLES = 65_536
# Of a micro-batch, and micro-batches of a step.
MOST_PARTS = 4096

# PyTorch's kernels of scaled_dot_product_attention.
Kernel = Literal["cudnn", "flash", "efficient", "math"]
TargetPreset = Literal["attention", "attention_ff", "kohya", "kohya_conv"]


class LoraSection(Section):
    """The adapter."""

    start_from: Location | None = Field(
        None,
        description="Adapter file of any trainer to go on training from, or a run folder (runs/mycat, runs/mycat@250 for a step, "
        "runs/mycat@best); null = a new adapter. Rank, alpha and targets are then those of the file",
    )
    targets: TargetPreset | Annotated[list[Text], Field(min_length=1), Bounded] | None = Field(
        "attention",
        description="UNet modules that get an adapter: attention = to_q, to_k, to_v, to_out.0; attention_ff adds the "
        "feed-forward layers; kohya also adds proj_in and proj_out; kohya_conv also adds the layers of the resnets, "
        "downsamplers and upsamplers (both as in kohya's sd-scripts); or a list of module name suffixes; null = those of "
        "lora.start_from, otherwise the default",
        json_schema_extra={
            "allowed": "attention, attention_ff, kohya, kohya_conv, "
            "a list of name suffixes such as [to_q, to_k], or null"
        },
    )
    rank: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        16,
        description="Rank of the two matrices in each adapter module; null = that of lora.start_from, otherwise the default",
    )
    alpha: Annotated[float, Field(ge=1e-6, le=1e6)] | None = Field(
        16.0,
        description="The adapter's output is scaled by alpha / rank. Changing rank does not change alpha; null = that of "
        "lora.start_from, otherwise the default",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout probability on the adapter's input while training")
    init: Literal["default", "gaussian"] = Field(
        "default",
        description="Initialization of the first matrix: default = Kaiming uniform, gaussian = standard deviation "
        "1 / rank. The second matrix starts at zero, so training starts exactly at the base model",
    )
    save_dtype: Literal["float16", "bfloat16", "float32"] = Field("float16", description="Dtype of the adapter file")
    metadata: Literal["full", "minimal", "none"] = Field(
        "full",
        description="What the adapter file says about itself: full = also the words of the captions, the names of the data's "
        "folders, a small sample picture and the settings; minimal = what programs need to load it right, hashes, and what the "
        "next three keys give; none = nothing",
    )
    trigger_words: Annotated[list[Text], Bounded] = Field(
        [], description="Words that call up what was learned, for programs that show them (in the file's metadata)"
    )
    author: Text | None = Field(None, description="Author, in the file's metadata")
    description: Annotated[str, Field(min_length=1, max_length=10_000)] | None = Field(
        None, description="Description, in the file's metadata"
    )

    @model_validator(mode="before")
    @classmethod
    def _null_has_a_value_without_a_file(cls, given: Any) -> Any:
        """With start_from, null and what is not given are those of the file (training/starting_point.py); else the default."""
        if not isinstance(given, dict):
            return given
        names = ("targets", "rank", "alpha")
        if given.get("start_from") is not None:
            return dict.fromkeys(names) | given
        return {name: value for name, value in given.items() if value is not None or name not in names}

    @model_validator(mode="after")
    def _metadata_is_text(self) -> LoraSection:
        texts = {"lora.trigger_words": self.trigger_words, "lora.author": [self.author or ""]}
        require_text(texts | {"lora.description": [self.description or ""]})
        return self

    @model_validator(mode="after")
    def _targets_are_distinct(self) -> LoraSection:
        if isinstance(self.targets, list) and len(set(self.targets)) < len(self.targets):
            raise ValueError("lora.targets names a module twice: keep one of each")
        return self


class TrainSection(Section):
    """Run length, step size, precision and kernels."""

    steps: Steps | None = Field(None, description="Optimizer steps of the run; set this or train.epochs")
    epochs: int | None = Field(None, ge=1, le=1_000_000, description="Passes over the data; set this or train.steps")
    batch_size: int = Field(1, ge=1, le=MOST_PARTS, description="Samples per device and forward pass (micro-batch)")
    accumulation: int = Field(
        1,
        ge=1,
        le=MOST_PARTS,
        description="Gradient accumulation: micro-batches per step. A step has batch_size x accumulation x processes samples",
    )
    seed: Seed = Field(
        0, description="Seed of the data order, the noise, the timesteps and the adapter's initialization"
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto",
        description="Dtype of the frozen weights and activations; auto = the best that the device supports (bf16 on a "
        "recent GPU, fp32 on a CPU), unless accelerate launch sets --mixed_precision bf16 or fp16",
    )
    gradient_checkpointing: Literal["none", "feed_forward", "all"] = Field(
        "none",
        description="Activations that the backward pass recomputes to save memory: feed_forward = those of the feed-forward "
        "layers; all = those of every block (far less memory, about a third more compute). true = all, "
        "false = none",
        json_schema_extra={"allowed": "none, feed_forward, all, true or false"},
    )
    attention: Literal["sdpa", "xformers"] | Annotated[list[Kernel], Field(min_length=1)] = Field(
        "sdpa",
        description="Attention kernels: sdpa = PyTorch's own, chosen by it; xformers (an extra to install; needs a GPU); or a list "
        "of PyTorch's, of which the first one that can compute an attention does: cudnn, flash, efficient, math",
        json_schema_extra={
            "allowed": "sdpa, xformers, or a list of cudnn, flash, efficient and math, such as [cudnn, math]"
        },
    )
    record_step: bool = Field(
        True,
        description="On a CUDA GPU, record forward and backward as a CUDA graph, which saves the time that Python takes to launch "
        "the kernels (docs/fast_step.md)",
    )
    max_grad_norm: float | None = Field(
        1.0, gt=0, le=1e9, description="Clip the global gradient norm to this; null = no clipping"
    )
    deterministic: bool = Field(False, description="Use deterministic kernels only: bit-for-bit repeatable, but slower")
    memory: Memory = Field(
        None,
        description="Memory of the device that the training may use (8GB, 7.5GiB): chooses batch_size, accumulation and "
        "gradient_checkpointing so that it fits, with as many samples per step as batch_size x accumulation give; null = as given",
    )

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _all_or_none(cls, given: Any) -> Any:
        """Other trainers have a switch here, as this suite had. On the command line it is a text."""
        return {"true": "all", "false": "none"}.get(str(given).lower(), given)

    @field_validator("attention")
    @classmethod
    def _kernels_are_distinct(cls, given: Any) -> Any:
        if isinstance(given, list) and len(set(given)) < len(given):
            raise ValueError("must name each kernel only once")
        return given

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if self.steps is None and self.epochs is None:
            raise ValueError("train.steps and train.epochs are both unset: set one of them")
        if self.steps is not None and self.epochs is not None:
            raise ValueError("train.steps and train.epochs are both set: keep one and set the other to null")
        return self

    @model_validator(mode="after")
    def _a_step_ends(self) -> TrainSection:
        samples = self.batch_size * self.accumulation
        if samples > MOST_SAMPLES:
            raise ValueError(
                f"train.batch_size x train.accumulation is {samples:,} samples per step, and at most {MOST_SAMPLES:,} "
                "are possible: lower one of them"
            )
        return self


class OptimizerSection(Section):
    """The optimizer."""

    name: str = Field(
        "adamw8bit",
        max_length=300,
        pattern=r"^(adamw8bit|adamw|[A-Za-z_]\w*(\.[A-Za-z_]\w*)+)$",
        description="adamw8bit (bitsandbytes), adamw (torch), or any class by its import path",
        json_schema_extra={"allowed": "adamw8bit, adamw or an import path such as torch.optim.SGD"},
    )
    # A weight in fp32 is not changed by less than 1e-12, unless it is below 1e-5 itself.
    lr: float = Field(1e-4, ge=1e-12, le=1000, description="Learning rate, before the schedule's factor")
    lora_plus_ratio: float = Field(
        1.0,
        ge=0.001,
        le=1000,
        description="Learning rate of the second matrix of each pair over that of the first (LoRA+; 16 in its paper)",
    )
    kwargs: dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], Scalar | Annotated[list[Scalar], Bounded]] = Field(
        {},
        description="Further optimizer arguments by name; null removes an entry that an earlier file set",
        json_schema_extra={"allowed": "an argument name with a number, text, true, false or a list of these"},
    )

    @model_validator(mode="after")
    def _kwargs_leave_the_rest_alone(self) -> OptimizerSection:
        for name, place in {"lr": "optimizer.lr", "params": "lora.targets"}.items():
            if name in self.kwargs:
                raise ValueError(f"optimizer.kwargs.{name} is not for here: set {place}")
        return self


class ScheduleSection(Section):
    """The learning rate over the run."""

    name: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"] = Field(
        "constant", description="Schedule, named as in diffusers' get_scheduler"
    )
    warmup: Warmup = Field(
        0, description="Warm-up: rise from zero over so many steps or epochs, or over this fraction of the run"
    )
    cycles: int = Field(1, ge=1, le=100_000, description="Number of cosine cycles, for cosine_with_restarts")
    power: float = Field(1.0, gt=0, le=100, description="Exponent, for polynomial")


class LossSection(Section):
    """The loss: mean squared error of the prediction, in fp32."""

    snr_gamma: float | None = Field(
        None,
        ge=0.001,
        le=10_000,
        description="Gamma of min-SNR weighting: the cap on the signal-to-noise ratio (5 in the paper); null = off",
    )
    noise_offset: float = Field(
        0.0,
        ge=0,
        le=10,
        description="Strength of the constant offset that is added to the noise of each image and channel; 0 = off",
    )
