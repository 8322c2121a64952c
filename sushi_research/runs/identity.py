"""The identity of a run: every setting and every fact that determines what is learned.

`MAY_CHANGE` lists the settings that are not part of it, each with its reason. `SAME_CONTENT` lists settings that only
give a location. Every other setting is part of the identity, including any that is added later.

Identities of other versions are compared by these rules:

- A setting that the older version did not have has its default: the default of a new key must be what the suite did before.
- A setting that was renamed counts under its new name (config/renamed_keys.py), and one that may change by now does not count.
- A setting that this version does not have is a difference, because it cannot be applied.
- A fact that only one of the two has is a difference, because nothing says what the other would have found. So a new fact must be
  recorded only where it applies, as `prediction` and `dropout_split` are, or it stops the older runs.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import posixpath
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from sushi_research.config.renamed_keys import with_new_names
from sushi_research.errors import UserError

# Settings that may change when a run continues.
MAY_CHANGE = {
    "train.steps": "the length of the run; with a schedule that depends on it, a warning says so",
    "train.epochs": "the length of the run; with a schedule that depends on it, a warning says so",
    "train.batch_size": "covered by global_batch_size: batch_size x accumulation x processes",
    "train.accumulation": "covered by global_batch_size: batch_size x accumulation x processes",
    "train.precision": "covered by the resolved dtype on this machine",
    "model.prediction_type": "covered by the resolved prediction of the base",
    "model.zero_terminal_snr": "covered by the resolved prediction of the base",
    "model.flow_shift": "covered by the resolved prediction of the base",
    "train.gradient_checkpointing": "the same activations, recomputed instead of stored",
    "train.memory": "covered by global_batch_size, like what it chooses",
    "train.attention": "different kernels, same result up to rounding",
    "train.record_step": "the same kernels, launched in another way",
    "train.deterministic": "different kernels, same result up to rounding",
    "lora.save_dtype": "the dtype of the adapter file, not of the training",
    "lora.metadata": "what the adapter file says about itself",
    "lora.trigger_words": "what the adapter file says about itself",
    "lora.author": "what the adapter file says about itself",
    "lora.description": "what the adapter file says about itself",
    "data.on_bad_file": "covered by the hash of the images and captions in use",
    "captions.variants": "covered by the number of variants that the run has",
    "captions.encode": "the same embeddings, made at another time",
    "captions.tag_categories.*.file": "covered by the hash of the texts, which has the tags",
    "cache.folder": "the content of a cache does not depend on its location",
    "checkpoint.*": "when to save, not what is learned",
    "ema.every": "which snapshots are kept, not what is averaged",
    "sample.*": "sampling does not affect the training",
    "evaluation.path": "evaluation does not affect the training",
    "evaluation.split": "evaluation does not affect the training",
    "evaluation.every": "evaluation does not affect the training",
    "evaluation.noise_samples": "evaluation does not affect the training",
    "evaluation.drift_captions": "evaluation does not affect the training",
    "evaluation.pictures": "evaluation does not affect the training",
    "evaluation.keep_best": "which files are kept, not what is learned",
    "tracking.*": "where the metrics are sent",
    "run.*": "where the run folder is",
    "dry_run": "a dry run trains nothing",
}

# Settings that may change as long as this fact, a hash of the content found there, stays the same.
SAME_CONTENT = {
    "model.base": "base_model",
    "model.revision": "base_model",
    "model.variant": "base_model",
    "model.vae": "base_model",
    "model.vae_revision": "base_model",
    "model.text_encoders": "base_model",
    "model.tokenizers": "base_model",
    "lora.start_from": "start_from",
    "data.path": "data",
    "data.revision": "data",
    "data.split": "data",
    "data.image_column": "data",
    "data.caption_column": "data",
    "data.crop_column": "data",
    "masks.folder": "data",
    "masks.column": "data",
    "captions.source": "data",
    "captions.allow_empty": "data",
    "captions.lines": "data",
    "evaluation.held_out": "data",
    "evaluation.prior_path": "data",
}

# The same of each entry of data.sets, and of its masks and captions, whose files of tags facts.captions covers.
_LOCATIONS_OF_SET = ("path", "revision", "split", "image_column", "caption_column", "crop_column")
_LOCATIONS_OF_MASKS = ("folder", "column")
_LOCATIONS_OF_CAPTIONS = ("source", "allow_empty", "lines")

# The facts that are part of the identity in addition to settings.
FACTS = {
    "global_batch_size": "train.batch_size x train.accumulation x processes",
    "precision": "dtype of the frozen weights, resolved from train.precision, the launcher and the device",
    "data": "hash over every image, caption, crop and repeat count, in each set",
    "captions": "hash of the captions and their rules, and the number of variants, where an image has more than one text",
    "base_model": "hashes of the base model's weights",
    "start_from": "hash of the tensors of the adapter file that the run starts from, with lora.start_from",
    "prediction": "prediction type and schedule of the base, if not epsilon on the standard schedule",
    "random_scheme": "version of the random number scheme",
    "vae_dtype": "dtype in which the VAE encodes on this device",
    "dropout_split": "batch_size, accumulation and processes, if the adapter has dropout (its masks depend on the micro-batch)",
}
_FACTS_IN_NAME = ("global_batch_size", "precision")  # known before any file is read

ABSENT = "(not there)"


class ChangedSetting(NamedTuple):
    """A key that differs between two identities, with both values; ABSENT for an identity without the key."""

    key: str
    was: Any
    now: Any


def run_identity(config: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """Every setting and fact that determines what is learned, flat: `{"lora.rank": 16, "facts.data": "3f..", ...}`.

    `config` is the resolved config as a nested dict of JSON values. `facts` has keys of FACTS and JSON values; nested
    dicts are flattened too (`facts.base_model.unet`). For `default_name`, global_batch_size and precision are enough.
    """
    assert facts.keys() <= FACTS.keys(), facts.keys() - FACTS.keys()
    settings = {key: value for key, value in flatten(config).items() if not _may_change(key)}
    return settings | flatten({"facts": facts})


def default_name(
    architecture: str, data_path: str, identity: dict[str, Any], defaults: Mapping[str, Any] | None = None
) -> str:
    """`<architecture>-<data folder>-<8 hex digits>`, a hash of the settings that are not at their default in `defaults`.

    The same command thus gives the same name and continues the run; a changed hyperparameter gives a new name, and a key that a
    later version adds does not. Hashes of the data and the base model are not part of the name, so a run whose images changed is
    refused instead of silently started again under another name.
    """
    at_default = {key for key, value in (defaults or {}).items() if identity.get(key, ABSENT) == value}
    named = {key: value for key, value in identity.items() if not key.startswith("facts.") and key not in at_default}
    named |= {f"facts.{fact}": identity[f"facts.{fact}"] for fact in _FACTS_IN_NAME}
    if named.get("data.sets"):
        named["data.sets"] = [each | {"path": posixpath.normpath(each["path"])} for each in named["data.sets"]]
    for key in ("data.path", "model.base", "model.vae", "model.text_encoders", "model.tokenizers", "lora.start_from"):
        if named.get(key) is not None:  # "photos", "photos/" and "./photos" are one folder
            named[key] = posixpath.normpath(named[key])
    text = json.dumps(named, sort_keys=True, allow_nan=False)
    digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    folder = os.path.basename(os.path.abspath(data_path)).lower()
    slug = re.sub(r"[^a-z0-9]+", "-", folder).strip("-")[:40].rstrip("-")
    return f"{architecture}-{slug or 'data'}-{digest}"


def in_this_version(stored: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """An identity that an older version may have stored, in the keys of this one (the rules at the top of this file).

    `defaults` is the default of each setting (`keys.default_values` of the config class).
    """
    found = flat_defaults(defaults) | with_new_names(stored)
    return {key: value for key, value in found.items() if not _may_change(key)}


def compare_identity(stored: dict[str, Any], current: dict[str, Any]) -> list[ChangedSetting]:
    """The keys in which two identities differ, sorted. A new location of the same content is not a difference."""
    differences = []
    for key in sorted(stored.keys() | current.keys()):
        was, now = stored.get(key, ABSENT), current.get(key, ABSENT)
        same_content = key in SAME_CONTENT and _fact(stored, key) == _fact(current, key) != {}
        if key == "data.sets" and stored.get("facts.data") == current.get("facts.data") is not None:
            same_content = _settings_of_sets(was) == _settings_of_sets(now)
        if was != now and not same_content:
            differences.append(ChangedSetting(key, was, now))
    return differences


def changed_settings(
    stored: dict[str, Any], config: dict[str, Any], defaults: Mapping[str, Any]
) -> list[ChangedSetting]:
    """The settings in which a stored identity differs from a resolved config, sorted. Facts are not looked at.

    With lora.start_from, kind, rank, alpha and targets follow from the file; null in the config then stands for any.
    """
    settings = run_identity(config, {})
    stored = {key: value for key, value in in_this_version(stored, defaults).items() if not key.startswith("facts.")}
    of_file = [key for key in ("lora.kind", "lora.rank", "lora.alpha", "lora.targets") if settings[key] is None]
    return compare_identity(stored, settings | {key: stored.get(key) for key in of_file})


def without_locations(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity without the settings that give only a location of content whose hash it has."""
    kept = {key: value for key, value in identity.items() if key not in SAME_CONTENT or not _fact(identity, key)}
    return kept | ({"data.sets": _settings_of_sets(kept["data.sets"])} if kept.get("data.sets") else {})


