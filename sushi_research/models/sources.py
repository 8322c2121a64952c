"""Opens a base (diffusers folder or single file) and replacement VAEs and text encoders, without loading weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sushi_research.errors import UserError
from sushi_research.models import ARCHITECTURES, detect, hub, prediction, schedulers, settings
from sushi_research.models.components import CLASSES, TITLES
from sushi_research.models.diffusers_folder import WEIGHTS, FolderPart
from sushi_research.models.folder_weights import has_weights, read_json
from sushi_research.models.formats import number
from sushi_research.models.header import Header, read_header
from sushi_research.models.shapes import published
from sushi_research.models.single_file import FilePart, SingleFile

Part = FolderPart | FilePart


@dataclass(frozen=True)
class Opened:
    """An opened base: its facts, and `part(name, others)`, which returns its component of that name.

    `others` are the components found before: a single file's UNet needs the width of the pooled text embedding.
    """

    architecture: str
    evidence: list[prediction.Evidence]
    scheduler: Mapping[str, Any]
    force_zeros: bool
    part: Callable[[str, Mapping[str, Part]], Part]
    single: SingleFile | None


def open_folder(folder: Path, variant: str | None, prediction_type: str | None = None) -> Opened:
    """Opens a base in diffusers format by reading its configs. UserError if it is not supported.

    `prediction_type` is the user's option; it is required if there is no scheduler config.
    """
    pipeline = read_json(folder / "model_index.json")
    if pipeline is None:
        raise UserError(
            f"{folder} is not a model in diffusers format (it has no model_index.json): "
            "give model.base a folder made by save_pretrained, a .safetensors file, or a hub id."
        )
    index = folder / "model_index.json"
    if "_class_name" not in pipeline:
        raise UserError(f"{index} is damaged (no _class_name): download the model again.")
    configs = {name: read_json(folder / name / "config.json") for name in TITLES}
    architecture = detect.of_configs(configs, str(pipeline["_class_name"]), str(folder))
    schedulers.require_pipeline(pipeline, index)
    path = folder / "scheduler" / "scheduler_config.json"
    scheduler = read_json(path)
    if scheduler is None and prediction_type is None:
        raise UserError(
            f"{folder} has no scheduler/scheduler_config.json, and nothing else says what the model predicts: "
            "download the model again, or say it with --model.prediction_type."
        )

    def part(name: str, others: Mapping[str, Part]) -> Part:
        if configs[name] is None:
            option = "--model.vae" if name == "vae" else "--model.text_encoders"
            raise UserError(
                f"{folder} has no {TITLES[name]} (no {name}/config.json): download the model again, or take it from another "
                f"model with {option}."
            )
        schedulers.require_class(pipeline, name, settings.TEXT_CLASSES if "text" in name else (CLASSES[name],), index)
        return FolderPart(name, folder / name, variant)

    facts = published(architecture)
    if scheduler is not None:
        schedulers.require_scheduler(scheduler, architecture, pipeline, path)
    return Opened(
        architecture=architecture,
        evidence=[]
        if scheduler is None
        else prediction.from_scheduler(scheduler, str(path), schedulers.class_of(pipeline, "scheduler")),
        scheduler=facts["scheduler"] if scheduler is None else scheduler,
        # Without it, the pipelines' own default, which is the published value.
        force_zeros=pipeline.get("force_zeros_for_empty_prompt", facts["force_zeros_for_empty_prompt"]),
        part=part,
        single=None,
    )


def open_file(header: Header) -> Opened:
    """Opens a base in a single file by its header. UserError if it is not supported."""
    path = header.path
    architecture = detect.of_file(header)
    single, facts = SingleFile(header, architecture), published(architecture)

    def part(name: str, others: Mapping[str, Part]) -> Part:
        if name not in single:
            option = "--model.vae a VAE" if name == "vae" else "--model.text_encoders a model with the text encoders"
            raise UserError(
                f"{path} holds {ARCHITECTURES[architecture].title} UNet without its {TITLES[name]}: give {option} (a folder in "
                "diffusers format, a .safetensors file, or a hub id)."
            )
        second = others.get("text_encoder_2")
        return single.part(name, number(second.config, "projection_dim", 512) if second else None)

    return Opened(
        architecture=architecture,
        evidence=[
            *prediction.from_single_file(header.tensors.keys(), str(path)),
            *prediction.from_metadata(header.metadata, str(path)),
            *prediction.from_names(path.name, header.metadata),
        ],
        scheduler=facts["scheduler"],
        force_zeros=facts["force_zeros_for_empty_prompt"],
        part=part,
        single=single,
    )


def require_nothing_left(single: SingleFile, parts: Mapping[str, Part], below: str = "") -> dict[str, str]:
    """Key -> reason of the keys of the file that `parts` do not use and that are not needed.

    UserError for any other unused key that starts with `below`.
    """
    mine = [part for part in parts.values() if isinstance(part, FilePart) and part.header is single.header]
    ignored, unknown = single.leftovers(mine)
    unknown = [key for key in unknown if key.startswith(below)]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UserError(
            f"{single.header.path} holds {unknown[0]!r}{more}, which no component of {ARCHITECTURES[single.architecture].title} "
            "base has: this suite does not know such a model, so use another file of the model (scripts/inspect_model.py lists "
            "the keys)."
        )
    return ignored


def other_vae(source: str, revision: str | None, architecture: str) -> tuple[Part, str]:
    """(the VAE that replaces the base's own, its name in records: the source, with the commit if it is a hub id)."""
    path, commit = hub.find_component(source, revision, ("", "vae/"), "model.vae")
    named = source if commit is None else f"{source}@{commit}"
    if path.is_file():
        single = SingleFile(read_header(path), architecture)
        if "vae" not in single or any(key.startswith("decoder.up_blocks.") for key in single.header.tensors):
            raise UserError(
                f"model.vae: {source} has no VAE in Stability's layout (no decoder.up): give a checkpoint, a VAE file such as "
                "sdxl_vae.safetensors, or the folder of a VAE in diffusers format."
            )
        part = single.part("vae")
        require_nothing_left(single, {"vae": part}, below=part.prefix)
        return part, named
    folder = path / "vae" if (path / "vae" / "config.json").is_file() else path
    if not (folder / "config.json").is_file():
        raise UserError(
            f"model.vae: {source} has no VAE in diffusers format (no config.json): give a folder or hub id that has one, or a file."
        )
    return FolderPart("vae", folder, only_half(folder, WEIGHTS["vae"])), named


def other_text_encoders(source: str, architecture: str) -> tuple[dict[str, Part], Path | None]:
    """(the text encoders that replace the base's own, the folder in diffusers format that they come from, if any)."""
    path, _ = hub.find_component(source, None, ("text_encoder/", "text_encoder_2/"), "model.text_encoders")
    single = None if path.is_dir() else SingleFile(read_header(path), architecture)
    parts: dict[str, Part] = {}
    for name in ARCHITECTURES[architecture].formats().TEXT_ENCODERS:
        if single and name in single:
            parts[name] = single.part(name)
            require_nothing_left(single, parts, below=parts[name].prefix)
        elif single is None and (path / name / "config.json").is_file():
            parts[name] = FolderPart(name, path / name, only_half(path / name, "model"))
        else:
            raise UserError(
                f"model.text_encoders: {source} holds no {TITLES[name]} of {ARCHITECTURES[architecture].title} base: name a "
                "checkpoint or a model in diffusers format that has one."
            )
    return parts, None if single else path


def only_half(folder: Path, stem: str) -> str | None:
    """ "fp16" if a replacement component has only half-precision weights, else None (full precision).

    model.variant applies to the base alone.
    """
    return "fp16" if has_weights(folder, stem, "fp16") and not has_weights(folder, stem, None) else None
