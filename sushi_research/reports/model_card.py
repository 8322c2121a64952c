"""The model card of an adapter for the Hugging Face hub, made from its run folder.

The card says no more than the adapter file does: with lora.metadata full it has pictures with their prompts, settings and results;
otherwise what programs need to load the file, and what the user gave by name. It never has a path of the user's. It states no
licence, because only the author can.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sushi_research.adapters import bundled, portability
from sushi_research.adapters.module_names import locate
from sushi_research.adapters.reading import read_adapter
from sushi_research.adapters.snapshots import AVERAGE
from sushi_research.errors import UserError
from sushi_research.models import ARCHITECTURES
from sushi_research.models.header import read_header
from sushi_research.reports import outcome_blocks, run_outcomes
from sushi_research.reports.card_pictures import Pair, pairs_of, picture_table, plain
from sushi_research.reports.card_settings import adapter_rows, objective_rows
from sushi_research.reports.scores import scores_of_run
from sushi_research.runs import records
from sushi_research.runs.run_folder import RunFolder

REMEDY = "restore it: the model card is made from it"
KINDS = {"lora": "LoRA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr"}
# A hub id, alone or with the name of a file in it.
_HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:/.+)?", re.ASCII)
LICENCE = (
    "## Licence\n\nNone is stated here. The licence of the base model may apply to its adapters too. The author states one with "
    "`license:` at the top of this file."
)

WORDS = (
    "Learned (held-out images), kept (images that the base generated) and prior (images of what the base knew) are means of "
    "log(loss / the base's loss): below 0 the loss is lower than the base's, above 0 something of what it knew is lost."
)


@dataclass(frozen=True)
class ModelCard:
    """A card: the metadata at its top, its Markdown without the section about the licence, and its pictures by their path there."""

    data: dict[str, Any]
    text: str
    pictures: dict[str, Path]


@dataclass(frozen=True)
class _Source:
    """What the card of an adapter file is made from. `said` is the file's own metadata, `is_full` whether lora.metadata is full,
    `limits` the programs that do not load it."""

    run: RunFolder
    adapter: Path
    step: int | None
    repository: str
    config: Mapping[str, Any]
    plan: Mapping[str, Any]
    said: Mapping[str, str]
    limits: Mapping[str, str]

    @property
    def is_full(self) -> bool:
        return self._lora.get("metadata", "full") == "full"

    @property
    def is_evaluated(self) -> bool:
        """Whether the run's samples and evaluations are of this file; with ema.evaluate they are of the average."""
        is_average = self.adapter == self.run.average
        return self.adapter in self.run.best_adapters().values() or is_average == self.evaluates_average

    @property
    def evaluates_average(self) -> bool:
        section = self.config.get("ema")
        return isinstance(section, dict) and section.get("evaluate") is True

    @property
    def kind(self) -> str:
        return self._lora.get("kind", "lora")

    @property
    def _lora(self) -> Mapping[str, Any]:
        return self.config["lora"]

    @property
    def label(self) -> str:
        return ARCHITECTURES[self.plan["architecture"]].label

    @property
    def base_id(self) -> str | None:
        """The hub id of the base; None if it was a file or a folder."""
        match = _HUB_ID.fullmatch(self.base)
        is_local = os.path.exists(str((self.config.get("model") or {}).get("base")))
        return match[1] if match and not is_local else None

    @property
    def base(self) -> str:
        """The base's public name: a hub id, or the name of a file without its folders; "" if the file does not say it."""
        return self.said.get("ss_sd_model_name", "")

    @property
    def trigger_words(self) -> list[str]:
        words = self._lora.get("trigger_words") or []
        if not words and self.is_full and isinstance(self.config.get("captions"), dict):
            words = [self.config["captions"].get("trigger")]
        return [str(word) for word in words if word]


def model_card(run: RunFolder, adapter: Path, repository: str) -> ModelCard:
    """The card of one of the run's adapter files for the repository `owner/name`.

    UserError if a file of the run that the card needs is missing or damaged. Damaged pictures and results are left out.
    """
    config, plan = records.read_config(run.config, REMEDY), records.read_as(run.plan, records.Plan, REMEDY)
    if plan.get("architecture") not in ARCHITECTURES:
        raise UserError(f"{run.plan} does not say which architecture the run has: {REMEDY}")
    said, limits = read_header(adapter).metadata, limits_of(adapter, config["lora"].get("kind", "lora"))
    source = _Source(run, adapter, _step(run, adapter, said), repository, config, plan, said, limits)
    is_shown = source.is_full and source.is_evaluated and source.step is not None
    pictures = pairs_of(run, source.step) if is_shown else []
    lora = config["lora"]
    parts = [
        f"# {plain(run.name)}",
        plain(lora["description"], keep_lines=True) if lora.get("description") else "",
        _what_it_is(source),
        _trigger(source.trigger_words, has_tokens=bool(bundled.files_from(adapter))),
        *([picture_table(pictures, source.step, config.get("sample") or {})] if pictures else []),
        _use(source),
        *(_measured(source) if source.is_full else []),
        *([_settings(source)] if source.is_full else []),
    ]
    files = {name: path for each in pictures for name, path in each.files.items()}
    return ModelCard(_data(source, pictures), "\n\n".join(part for part in parts if part), files)


