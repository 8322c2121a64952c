"""What an adapter file says about itself, in its metadata: for programs that load it, and for later runs and evaluations.

Who reads what (looked up in the programs' code, 2026-11):

- A1111 and Forge: ss_tag_frequency (the words in their LoRA editor), ss_dataset_dirs (the number of images), ss_output_name,
  ss_sd_model_name, ss_clip_skip, ss_network_module, sshs_model_hash.
- SwarmUI: modelspec.* (title, author, description, trigger_phrase, thumbnail, date, architecture).
- ComfyUI Lora-Manager: ss_base_model_version, the first folder of ss_tag_frequency, and the class_tokens of ss_datasets, which it
  shows as trigger words.
- kohya's sd-scripts: ss_network_dim, ss_network_alpha, ss_network_args.
"""

from __future__ import annotations

import contextlib
import json
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow
from pyarrow import compute

from sushi_research.adapters.loss_metadata import loss_entries
from sushi_research.adapters.network_metadata import network_entries
from sushi_research.adapters.targets import resolve_targets
from sushi_research.config import TrainingConfig
from sushi_research.config.sets import sets_of
from sushi_research.data.samples import Samples
from sushi_research.errors import UserError
from sushi_research.models import ARCHITECTURES
from sushi_research.models.header import Header
from sushi_research.models.prediction import Prediction
from sushi_research.user_files import parse_json

# Our names -> the names in the modelspec metadata. Of a flow there is none that programs agree on. SwarmUI's "sd3" is for bases
# alone, where a reader of an adapter file would take it for one of Stable Diffusion 3.
PREDICTION_TYPES = {"epsilon": "epsilon", "v_prediction": "v", "rectified_flow": "rectified_flow"}
CHAIN = "sushi_research.started_from"
THUMBNAIL = "modelspec.thumbnail"
# Programs read the metadata of all files that they show: of the captions, the most frequent tags of each of the largest folders.
MOST_TAGS, MOST_FOLDERS = 1_000, 200
# Of all of them together: a caption without a comma is one tag, of up to 65,536 letters, and programs refuse headers of many MiB.
MOST_LETTERS = 500_000
# Of a file that says that it came from more files, the last ones are kept.
MOST_ANCESTORS = 100
# With lora.metadata minimal, of the entries of `adapter_metadata`: what a program needs to load the file as it was trained, hashes,
# and what the user gave by name.
MINIMAL = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
    "ss_output_name",
    "ss_steps",
    "ss_datasets",
    "modelspec.sai_model_spec",
    "modelspec.architecture",
    "modelspec.implementation",
    "modelspec.title",
    "modelspec.resolution",
    "modelspec.prediction_type",
    "modelspec.trigger_phrase",
    "modelspec.author",
    "modelspec.description",
    "sushi_research.flow_shift",
    "sushi_research.targets",
    "sushi_research.base_hash",
    "sushi_research.dataset_hash",
    "sushi_research.config_hash",
    CHAIN,
)


@dataclass(frozen=True)
class Ancestor:
    """A file that a training started from: its name, `kohya_format.tensors_hash`, and the steps that it says it was trained for."""

    name: str
    hash: str
    steps: int | None


@dataclass(frozen=True)
class Facts:
    """What is said about a file besides the config.

    `base` is the base model's public name, `trained` the Unix times of start and end, `samples` are the training images,
    `started_from` the files that it came from in turn. `is_uniform`: whether all of the UNet's modules have one rank and one alpha,
    and `rank_and_scale` which; None for those of the config.
    """

    architecture: str
    name: str
    base: str
    base_hash: str
    dataset_hash: str
    config_hash: str
    images: int
    steps: int
    epochs: int
    prediction: Prediction
    trained: tuple[float, float]
    samples: Samples = field(default_factory=lambda: Samples.of([]))
    started_from: Sequence[Ancestor] = field(default=())
    is_uniform: bool = True
    rank_and_scale: tuple[int, float] | None = None


