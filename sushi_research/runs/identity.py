"""What makes a run that run: every setting and every fact that fixes what is learned.

`MAY_CHANGE` lists the settings that are skipped, each with its reason. `SAME_CONTENT` lists those that only
say where something lies. Every other setting is part of the identity, a new one too.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import posixpath
import re
from typing import Any, NamedTuple

from sushi_research.errors import UserError

# Settings that may change when a run continues.
MAY_CHANGE = {
    "train.steps": "the length of the run; with a schedule that depends on it, a warning says so",
    "train.epochs": "the length of the run; with a schedule that depends on it, a warning says so",
    "train.batch_size": "the samples per step decide: batch_size x accumulation x processes",
    "train.accumulation": "the samples per step decide: batch_size x accumulation x processes",
    "train.precision": "the dtype that it comes to on this machine decides",
    "model.prediction_type": "what the base comes to predict decides",
    "model.zero_terminal_snr": "what the base comes to predict decides",
    "train.gradient_checkpointing": "the same activations, computed twice instead of kept",
    "train.attention": "other kernels for the same result, up to rounding",
    "train.deterministic": "other kernels for the same result, up to rounding",
    "lora.save_dtype": "the dtype of the file that is written, not of the training",
    "data.on_bad_file": "the images and captions in use decide",
    "cache.folder": "a cache holds the same wherever it lies",
    "checkpoint.*": "when to save, not what is learned",
    "sample.*": "pictures do not touch the training",
    "evaluation.path": "evaluating does not touch the training",
    "evaluation.split": "evaluating does not touch the training",
    "evaluation.every": "evaluating does not touch the training",
    "evaluation.noise_samples": "evaluating does not touch the training",
    "evaluation.drift_captions": "evaluating does not touch the training",
    "tracking.*": "where the numbers go",
    "run.*": "where the run folder lies",
    "dry_run": "a dry run trains nothing",
}

# Settings that may change as long as a fact, a hash of what was found there, does not.
SAME_CONTENT = {
    "model.base": "base_model",
    "model.revision": "base_model",
    "model.variant": "base_model",
    "model.vae": "base_model",
    "model.vae_revision": "base_model",
    "model.text_encoders": "base_model",
    "model.tokenizers": "base_model",
    "data.path": "data",
    "data.revision": "data",
    "data.split": "data",
    "data.image_column": "data",
    "data.caption_column": "data",
    "evaluation.held_out": "data",
}

# What is part of the identity besides settings.
FACTS = {
    "global_batch_size": "train.batch_size x train.accumulation x processes",
    "precision": "dtype of the frozen weights, from train.precision, the launcher and the device",
    "data": "hash over every image, caption and repeat count",
    "base_model": "hashes of the base model's weights",
    "prediction": "what the base predicts, where it is not the noise on the usual schedule",
    "random_scheme": "version of the way random numbers are drawn",
    "vae_dtype": "dtype that the VAE encodes in on this device",
    "dropout_split": "batch_size, accumulation and processes, where lora.dropout draws its masks per micro-batch",
}
_FACTS_IN_NAME = ("global_batch_size", "precision")  # known before anything is read

ABSENT = "(not there)"


class ChangedSetting(NamedTuple):
    """A key of two identities with both values; ABSENT where one of them has no such key."""

    key: str
    was: Any
    now: Any


def run_identity(config: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """Every setting and fact that fixes what is learned, flat: `{"lora.rank": 16, "facts.data": "3f..", ...}`.

    `config` is the nested dict of the resolved config, in JSON values. `facts` has keys of FACTS and JSON
    values; a dict is flattened too (`facts.base_model.unet`). For the name alone, global_batch_size and
    precision are enough.
    """
    assert facts.keys() <= FACTS.keys(), facts.keys() - FACTS.keys()
    settings = {key: value for key, value in flatten(config).items() if not _may_change(key)}
    return settings | flatten({"facts": facts})


def default_name(architecture: str, data_path: str, identity: dict[str, Any]) -> str:
    """`<architecture>-<data folder>-<8 hex digits of the identity>`.

    So the same command names the same run and continues it, and another hyperparameter names another run.
    Hashes of the data and the base model stay out: a run whose images changed under it is refused, not
    silently begun again.
    """
    named = {key: value for key, value in identity.items() if not key.startswith("facts.")}
    named |= {f"facts.{fact}": identity[f"facts.{fact}"] for fact in _FACTS_IN_NAME}
    for key in ("data.path", "model.base", "model.vae", "model.text_encoders", "model.tokenizers"):
        if named[key] is not None:  # "photos", "photos/" and "./photos" are one folder
            named[key] = posixpath.normpath(named[key])
    text = json.dumps(named, sort_keys=True, allow_nan=False)
    digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    folder = os.path.basename(os.path.abspath(data_path)).lower()
    slug = re.sub(r"[^a-z0-9]+", "-", folder).strip("-")[:40].rstrip("-")
    return f"{architecture}-{slug or 'data'}-{digest}"


def compare_identity(stored: dict[str, Any], current: dict[str, Any]) -> list[ChangedSetting]:
    """The keys in which two identities differ, sorted; another place of the same content is no difference."""
    differences = []
    for key in sorted(stored.keys() | current.keys()):
        was, now = stored.get(key, ABSENT), current.get(key, ABSENT)
        same_content = key in SAME_CONTENT and _fact(stored, key) == _fact(current, key) != {}
        if was != now and not same_content:
            differences.append(ChangedSetting(key, was, now))
    return differences


def require_same_run(name: str, stored: dict[str, Any], current: dict[str, Any]) -> None:
    """Raises UserError, naming every key that differs and both values, unless the identities are of one run."""
    differences = compare_identity(stored, current)
    if differences:
        changes = "; ".join(f"{_title(key)} was {_show(was)}, is now {_show(now)}" for key, was, now in differences)
        raise UserError(
            f"the run {name} was started with other settings: {changes}; "
            "give this one another --run.name, or restore what it was started with to continue"
        )


def depends_on_length(identity: dict[str, Any]) -> bool:
    """Whether the learning rate at a step depends on the number of steps: all but the constant schedules, and a
    warm-up that is a fraction of the run."""
    name, warmup = identity["schedule.name"], identity["schedule.warmup"]
    if name == "constant_with_warmup":
        return isinstance(warmup, float) and warmup > 0
    return name != "constant"


def _may_change(key: str) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in MAY_CHANGE)


def _fact(identity: dict[str, Any], key: str) -> dict[str, Any]:
    """The values of the fact that stands for the setting `key`."""
    prefix = f"facts.{SAME_CONTENT[key]}."
    return {other: value for other, value in identity.items() if f"{other}.".startswith(prefix)}


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _title(key: str) -> str:
    """The key as the user knows it; a fact with what it means."""
    if not key.startswith("facts."):
        return key
    name = key.removeprefix("facts.")
    return f"{name} ({FACTS[name.split('.')[0]]})"


def _show(value: Any) -> str:
    return value if value == ABSENT else json.dumps(value, ensure_ascii=False)