def _settings_of_sets(sets: Any) -> Any:
    """The value of data.sets without locations: [] for a single set without settings of its own, which is a data.path."""
    if not isinstance(sets, list):
        return sets
    found = [{key: value for key, value in each.items() if key not in _LOCATIONS_OF_SET} for each in sets]
    for each in found:
        if "masks" in each:
            each["masks"] = {key: value for key, value in each["masks"].items() if key not in _LOCATIONS_OF_MASKS}
        if "captions" in each:
            captions = {key: value for key, value in each["captions"].items() if key not in _LOCATIONS_OF_CAPTIONS}
            categories = captions.get("tag_categories") or {}
            rates = {name: {k: v for k, v in category.items() if k != "file"} for name, category in categories.items()}
            each["captions"] = captions | ({"tag_categories": rates} if categories else {})
    return [] if found == [{}] else found


def require_same_run(name: str, stored: dict[str, Any], current: dict[str, Any]) -> None:
    """Raises UserError, with every differing key and both values, unless the identities are equal."""
    differences = compare_identity(stored, current)
    if differences:
        changes = "; ".join(describe(change) for change in differences)
        raise UserError(
            f"the run {name} was started with other settings: {changes}; "
            "give another --run.name, or restore the earlier settings to continue"
        )


def describe(change: ChangedSetting) -> str:
    """A differing key with both values: "lora.rank was 16, is now 8"."""
    key, was, now = change
    is_entry = key.count(".") > 1  # of a free-form mapping, such as optimizer.kwargs, which every version has
    if now == ABSENT and not key.startswith("facts.") and not is_entry:
        return f"{key} was {_show(was)}, and this version has no such setting"
    return f"{_title(key)} was {_show(was)}, is now {_show(now)}"


