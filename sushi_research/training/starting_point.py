"""The adapter file that a run starts from (`lora.start_from`): its matrices, and the settings that follow from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from pydantic import ValidationError

from sushi_research.adapters import lora, run_files
from sushi_research.adapters.entries import Entry, LowRank
from sushi_research.adapters.kohya_format import is_uniform, tensors_hash
from sushi_research.adapters.matching import match_components
from sushi_research.adapters.metadata import Ancestor, ancestors_of
from sushi_research.adapters.reading import COMPONENTS, component_of, read_adapter
from sushi_research.adapters.trained_images import TrainedOn, trained_on
from sushi_research.config import TrainingConfig
from sushi_research.config.sets import paths_of
from sushi_research.data.training_data import Data
from sushi_research.errors import UserError
from sushi_research.evaluation import unseen
from sushi_research.models import ARCHITECTURES, loading
from sushi_research.runs.job import Job


@dataclass(frozen=True)
class StartingPoint:
    """What a run starts from: the pairs by module path, the hash of the file's tensors, the files that it came from in turn,
    itself last, and the images that it says it was trained on."""

    path: Path
    hash: str
    pairs: Mapping[str, LowRank]
    chain: tuple[Ancestor, ...]
    trained_on: TrainedOn

    @property
    def is_uniform(self) -> bool:
        """Whether all modules have one rank and one alpha."""
        return is_uniform((pair.rank, pair.alpha) for pair in self.pairs.values())

    def describe(self) -> str:
        """A line for the terminal."""
        line = f"starting from the adapter {self.path}: {len(self.pairs)} modules"
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
    if other := [entry.name for entry in adapter.entries if not _is_plain(entry)]:
        raise UserError(f"{path} holds more than low-rank pairs ({other[0]:.200}): start from a plain LoRA file.")
    if text := [entry.name for entry in adapter.entries if component_of(entry.name) != "unet"]:
        raise UserError(
            f"{path} adapts the text encoders too ({text[0]:.200}), and only the UNet is trained here: start from a file without "
            "them."
        )
    unet = loading.empty_unet(loading.find_base(config, model))
    components = dict.fromkeys(COMPONENTS.values()) | {"unet": unet}
    pairs = match_components(adapter, ARCHITECTURES[model.NAME], components)["unet"]
    assert all(isinstance(pair, LowRank) for pair in pairs.values())
    adaptable = set(lora.adaptable_paths(unet))
    if strange := [layer for layer in pairs if layer not in adaptable]:
        raise UserError(
            f"{path} adapts {strange[0]}, which is not trained here (only layers of the UNet's blocks are): start from a file "
            "without it."
        )
    if large := [pair.name for pair in pairs.values() if not _fits_fp32(pair)]:
        raise UserError(
            f"{path} has values in {large[0]} that fp32, in which adapters are trained, cannot hold: give another file."
        )
    settings = _settings(config, path, pairs, [name for name, _ in unet.named_modules()])
    digest = tensors_hash(path)
    chain = ancestors_of(adapter.header, digest)
    return config.model_copy(update={"lora": settings}), StartingPoint(path, digest, pairs, chain, trained_on(path))


def require_usable(job: Job, data: Data) -> None:
    """UserError if the file is in the run's own folder, or was trained on images that the run is measured on; a line says if that
    is not known."""
    start, evaluation = job.start, job.config.evaluation
    if start is None:
        return
    if start.path.resolve().is_relative_to(job.run_path.resolve()):
        raise UserError(
            f"lora.start_from is {start.path}, which is in the folder of this run, where files of an earlier launch are moved or "
            "replaced: give another --run.name, or the same command without lora.start_from goes on from the last checkpoint."
        )
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


def _is_plain(entry: Entry) -> bool:
    """Whether an entry is a low-rank pair with a scale and no more."""
    return isinstance(entry, LowRank) and entry.mid is None and entry.magnitude is None and entry.bias is None


def _fits_fp32(pair: LowRank) -> bool:
    """Whether the values stay finite; those of F64 may not."""
    return all(bool(torch.isfinite(matrix.float()).all()) for matrix in (pair.down, pair.up))


def _settings(config: TrainingConfig, path: Path, pairs: Mapping[str, LowRank], modules: Sequence[str]) -> Any:
    """The section `lora` with the file's rank, alpha and targets. UserError if the config has others, or if none can be had."""
    (rank, alpha), count = Counter((pair.rank, pair.alpha) for pair in pairs.values()).most_common(1)[0]
    share = "" if count == len(pairs) else f" (in {count} of {len(pairs)} modules)"
    given = config.lora
    # Alphas in a file are often rounded to 16 bits.
    for key, of_file, differs in (
        ("rank", rank, given.rank not in (None, rank)),
        ("alpha", alpha, given.alpha is not None and abs(given.alpha - alpha) > 1e-3 * abs(alpha)),
    ):
        if differs:
            raise UserError(
                f"lora.{key} is {getattr(given, key):g}, and {path}, from which the run starts, has {key} {of_file:g}{share}: "
                f"remove lora.{key}, or set it to null."
            )
    if given.targets is None:
        targets = targets_of(pairs, modules)
    else:
        targets = given.targets
        chosen = lora.matching(lora.resolve_targets(targets), modules)
        if chosen != set(pairs):
            other = min(chosen ^ set(pairs))
            raise UserError(
                f"lora.targets is {targets}, which are {len(chosen)} modules, and {path}, from which the run starts, adapts "
                f"{len(pairs)} modules ({other} is only in the {'file' if other in pairs else 'targets'}): remove lora.targets, or "
                "set it to null."
            )
    values = given.model_dump() | {"rank": rank, "alpha": alpha, "targets": targets}
    try:
        return type(given).model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"a run cannot start from {path}: its {first['loc'][0]} is {first['input']!r:.60} ({first['msg']})."
        ) from error


def targets_of(paths: Collection[str], modules: Sequence[str]) -> str | list[str]:
    """The targets that name exactly these modules: a preset, or a list of the shortest endings. `modules` are all of the UNet."""
    wanted = set(paths)
    for preset, endings in lora.PRESETS.items():
        if lora.matching(endings, modules) == wanted:
            return preset
    chosen: list[str] = []
    for path in paths:
        if path in lora.matching(chosen, [path]):
            continue
        parts = path.split(".")
        endings = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        chosen.append(next(ending for ending in endings if lora.matching([ending], modules) <= wanted))
    return chosen
