"""Config sections of the training itself: run length, step size, optimizer and schedule."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from sushi_research.config.section import (
    Bounded,
    Memory,
    Part,
    Scalar,
    Section,
    Seed,
    Steps,
    Warmup,
)

# Of one step on one process. Its samples are chosen at once; the largest published trainings of these models use some thousand.
MOST_SAMPLES = 65_536
# Of a micro-batch, and micro-batches of a step.
MOST_PARTS = 4096

# The optimizers by name; training/optimizer_classes.py has their classes.
OPTIMIZER_NAMES = (
    "adamw8bit",
    "adamw",
    "adafactor",
    "adamw_schedulefree",
    "came",
    "lion",
    "lion8bit",
    "muon",
    "prodigy",
    "stableadamw",
)

# PyTorch's kernels of scaled_dot_product_attention.
Kernel = Literal["cudnn", "flash", "efficient", "math"]


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
        pattern=rf"^({'|'.join(OPTIMIZER_NAMES)}|[A-Za-z_]\w*(\.[A-Za-z_]\w*)+)$",
        description="One of the names of docs/optimizers.md, or any class by its import path",
        json_schema_extra={"allowed": f"{', '.join(OPTIMIZER_NAMES)}, or an import path such as torch.optim.SGD"},
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

    name: Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "rex",
        "wsd",
        "inverse_sqrt",
        "range_test",
    ] = Field(
        "constant",
        description="Schedule: those of diffusers' get_scheduler; rex, wsd (warm-up, stable, decay), inverse_sqrt; and "
        "range_test, which rises to optimizer.lr (docs/learning_rate.md)",
    )
    warmup: Warmup = Field(
        0, description="Warm-up: rise from zero over so many steps or epochs, or over this fraction of the run"
    )
    cycles: int = Field(1, ge=1, le=100_000, description="Number of cosine cycles, for cosine_with_restarts")
    power: float = Field(1.0, gt=0, le=100, description="Exponent, for polynomial")
    decay: Part = Field(
        0.2, description="Decay at the end, for wsd: over so many steps or epochs, or over this fraction of the run"
    )
    timescale: Steps | None = Field(
        None,
        description="For inverse_sqrt: after so many more steps the rate is optimizer.lr / sqrt(2); null = as long as the warm-up",
    )
    span: float = Field(
        100_000, gt=1, le=1e12, description="For range_test: the rate of the last step over that of the first"
    )
