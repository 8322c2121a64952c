"""The texts of a run: its prompts, and what is encoded as captions. Many texts are Arrow columns."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import pyarrow
import pyarrow.compute

from sushi_research.config import TrainingConfig
from sushi_research.config.prompts import Prompt, as_prompts, read_prompts, texts_of
from sushi_research.data.held_out import DRIFT_CAPTIONS
from sushi_research.data.items import Item
from sushi_research.data.training_data import Data


def prompts_of(config: TrainingConfig, items: Sequence[Item]) -> list[Prompt]:
    """The prompts for sample images: those of the config or of its file, or else the first three distinct captions.

    Raises UserError if the file cannot be used.
    """
    if not config.sample.enabled:
        return []
    if config.sample.prompts_file is not None:
        return read_prompts(config.sample.prompts_file, "sample.prompts_file")
    return as_prompts(config.sample.prompts or _first_captions(items, 3))


def _first_captions(items: Sequence[Item], most: int) -> list[str]:
    """The first distinct captions of the items; the empty one only if there is no other."""
    found: dict[str, None] = {}
    for item in items:
        if item.sample.caption:
            found.setdefault(item.sample.caption)
        if len(found) == most:
            break
    return list(found) or [""] * bool(len(items))


def captions_of(config: TrainingConfig, data: Data) -> pyarrow.Array:
    """Every distinct text that is encoded as a caption: those of the training, then those of measured images, drift captions, "".

    The negative prompt is one of them if pictures are measured, because these are generated from captions as they were trained.
    """
    trained = data.captions.texts if data.captions else plain_captions(data)
    negative = {config.sample.negative_prompt} if config.evaluation.pictures else set()
    others = {"", *(item.sample.caption for item in data.measured), *drift_captions(config, data), *negative}
    return with_others(trained, others)


def with_others(texts: pyarrow.Array, others: Collection[str]) -> pyarrow.Array:
    """Distinct texts and, after them, those of `others` that are not among them, sorted."""
    wanted = pyarrow.array(sorted(set(others)), pyarrow.large_string())
    new = wanted.filter(pyarrow.compute.invert(_among(wanted, texts)))
    return pyarrow.concat_arrays([texts, new]) if len(new) else texts


def _among(few: pyarrow.Array, many: pyarrow.Array) -> pyarrow.Array:
    """Whether each of a few texts is among many, as an Arrow array. The many are not hashed or sorted."""
    found = many.filter(pyarrow.compute.is_in(many, value_set=few))
    return pyarrow.compute.is_in(few, value_set=pyarrow.compute.unique(found))


def plain_captions(data: Data) -> pyarrow.Array:
    """The distinct captions of the training items as they are shown and measured (`Rules.plain`), sorted."""
    return distinct([_trained_captions(data)])


def distinct(parts: Sequence[pyarrow.Array]) -> pyarrow.Array:
    """The distinct texts of Arrow arrays, sorted."""
    found = pyarrow.compute.unique(pyarrow.chunked_array(parts))
    return found.take(pyarrow.compute.sort_indices(found))


def prompt_texts(config: TrainingConfig, prompts: Sequence[Prompt]) -> set[str]:
    """The texts that sample images are generated from: prompts and negative prompts."""
    return {config.sample.negative_prompt, *texts_of(prompts)} if prompts else set()


def drift_captions(config: TrainingConfig, data: Data) -> list[str]:
    """The captions for measuring the drift from the base, in order, without captions that are trained on."""
    if not data.held_out:
        return []
    asked = config.evaluation.drift_captions
    captions = list(dict.fromkeys(DRIFT_CAPTIONS if asked is None else asked))
    wanted = pyarrow.array(captions, pyarrow.large_string())
    return wanted.filter(pyarrow.compute.invert(_among(wanted, _trained_captions(data)))).to_pylist()


def _trained_captions(data: Data) -> pyarrow.Array:
    """The caption of each image that is trained on, as it is shown and measured (`Rules.plain`)."""
    return data.items.used.first_captions
