"""The plan of a run: what it will do, in numbers, as text for the terminal and for plan.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sushi_research.config.section import plural, steps_text
from sushi_research.data import findings
from sushi_research.data.scan import Problem
from sushi_research.errors import printable
from sushi_research.fast.decision import StepPath
from sushi_research.models.prediction import Prediction
from sushi_research.precision import DtypePolicy
from sushi_research.runs.measured import Measured
from sushi_research.training.adapter_plan import AdapterPlan
from sushi_research.training.averages_plan import AveragesPlan
from sushi_research.training.caption_plan import CaptionPlan
from sushi_research.training.cost_plan import CostPlan
from sushi_research.training.disk_plan import DiskPlan, Room
from sushi_research.training.evaluation_plan import EvaluationPlan
from sushi_research.training.length import Due
from sushi_research.training.new_tokens import TokenPlan
from sushi_research.training.objective_plan import ObjectivePlan
from sushi_research.training.optimizer_plan import OptimizerPlan
from sushi_research.training.parameter_groups import Rates
from sushi_research.training.plan_parts import (
    BaseWeights,
    CachePlan,
    CheckpointPlan,
    DevicePlan,
    Repeats,
    SamplePlan,
    describe_repeats,
    describe_speed,
)
from sushi_research.training.sets_plan import SetPlan, describe_sets
from sushi_research.training.text_encoder_plan import TextEncoderPlan


@dataclass(frozen=True)
class Plan:
    """What a run will do. `unused` maps keys of a single-file base that no component needs to the reason."""

    architecture: str
    device: DevicePlan
    base: str
    base_weights: BaseWeights
    prediction: Prediction
    unused: Mapping[str, str]
    images: int
    items_per_epoch: int
    sets: tuple[SetPlan, ...]
    repeats: tuple[Repeats, ...]
    buckets: Mapping[str, int]
    problems: Sequence[Problem]
    notes: tuple[str, ...]
    captions: CaptionPlan
    sampling: SamplePlan | None
    checkpoints: CheckpointPlan
    evaluation: EvaluationPlan | None
    step_path: StepPath
    batch_size: int
    accumulation: int
    processes: int
    micro_batch_fill: float
    steps: int
    warmup: int
    decay: int
    due: Due
    adapter: AdapterPlan
    rates: Rates
    optimizer: OptimizerPlan
    objective: ObjectivePlan
    text_encoders: TextEncoderPlan | None
    new_tokens: TokenPlan | None
    averages: AveragesPlan | None
    dtypes: DtypePolicy
    image_cache: CachePlan
    caption_cache: CachePlan
    mask_cache: CachePlan
    disk: DiskPlan
    rooms: tuple[Room, ...]
    cost: CostPlan
    speed: Measured | None
    run_folder: str

    @property
    def global_batch_size(self) -> int:
        """The samples of one optimizer step."""
        return self.batch_size * self.accumulation * self.processes

    @property
    def split(self) -> dict[str, int]:
        """The factors of the global batch size."""
        return {"batch_size": self.batch_size, "accumulation": self.accumulation, "processes": self.processes}

    @property
    def samples(self) -> int:
        return self.steps * self.global_batch_size

    @property
    def epochs(self) -> float:
        return round(self.samples / self.items_per_epoch, 2)

    @property
    def samples_per_image(self) -> float:
        return round(self.samples / self.images, 1)

    def to_json(self) -> dict[str, Any]:
        """The content of plan.json."""
        return {
            "architecture": self.architecture,
            "device": asdict(self.device),
            "base": {
                "source": self.base,
                "prediction_type": self.prediction.type,
                "zero_terminal_snr": self.prediction.zero_terminal_snr,
                "flow_shift": self.prediction.shift if self.prediction.type == "rectified_flow" else None,
                "not_used": dict(self.unused),
                "weights": asdict(self.base_weights),
            },
            "images": self.images,
            "items_per_epoch": self.items_per_epoch,
            "sets": [asdict(each) for each in self.sets],
            "repeats": [asdict(each) for each in self.repeats],
            "buckets": dict(self.buckets),
            "skipped": [
                {"name": problem.name, "reason": problem.reason} for problem in self.problems[: findings.LISTED]
            ],
            "captions_cut": dict(self.captions.listed),
            "captions": self.captions.to_json(),
            "sampling": asdict(self.sampling) if self.sampling else None,
            "checkpoints": asdict(self.checkpoints),
            "evaluation": asdict(self.evaluation) if self.evaluation else None,
            "global_batch_size": self.global_batch_size,
            "split": self.split,
            "step_path": self.step_path.name,
            "micro_batch_fill": self.micro_batch_fill,
            "steps": self.steps,
            "warmup_steps": self.warmup,
            "decay_steps": self.decay,
            "samples": self.samples,
            "epochs": self.epochs,
            "samples_per_image": self.samples_per_image,
            "trainable_parameters": self.adapter.parameters,
            "adapter_modules": self.adapter.modules,
            "not_loaded": self.adapter.not_loaded,
            "rates": self.rates.to_json(),
            "optimizer": asdict(self.optimizer),
            "objective": self.objective.to_json(),
            "text_encoders": self.text_encoders.to_json() if self.text_encoders else None,
            "new_tokens": self.new_tokens.to_json() if self.new_tokens else None,
            "averages": self.averages.to_json() if self.averages else None,
            "dtypes": self.dtypes.describe(),
            "cache": {
                "images": asdict(self.image_cache),
                "captions": asdict(self.caption_cache),
                "masks": asdict(self.mask_cache),
            },
            "disk": self.disk.to_json(),
            "cost": self.cost.to_json(),
            "speed": asdict(self.speed) if self.speed else None,
            # As it was printed, for the run's page.
            "text": self.describe().split("\n"),
        }

    def describe(self) -> str:
        """The plan as text for the terminal."""
        dtypes, device = self.dtypes.describe(), self.device
        buckets = ", ".join(f"{name} ({count})" for name, count in self.buckets.items())
        unused = f"; {len(self.unused)} keys of it are not needed (a run's plan.json lists them)" if self.unused else ""
        warmup = f"; warm-up {steps_text(self.warmup)}" if self.warmup else ""
        warmup += f"; decay in the last {steps_text(self.decay)}" if self.decay else ""
        lines = [
            f"base         {self.base}: {self.architecture}, predicts {self.prediction.describe()}{unused}",
            f"device       {device.describe()}",
            f"precision    {device.precision} ({device.precision_reason}): {dtypes['activations']} weights and "
            f"activations, {dtypes['adapter, master weights']} adapter master weights, "
            f"optimizer state {dtypes['optimizer state']}, {dtypes['VAE']} VAE",
            *self.base_weights.describe(),
            f"images       {self.images} ({self.items_per_epoch} per epoch with repeats)",
            *describe_sets(self.sets),
            *describe_repeats(self.repeats),
            f"buckets      {len(self.buckets)}: {buckets}",
            f"step         {self.global_batch_size} samples = batch {self.batch_size} x accumulation "
            f"{self.accumulation} x processes {self.processes}; micro-batches {self.micro_batch_fill:.0%} full",
            f"recording    {self.step_path.describe()}",
            f"length       {self.steps} optimizer step{plural(self.steps)} = {self.samples} sample{plural(self.samples)} = "
            f"{self.epochs} epochs; "
            f"each image {self.samples_per_image} times{' on average' if self.repeats or len(self.sets) > 1 else ''}{warmup}",
            *self.adapter.describe(),
            *self.rates.describe(),
            *self.optimizer.describe(),
            *self.objective.describe(),
            *(self.text_encoders.describe() if self.text_encoders else ()),
            *(self.new_tokens.describe() if self.new_tokens else ()),
            *(self.averages.describe() if self.averages else ()),
            *self.cost.describe(),
            f"cache        {self.image_cache.describe('image entries', ' to encode')}, {self.caption_cache.describe('captions')}"
            + (f", {self.mask_cache.describe('masks')}" if self.mask_cache.needed else ""),
            f"disk         {self.disk.parts()}; {'; '.join(room.describe() for room in self.rooms)}",
            *(self.sampling.describe() if self.sampling else ["samples      none: sample.enabled is false"]),
            *self.checkpoints.describe(),
        ]
        lines += (
            self.evaluation.describe()
            if self.evaluation
            else [
                "evaluation   none: --evaluation.held_out 0.1, or --evaluation.path with held-out images, measures what is learned"
            ]
        )
        lines += self.captions.describe()
        estimate = self.cost.step_seconds(self.accumulation)
        lines.append(describe_speed(self.speed, estimate, self.steps, self.global_batch_size, self.run_folder))
        lines += findings.lines(self.problems, self.notes)
        return "\n".join(printable(line) for line in lines)
