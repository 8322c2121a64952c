"""The part of a plan on the text encoders that a run trains: their adapters, learning rates, and what they cost."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sushi_research.adapters import lora, tensor_names
from sushi_research.config.text_encoders import is_in_step
from sushi_research.files import size_text
from sushi_research.models import loading
from sushi_research.models.components import TITLES
from sushi_research.planning.step_cost import encoders_cost
from sushi_research.planning.step_trace import Cost
from sushi_research.runs.job import Job
from sushi_research.training import new_tokens, text_encoders
from sushi_research.training.length import until_step
from sushi_research.training.parameter_groups import Own

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class TextEncoderPlan:
    """The text encoders that are trained, `names`; for `until` of the `steps` (None: all).

    `modules` is the number of layers with an adapter, `idle` that of those whose output the UNet does not get, `parameters` what is
    trained of them. `bytes` are those of all text encoders in the compute dtype; they stay in memory.
    """

    names: tuple[str, ...]
    modules: int
    idle: int
    parameters: int
    until: int | None
    steps: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """The part of plan.json."""
        return asdict(self)

    def describe(self) -> list[str]:
        """Lines of the plan."""
        titles = " and ".join(TITLES[name] for name in self.names)
        length = "" if self.until is None else f", for the first {self.until} of {self.steps} steps"
        lines = [
            f"text         adapters on the {titles}: {self.modules} modules, {self.parameters:,} trainable parameters{length}",
            f"             encoded in every step, forward and backward: {size_text(self.bytes)} of encoders stay in memory, "
            "and the cache holds no embeddings of the training's captions",
        ]
        if self.idle:
            lines.append(
                f"             {self.idle} of the modules are in layers that do not reach the UNet: they are in the file, as in "
                "those of other programs, and change nothing"
            )
        return lines


def shapes_of(job: Job, base: loading.Base) -> Shapes:
    """The shapes of the tensors of the text encoders' adapters and of new tokens, by their names in checkpoints."""
    shapes = {name: tuple(each.shape) for name, each in lora.adapter_parameters(attached(job, base)).items()}
    return shapes | new_tokens.shapes_of(job, base)


def attached(job: Job, base: loading.Base) -> dict[str, Any]:
    """The text encoders that are trained, without weights, with their adapters; none if none is trained."""
    components = {name: loading.empty_text_encoder(base, name) for name in text_encoders.trained_names(job)}
    for name, encoder in components.items():
        text_encoders.attach(encoder, name, job)
    return components


def own_rates(job: Job, steps: int, items: int) -> dict[str, Own]:
    """The learning rate and the end step of each text encoder that is trained, and of new tokens. UserError for an end beyond the
    run's."""
    section, names = job.config.text_encoders, text_encoders.trained_names(job)
    until = (
        until_step(job.config.text_encoders.until, steps, items, job.global_batch_size) if is_in_step(section) else None
    )
    own = {name: Own(text_encoders.rate_of(job.config, job.model, name), until) for name in names}
    if section.new_tokens:
        rate: Any = job.config.text_encoders.new_tokens_lr
        rate = section.lr if rate is None else rate
        own[tensor_names.NEW_TOKENS] = Own(rate, until)
    return own


def plan_of(
    job: Job, base: loading.Base, shapes: Mapping[str, tuple[int, ...]], own: Mapping[str, Own], steps: int
) -> TextEncoderPlan | None:
    """The plan of the text encoders' adapters; None if none is trained. `shapes` are those of `shapes_of`."""
    own = {name: each for name, each in own.items() if name != tensor_names.NEW_TOKENS}
    shapes = {name: shape for name, shape in shapes.items() if not tensor_names.is_of_token(name)}
    if not own:
        return None
    encoders: list[Any] = [loading.empty_text_encoder(base, name) for name in job.model.TEXT_ENCODERS]
    numbers = sum(parameter.numel() for encoder in encoders for parameter in encoder.parameters())
    layers = {name: base.config(name)["num_hidden_layers"] for name in own}
    idle = text_encoders.idle_names(shapes, layers, job.model.idle_layers(**text_encoders.text_settings(job)))
    return TextEncoderPlan(
        names=tuple(own),
        modules=len({tensor_names.parse(name)[:2] for name in shapes}),
        idle=len({tensor_names.parse(name)[:2] for name in idle}),
        parameters=sum(map(math.prod, shapes.values())),
        until=next(iter(own.values())).until,
        steps=steps,
        bytes=numbers * job.compute_dtype.itemsize,
    )


def cost_of(job: Job, base: loading.Base, checkpointing: str) -> Cost:
    """The cost of encoding chunks of captions with the text encoders as the job trains them (`encoders_cost`)."""
    names = job.model.TEXT_ENCODERS
    encoders = {name: loading.empty_text_encoder(base, name).requires_grad_(False) for name in names}
    draws = text_encoders.adapter_settings(job.config).drops
    for name in text_encoders.trained_names(job):
        text_encoders.attach(encoders[name], name, job)
    section = job.config.text_encoders
    for name in names if section.new_tokens else text_encoders.trained_names(job):
        if section.new_tokens:
            new_tokens.attach_empty(encoders[name], job.config)
        text_encoders.to_training(encoders[name])
        text_encoders.recompute(encoders[name], checkpointing, draws=draws)
    text = job.model.Text(*itertools.chain.from_iterable((None, encoder) for encoder in encoders.values()))
    return encoders_cost(text, [*encoders.values()], job.model, text_encoders.text_settings(job), job.compute_dtype)