def _step(run: RunFolder, adapter: Path, said: Mapping[str, str]) -> int | None:
    """The step of an adapter file of the run; None if neither the run nor, of an average, the file's metadata say it."""
    record = run.record()
    if adapter == run.average:
        steps = said.get("ss_steps", "")
        return int(steps) if re.fullmatch("[0-9]{1,9}", steps) else None
    if adapter == run.adapter:
        return record["finished_at"] if record else None
    files = {**run.best_adapters(), **run.step_adapters()}
    return next((step for step in files if adapter in (run.step_adapter(step), run.best_adapter(step))), None)


def _data(source: _Source, pictures: Sequence[Pair]) -> dict[str, Any]:
    """The metadata of the hub: what its search and its picture gallery read."""
    tags = ["text-to-image", source.kind, "stable-diffusion-xl" if source.label == "SDXL" else "stable-diffusion"]
    loads = "diffusers" not in source.limits
    found: dict[str, Any] = {
        "base_model": source.base_id,
        "base_model_relation": "adapter" if source.base_id else None,
        "library_name": "diffusers" if loads else None,
        "pipeline_tag": "text-to-image",
        "instance_prompt": ", ".join(source.trigger_words) or None,
        "tags": [
            *dict.fromkeys([*tags, "lora", *(["diffusers", "template:sd-lora"] if loads else []), "sushi-research"])
        ],
        "widget": [{"text": each.prompt, "output": {"url": each.adapter}} for each in pictures] or None,
    }
    return {key: value for key, value in found.items() if value is not None}


def _what_it_is(source: _Source) -> str:
    name = f" [{source.base_id}](https://huggingface.co/{source.base_id})" if source.base_id else ""
    name = name or (f" {plain(source.base)}" if source.base else "")
    author = source.config["lora"].get("author")
    by = f", by {plain(author)}" if author else ""
    digest = source.said.get("sushi_research.base_hash", "")
    hashed = f" The hash of its UNet's weights is `{digest[:16]}`." if digest and not source.base_id else ""
    average = source.said.get(AVERAGE)
    averaged = f" It is the average of the weights over the steps ({plain(average)})." if average else ""
    return (
        f"A {KINDS.get(source.kind, source.kind)} adapter for {source.label}{by}, trained with sushi-research on the base{name}."
        f"{hashed}{averaged}"
    )


def _trigger(words: Sequence[str], *, has_tokens: bool) -> str:
    shown = ", ".join(f"**{plain(word)}**" for word in words)
    # New tokens are words that call it up; the section on its use names them.
    nothing = "" if has_tokens else "It has no trigger words."
    return f"Trigger words: {shown}" if words else nothing


def limits_of(adapter: Path, kind: str) -> dict[str, str]:
    """Program -> why it does not load the file as it is (docs/formats.md).

    Of a file for a base of other sizes than the published ones, what holds for every file of its kind.
    """
    of_tokens: Mapping[str, str] = {}
    try:
        found = read_adapter(adapter)
        of_tokens = bundled.LIMITS if found.tokens else of_tokens
        architecture, matches = locate(found)
        return {**of_tokens, **portability.limits(architecture.name, matches)}
    except UserError:
        of_kind = {} if kind == "lora" else {"diffusers": f"it does not read files of {KINDS.get(kind, kind)}"}
        return {**of_tokens, **of_kind}