def depends_on_length(identity: dict[str, Any]) -> bool:
    """Whether the learning rate at a step depends on the run length (`length_setting`)."""
    return length_setting(identity) is not None


def length_setting(identity: Mapping[str, Any]) -> str | None:
    """The setting by which the learning rate at a step depends on the run length, with its value; None if it does not.

    That is any schedule but constant and inverse_sqrt, and a warm-up or a training of the text encoders for a fraction of the run.
    One in steps or epochs is not.
    """
    name, warmup, until = (identity.get(key) for key in ("schedule.name", "schedule.warmup", "text_encoders.until"))
    is_endless = name in ("constant_with_warmup", "inverse_sqrt") and not (isinstance(warmup, float) and warmup > 0)
    if name != "constant" and not is_endless:
        return f"schedule.name {name}"
    is_in_step = identity.get("text_encoders.train") or identity.get("text_encoders.new_tokens")
    if is_in_step and isinstance(until, float):
        return f"text_encoders.until {until}"
    return None


def _may_change(key: str) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in MAY_CHANGE)


def flat_defaults(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults as an identity has them: a free-form mapping by its entries."""
    return {key: value for name, value in defaults.items() for key, value in flatten({name: value}).items()}


def _fact(identity: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The values of the fact that replaces the setting `key`."""
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
    """The key as the user knows it; a fact is followed by its description."""
    if not key.startswith("facts."):
        return key
    name = key.removeprefix("facts.")
    return f"{name} ({FACTS.get(name.split('.')[0], 'a fact of another version')})"


def _show(value: Any) -> str:
    return value if value == ABSENT else json.dumps(value, ensure_ascii=False)
