"""The part of a plan on the adapter: its kind, modules, ranks and parameters, and which programs will not load its file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sushi_research.adapters import bundled, lora, tensor_names
from sushi_research.adapters.entries import Entry, Kronecker
from sushi_research.adapters.portability import limits, sentences
from sushi_research.adapters.settings import is_large_kernel, require_effect, settings_of
from sushi_research.adapters.targets import resolve_targets, target_layers
from sushi_research.errors import some
from sushi_research.models import loading
from sushi_research.runs.job import Job
from sushi_research.training import text_encoder_plan, text_encoders

Shapes = Mapping[str, Sequence[int]]
_TITLES = {
    "dora": "DoRA, a LoRA with a magnitude for each input",
    "loha": "LoHa, the elementwise product of two low-rank matrices",
    "lokr": "LoKr, a Kronecker product",
}


@dataclass(frozen=True)
class AdapterPlan:
    """The number of adapted modules and of trained parameters, and further lines of the plan.

    `not_loaded`: program -> why it will not load the run's files as they are (`portability.limits`).
    """

    modules: int
    parameters: int
    not_loaded: Mapping[str, str]
    lines: tuple[str, ...] = ()

    def describe(self) -> list[str]:
        """Lines of the plan."""
        first = f"adapter      {self.modules} modules, {self.parameters:,} trainable parameters"
        return [first, *(f"             {line}" for line in self.lines)]


def require_effective(job: Job, base: loading.Base, unet: Any) -> None:
    """UserError for settings of the adapter that no module of the targets has a use for. `unet` has no adapter yet."""
    settings = settings_of(job.config.lora, seed=0)
    layers = target_layers(unet, resolve_targets(settings.targets))
    names, large = list(layers), sum(map(is_large_kernel, layers.values()))
    if settings.overrides:
        for name in text_encoders.trained_names(job):
            endings = resolve_targets(text_encoders.adapter_settings(job.config).targets)
            paths = target_layers(loading.empty_text_encoder(base, name), endings, name)
            names += [tensor_names.module_name(name, path) for path in paths]
    require_effect(settings, names, large)


def plan_of(job: Job, base: loading.Base, unet: Any, shapes: Shapes) -> AdapterPlan:
    """The plan of an adapter whose tensors have these shapes. `unet` is without weights and has its adapter."""
    modules = {tensor_names.parse(name)[:2] for name in shapes if not tensor_names.is_of_token(name)}
    parameters = sum(map(math.prod, shapes.values()))
    entries = lora.trained_entries({"unet": unet, **text_encoder_plan.attached(job, base)})
    not_loaded = limits(job.model.NAME, entries, layers_per_block=unet.config.layers_per_block)
    if job.config.text_encoders.new_tokens:
        not_loaded = bundled.LIMITS | not_loaded
    lines = (*_settings(job, entries["unet"]), *(f"warning: {sentence}" for sentence in sentences(not_loaded)))
    return AdapterPlan(len(modules), parameters, not_loaded, lines)


def _settings(job: Job, entries: Mapping[str, Entry]) -> Iterable[str]:
    """What the UNet's modules have, where it is not the same plain LoRA in all."""
    kind = job.config.lora.kind
    if kind in _TITLES:
        yield f"{_TITLES[kind]} (docs/kinds.md)"
    ranked = [each for each in entries.values() if not isinstance(each, Kronecker) or each.rank is not None]
    found = Counter((each.rank, each.scale) for each in ranked)  # type: ignore[union-attr]
    if len(found) > 1:
        parts = [
            f"rank {rank} with the scale {scale:.4g} in {count} modules" for (rank, scale), count in found.most_common()
        ]
        yield some(parts, 6)
        if kind in ("lora", "dora"):
            reason = ", because diffusers reads differing alphas wrongly" if kind == "lora" else ""
            yield f"the file has each scale within the second matrix and no alpha{reason}"
    if whole := len(entries) - len(ranked):
        yield f"both matrices are whole in {whole} modules, where rank and alpha have no effect"