def _use(source: _Source) -> str:
    file = source.adapter.name
    lines = [
        "## Use",
        "",
        f"Copy `{file}` into `models/loras` of ComfyUI, `models/Lora` of A1111 or Forge, or import it in InvokeAI.",
    ]
    lines += (
        ["", *(f"- {plain(sentence)}" for sentence in portability.sentences(source.limits))] if source.limits else []
    )
    if (shift := _flow_shift(source)) is not None:
        lines += [
            "",
            "The base predicts a rectified flow: in ComfyUI it needs the node ModelSamplingSD3, for example with the shift "
            f"{shift:g} that this adapter was trained with. Other programs need an option of that kind, which A1111 and InvokeAI "
            "do not have.",
        ]
    for token, (name, _) in bundled.files_from(source.adapter).items():
        lines += [
            "",
            f"It has the new token **{plain(token)}**. A1111 takes it from `{file}`. For other programs copy `{name}` into "
            f"their folder of embeddings: `models/embeddings` of ComfyUI, where a prompt says `embedding:{Path(name).stem}`.",
        ]
    if "diffusers" in source.limits:
        return "\n".join(lines)
    base, prompt = source.base_id or "BASE", ", ".join(source.trigger_words) or "a prompt"
    # diffusers' own scheduler for flows lacks what its pipelines of Stable Diffusion ask of one.
    settings = f'prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift={shift}'
    scheduler = [] if shift is None else [f"pipeline.scheduler = DPMSolverMultistepScheduler({settings})"]
    return "\n".join(
        [
            *lines,
            "",
            "```python",
            "import torch",
            f"from diffusers import AutoPipelineForText2Image{', DPMSolverMultistepScheduler' if scheduler else ''}",
            "",
            f'pipeline = AutoPipelineForText2Image.from_pretrained("{base}", torch_dtype=torch.float16).to("cuda")',
            *scheduler,
            f'pipeline.load_lora_weights("{source.repository}", weight_name="{file}")',
            f"image = pipeline({prompt!r}).images[0]",
            "```",
        ]
    )


def _flow_shift(source: _Source) -> float | None:
    """The shift of a base that predicts a rectified flow; None of others, and where the plan does not say it."""
    base = source.plan.get("base")
    shift = base.get("flow_shift") if isinstance(base, dict) else None
    return float(shift) if isinstance(shift, int | float) else None


def _measured(source: _Source) -> list[str]:
    """The results of the adapter's step: of the evaluations, and of the user's own judge. A sentence if nothing was measured."""
    run, lines, title = source.run, [], "## What was measured"
    if not source.is_evaluated:
        average = source.evaluates_average
        of = "the average of its weights, not of these" if average else "its weights, not of their average"
        return [f"{title}\n\nNothing of this file: the run's evaluations are of {of}."]
    outcomes = run_outcomes.read(run)
    head, *rows = outcome_blocks.outcome_table(outcomes) or [[]]
    of_step = [row for row in rows if row[0] == str(source.step)]
    if of_step:
        images = len(outcomes.arrays["validation"].names)
        lines += [f"On {images} images that were not trained on; +- is a standard error over images. {WORDS}", ""]
        lines += ["| outcome | value |", "|---|---|"]
        shown = zip(head[1:], of_step[0][1:], strict=True)
        # The timestep bins and the gap are details of other rows.
        lines += [
            f"| {name} | {value} |" for name, value in shown if value and name != "gap" and not name.startswith("t ")
        ]
    scores = {}
    record = run.record()
    if source.adapter in (run.adapter, run.average) and record and record["finished_at"] == source.step:
        try:
            scores = scores_of_run(run.path, source.step, REMEDY)
        except UserError:
            scores = {}
    if scores:
        lines += ["", "Scores of its pictures:", "", "| score | mean | of |", "|---|---:|---:|"]
        lines += [
            f"| {plain(name)} | {sum(each.values.values()) / len(each.values):.3g} | {len(each.values)} |"
            for name, each in scores.items()
        ]
    return ["\n".join([title, "", *(lines or ["Nothing: the run was not evaluated."])])]


def _settings(source: _Source) -> str:
    """The settings that decide what was learned, as a table; those that the run does not have are left out."""
    config, plan = source.config, source.plan

    def value(section: str, key: str) -> Any:
        return (config.get(section) or {}).get(key)

    targets, resolution = value("lora", "targets"), value("data", "resolution")
    rows = {
        "kind": KINDS.get(source.kind, source.kind),
        "layers": ", ".join(targets) if isinstance(targets, list) else targets,
        **adapter_rows(config),
        "images": plan.get("images"),
        "resolution": resolution,
        "steps": source.step,
        "samples in a step": plan.get("global_batch_size"),
        "optimizer": value("optimizer", "name"),
        "learning rate": value("optimizer", "lr"),
        "schedule": value("schedule", "name"),
        **objective_rows(config, plan),
        "seed": value("train", "seed"),
    }
    lines = [f"| {name} | {plain(str(each))} |" for name, each in rows.items() if each is not None]
    return "\n".join(["## Settings", "", "| setting | value |", "|---|---|", *lines])