def adapter_metadata(config: TrainingConfig, facts: Facts) -> dict[str, str]:
    """The file's metadata, as much of it as `lora.metadata` allows: kohya's `ss_*` keys, the `modelspec.*` keys (version 1.0.1),
    and ours; the picture is added later (kohya_format.add_metadata).

    All values become strings, as the format requires; values that the config does not set are skipped. Our hashes have
    `sushi_research.*` keys, because programs would read `ss_sd_model_hash` as A1111's hash of a checkpoint file.
    """
    if config.lora.metadata == "none":
        return {}
    formats = ARCHITECTURES[facts.architecture].formats()
    lora, resolution = config.lora, config.data.resolution
    words = ", ".join(config.lora.trigger_words) or None
    entries: dict[str, Any] = {
        "ss_v2": False,
        "ss_base_model_version": formats.BASE_VERSION[facts.prediction.type],
        **network_entries(lora, facts.is_uniform, facts.rank_and_scale),
        "ss_output_name": facts.name,
        "ss_sd_model_name": facts.base,
        "ss_resolution": (resolution, resolution),
        "ss_seed": config.train.seed,
        "ss_steps": facts.steps,
        "ss_epoch": facts.epochs,
        "ss_num_train_images": facts.images,
        **_of_samples(sets_of(config)[0].path, facts.samples),
        "ss_datasets": json.dumps([{"subsets": [{"class_tokens": words}]}], ensure_ascii=False) if words else None,
        "ss_learning_rate": config.optimizer.lr,
        "ss_optimizer": config.optimizer.name,
        **loss_entries(config, facts.prediction.type),
        "ss_clip_skip": getattr(config.model, "clip_skip", None),  # only SD1.5 has this setting
        "ss_zero_terminal_snr": facts.prediction.zero_terminal_snr,
        "ss_training_started_at": facts.trained[0],
        "ss_training_finished_at": facts.trained[1],
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": formats.MODELSPEC_ARCHITECTURE,
        "modelspec.implementation": formats.MODELSPEC_IMPLEMENTATION,
        "modelspec.title": facts.name,
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.date": datetime.fromtimestamp(int(facts.trained[1]), UTC).isoformat(),
        "modelspec.prediction_type": PREDICTION_TYPES[facts.prediction.type],
        "modelspec.trigger_phrase": words,
        "modelspec.author": config.lora.author,
        "modelspec.description": config.lora.description,
        "sushi_research.flow_shift": facts.prediction.facts().get("shift"),
        "sushi_research.targets": json.dumps(resolve_targets(lora.targets)),
        "sushi_research.base_hash": facts.base_hash,
        "sushi_research.dataset_hash": facts.dataset_hash,
        "sushi_research.config_hash": facts.config_hash,
        CHAIN: json.dumps([asdict(each) for each in facts.started_from], ensure_ascii=False)
        if facts.started_from
        else None,
    }
    kept = entries if lora.metadata == "full" else {key: entries[key] for key in MINIMAL}
    return {entry: str(value) for entry, value in kept.items() if value is not None}


@lru_cache(maxsize=1)  # a run writes many files with the same samples
def _of_samples(path: str, samples: Samples) -> dict[str, str]:
    """The entries about the training images."""
    found = {"ss_tag_frequency": tag_frequency(path, samples), "ss_dataset_dirs": dataset_dirs(path, samples)}
    return {entry: json.dumps(value, ensure_ascii=False) for entry, value in found.items()}


def tag_frequency(path: str, samples: Samples) -> dict[str, dict[str, int]]:
    """Folder -> tag -> the number of images with it, as kohya's sd-scripts counts: captions are split at commas, in lower case.

    The folder with the most images is the first, because some programs read only that. Tags for which there is no room
    (MOST_LETTERS) are left out, the least frequent ones first.
    """
    found, room = {}, MOST_LETTERS
    for folder, rows in _folders(path, samples):
        captions = compute.utf8_lower(samples.first_captions.take(pyarrow.array(rows)))
        tags = compute.utf8_trim_whitespace(compute.split_pattern(captions, ",").flatten())
        tags, counts = tags.filter(compute.not_equal(tags, "")).value_counts().flatten()
        found[folder] = {}
        order = np.argsort(-counts.to_numpy(), kind="stable")[:MOST_TAGS]
        for tag, count in zip(
            tags.take(pyarrow.array(order)).to_pylist(), counts.to_numpy()[order].tolist(), strict=True
        ):
            if (room := room - len(tag)) < 0:
                break
            found[folder][tag] = count
    return found


