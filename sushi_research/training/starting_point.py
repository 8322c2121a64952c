"""The adapter file that a run starts from (`lora.start_from`): its matrices, and the settings that follow from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch

from sushi_research.adapters import bundled, lora, other_prediction, run_files
from sushi_research.adapters.entries import Entry
from sushi_research.adapters.kohya_format import is_uniform, tensors_hash
from sushi_research.adapters.matching import match_components
from sushi_research.adapters.metadata import Ancestor, ancestors_of
from sushi_research.adapters.reading import COMPONENTS, component_of, read_adapter
from sushi_research.adapters.targets import adaptable_paths
from sushi_research.adapters.trained_images import TrainedOn, trained_on
from sushi_research.config import TrainingConfig
from sushi_research.config.sets import paths_of
from sushi_research.data.training_data import Data
from sushi_research.errors import UserError, some
from sushi_research.evaluation import unseen
from sushi_research.models import ARCHITECTURES, loading
from sushi_research.models.prediction import Prediction
from sushi_research.runs.job import Job
from sushi_research.training import started_settings, started_text


@dataclass(frozen=True)
class StartingPoint:
    """What a run starts from: the entries by component and layer path, the hash of the file's tensors, the files that it came from
    in turn, itself last, and the images that it says it was trained on. `tokens` are its new tokens, as the config spells them."""

    path: Path
    hash: str
    matches: lora.Trained
    chain: tuple[Ancestor, ...]
    trained_on: TrainedOn
    tokens: bundled.Tokens = field(default_factory=dict)

    @property
    def is_uniform(self) -> bool:
        """Whether all modules of each component have one rank and one alpha."""
        return all(
            is_uniform((each.rank, each.scale) for each in entries.values()) for entries in self.matches.values()
        )

    def describe(self) -> str:
        """A line for the terminal."""
        line = f"starting from the adapter {self.path}: {sum(map(len, self.matches.values()))} modules"
        if self.tokens:
            line += f", and the new tokens {some(list(self.tokens))}"
        if self.is_uniform:
            return line
        return (
            f"{line}, which differ in rank or alpha; A1111, Forge and ComfyUI read each module's own, as these scripts do, but "
            "diffusers' load_lora_weights may scale some of them wrongly"
        )


def read(config: TrainingConfig, model: ModuleType) -> tuple[TrainingConfig, StartingPoint]:
    """The config with the rank, alpha and targets of the file that `lora.start_from` names, and what is in the file.

    UserError if the file cannot be read, fits the base only in part, adapts what is not trained here, or contradicts the config.
    """
    assert config.lora.start_from is not None
    try:
        path = run_files.resolve(config.lora.start_from)
        adapter = read_adapter(path)
    except UserError as error:
        raise UserError(f"lora.start_from: {error}") from error
    base = loading.find_base(config, model)
    unet, encoders = loading.empty_unet(base), started_text.empty_encoders(config, model, base)
    named: dict[str, list[str]] = {}
    for entry in adapter.entries:
        named.setdefault(component_of(entry.name), []).append(entry.name)
    started_text.require_trained(config, path, named, encoders)
    components = dict.fromkeys(COMPONENTS.values()) | {"unet": unet} | encoders
    matches = match_components(adapter, ARCHITECTURES[model.NAME], components)
    entries = matches.get("unet")
    if entries is None:
        raise UserError(f"{path} adapts only text encoders, and a run trains the UNet too: start from another file.")
    adaptable = set(adaptable_paths(unet))
    if strange := [layer for layer in entries if layer not in adaptable]:
        raise UserError(
            f"{path} adapts {strange[0]}, which is not trained here (only layers of the UNet's blocks are): start from a file "
            "without it."
        )
    everything = [entry for of_component in matches.values() for entry in of_component.values()]
    if large := [entry.name for entry in everything if not _fits_fp32(entry)]:
        raise UserError(
            f"{path} has values in {large[0]} that fp32, in which adapters are trained, cannot hold: give another file."
        )
    bundled.require_fitting(
        path, adapter.tokens, {name: base.config(name)["hidden_size"] for name in model.TEXT_ENCODERS}
    )
    tokens = started_text.named_tokens(config, path, adapter.tokens)
    settings = started_settings.section_of(config, path, entries, unet)
    config = config.model_copy(update={"lora": settings})
    for component in matches.keys() & encoders.keys():
        started_text.require_usable(config, path, component, matches[component], encoders[component])
    digest = tensors_hash(path)
    chain = ancestors_of(adapter.header, digest)
    return config, StartingPoint(path, digest, matches, chain, trained_on(path), tokens)


def require_usable(job: Job, data: Data, prediction: Prediction) -> None:
    """UserError if the file is in the run's own folder, or was trained on images that the run is measured on; a line says if that
    is not known, and if the file was trained on a base with another prediction."""
    start, evaluation = job.start, job.config.evaluation
    if start is None:
        return
    if start.path.resolve().is_relative_to(job.run_path.resolve()):
        raise UserError(
            f"lora.start_from is {start.path}, which is in the folder of this run, where files of an earlier launch are moved or "
            "replaced: give another --run.name, or the same command without lora.start_from goes on from the last checkpoint."
        )
    for note in other_prediction.notes([start.path], prediction):
        job.say(f"note: {note}")
    for key, source, items in (
        ("evaluation.path", evaluation.path or paths_of(job.config), data.held_out),
        ("evaluation.prior_path", evaluation.prior_path, data.prior),
    ):
        if not items:
            continue
        off = "evaluation.held_out 0" if key == "evaluation.path" and evaluation.path is None else f"{key} null"
        advice = f"give images that it has not seen, or train without measuring (--{off}), because it would know them already"
        samples = [item.sample for item in items]
        known = unseen.require_unseen([str(start.path)], samples, str(source), lambda: None, advice=advice)
        if not all(known.values()):
            job.say(
                f"note: {start.path} does not say which images it was trained on, so it may know those of {source} that are held "
                "out: then what is learned looks like more than it is"
            )


def _fits_fp32(entry: Entry) -> bool:
    """Whether the values stay finite; those of F64 may not."""
    tensors = [value for value in vars(entry).values() if isinstance(value, torch.Tensor)]
    return all(bool(torch.isfinite(tensor.float()).all()) for tensor in tensors)