def dataset_dirs(path: str, samples: Samples) -> dict[str, dict[str, int]]:
    """Folder -> its repeats and its number of images, as kohya's sd-scripts writes them; of different repeats the most frequent."""
    found = {}
    for folder, rows in _folders(path, samples):
        repeats, counts = np.unique(samples.repeats[rows], return_counts=True)
        found[folder] = {"n_repeats": int(repeats[counts.argmax()]), "img_count": len(rows)}
    return found


def _folders(path: str, samples: Samples) -> list[tuple[str, np.ndarray]]:
    """(name of the folder without those above it, the rows of its images), the most images first; two folders of one name count as
    one."""
    top = posixpath.basename(path.replace("\\", "/").rstrip("/")) or "images"
    paths = compute.replace_substring(samples.names, "\\", "/")
    names = compute.struct_field(compute.extract_regex(paths, r"(?P<folder>[^/]+)/+[^/]*$"), "folder")
    folders = names.fill_null(top).dictionary_encode()
    indices = folders.indices.to_numpy()
    order, ends = np.argsort(indices, kind="stable"), np.cumsum(np.bincount(indices))
    found = zip(folders.dictionary.to_pylist(), np.split(order, ends)[: len(ends)], strict=True)
    return sorted(found, key=lambda each: (-len(each[1]), each[0]))[:MOST_FOLDERS]


def started_from(header: Header) -> tuple[Ancestor, ...]:
    """The files that led to the one with this header, in turn; () if it says nothing of the form that we write."""
    chain = []
    with contextlib.suppress(UserError):
        found = parse_json(header.metadata.get(CHAIN, "[]"), CHAIN)
        for each in found if isinstance(found, list) else ():
            if isinstance(each, dict) and each.keys() == {"name", "hash", "steps"} and isinstance(each["hash"], str):
                steps = each["steps"] if type(each["steps"]) is int else None
                chain.append(Ancestor(str(each["name"])[:200], each["hash"][:64], steps))
    return tuple(chain[-MOST_ANCESTORS:])


def ancestors_of(header: Header, digest: str) -> tuple[Ancestor, ...]:
    """`started_from`, and the file with this header itself. `digest` is `kohya_format.tensors_hash` of it."""
    name, steps = header.metadata.get("ss_output_name") or header.path.stem, header.metadata.get("ss_steps", "")
    known = int(steps) if steps.isascii() and steps.isdecimal() and len(steps) < 10 else None
    return (*started_from(header)[1 - MOST_ANCESTORS :], Ancestor(name[:200], digest, known))


def describe(config: TrainingConfig) -> str:
    """What will be in the adapter files' metadata, for the plan."""
    lora = config.lora
    if lora.metadata == "none":
        return (
            "none: programs tell the base only by the tensors, and evaluate.py cannot tell which images were trained on"
        )
    given: Mapping[str, str | None] = {
        "trigger words": ", ".join(config.lora.trigger_words),
        "author": config.lora.author,
        "description": (config.lora.description or "").partition("\n")[0][:60],
    }
    said = "".join(f"; {what} {text}" for what, text in given.items() if text)
    hashes = f"hashes of the images{' and the names of earlier adapters' if lora.start_from else ''}"
    if lora.metadata == "minimal":
        return f"minimal: the run's name and steps, the kind of base, rank and alpha, {hashes}{said}"
    picture = ", a sample picture" if config.sample.enabled else ""
    return (
        f"full: the words of the captions, names of folders and base, settings{picture} (lora.metadata minimal leaves these "
        f"out), {hashes}{said}"
    )
