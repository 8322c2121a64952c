"""The part of a plan about captions: how many texts they make, what these cost, and what is cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute

from sushi_research.caches.inputs import Inputs
from sushi_research.config.text_encoders import is_in_step
from sushi_research.data.run_texts import distinct, plain_captions
from sushi_research.files import size_text
from sushi_research.models import loading
from sushi_research.models.truncation import CHUNK
from sushi_research.runs.job import Job

# Captions that plan.json lists of those that are cut.
MOST_LISTED = 1_000
# As A1111 and ComfyUI weigh a part of a prompt: (tag:1.2).
_WEIGHT = r"\([^()]+:[0-9]+(\.[0-9]+)?\)"
# Bytes of a parameter of the text encoders where they only encode.
_FP32 = 4


@dataclass(frozen=True)
class CaptionPlan:
    """The captions of a run.

    `texts` is the number of distinct texts of the training, None if each use has one that is not known before; `largest` is the
    most of an image. `variants` is K (`RunCaptions.variants`), `is_random` whether it matters, `is_limited` whether an image has
    more uses. `bytes` is what these texts take in the cache. `dropout` are the probabilities of the data sets, `dropped_to` is what
    dropped captions become. `encoders` are the bytes of text encoders that stay in memory, and
    may be trained.

    Captions of more than `chunks` chunks are `cut`; `listed` are the first MOST_LISTED of them with the tokens that each loses, of
    which the most is `worst`. `weighted` captions have prompt weights, `separated` ones the `captions.keep_separator`.
    """

    texts: int | None
    largest: int
    variants: int | None
    is_random: bool
    is_limited: bool
    bytes: int
    dropout: tuple[float, ...]
    dropped_to: str
    encoders: int
    are_trained: bool
    chunks: int
    cut: int
    worst: int
    listed: Mapping[str, int]
    weighted: int
    separated: int

    def to_json(self) -> dict[str, Any]:
        """The part of plan.json; `listed` is a part of its own."""
        return {name: value for name, value in asdict(self).items() if name != "listed"}

    def describe(self) -> list[str]:
        """Lines of the plan; none if every image has one caption that fits."""
        lines = []
        if self.encoders and self.are_trained:
            lines.append(
                "encoded in each step, each use with a text of its own, by the text encoders as they are trained"
            )
        elif self.encoders:
            lines.append(
                f"encoded in each step, each use with a text of its own: the text encoders stay in memory "
                f"({size_text(self.encoders)}), and encode every sample of every step"
            )
        elif self.largest > 1:
            lines.append(self._of_texts())
        if any(self.dropout):
            shares = " or ".join(f"{100 * share:g}%" for share in sorted(set(self.dropout)))
            lines.append(f"{shares} of the uses have {self.dropped_to} instead, by chance")
        if self.weighted:
            lines.append(
                f"{self.weighted} with a weight such as (tag:1.2): brackets and numbers in captions are text, not weights"
            )
        if self.separated:
            lines.append(
                f"{self.separated} with captions.keep_separator, which is text where no tag is moved or dropped"
            )
        if self.cut:
            lines.append(
                f"{self.cut} longer than {self.chunks * (CHUNK + 2)} tokens are cut (the longest loses {self.worst}); a run's "
                "plan.json lists them, and captions.chunks reads more"
            )
        return [f"captions     {line}" for line in lines]

    def _of_texts(self) -> str:
        size = f"{self.texts:,} texts, {size_text(self.bytes)} in the cache"
        if not self.is_random:
            return f"up to {self.largest} lines of an image, in turn: {size}"
        if not self.is_limited:
            return f"a variant for each use, {self.largest} of an image at most: {size}"
        return (
            f"{self.variants} variants of each, which come equally often: {size}; captions.variants sets another number, and "
            "captions.encode while_training makes one for each use"
        )


def caption_plan(job: Job, inputs: Inputs, entry_bytes: int) -> CaptionPlan:
    """The captions of the run; `entry_bytes` are those of a caption's entry with one chunk."""
    config, data = job.config, inputs.data
    captions = data.captions
    texts, in_step = inputs.captions, captions is not None and captions.in_step
    counted = distinct([texts, plain_captions(data)]) if in_step else texts
    chunks = config.captions.chunks
    lost = np.maximum(0, inputs.token_counts(counted) - CHUNK * chunks)
    first = np.flatnonzero(lost)[:MOST_LISTED]
    known = captions is not None and not in_step
    return CaptionPlan(
        texts=len(captions.texts) if known else None,
        largest=captions.largest if known else 1,
        variants=captions.variants if known else None,
        is_random=known and captions.is_random,
        is_limited=known and captions.is_limited,
        bytes=entry_bytes * int(inputs.chunks_of_captions(captions.texts).sum()) if known else 0,
        dropout=tuple(rules.config.dropout for rules in captions.rules) if captions else (),
        dropped_to="zeros" if getattr(config.captions, "dropout_to", "empty") == "zeros" else "the empty caption",
        encoders=encoder_bytes(job, inputs.base) if in_step else 0,
        are_trained=is_in_step(config.text_encoders),
        chunks=chunks,
        cut=int(np.count_nonzero(lost)),
        worst=int(lost.max(initial=0)),
        listed={counted[int(row)].as_py(): int(lost[row]) for row in first},
        weighted=_weighted(counted),
        separated=_count(pyarrow.compute.match_substring(counted, config.captions.keep_separator)),
    )


def _weighted(texts: pyarrow.Array) -> int:
    """How many of the texts have a prompt weight."""
    some = texts.filter(pyarrow.compute.match_substring(texts, ":"))  # ten times as fast as the regular expression
    return _count(pyarrow.compute.match_substring_regex(some, _WEIGHT))


def _count(matches: pyarrow.Array) -> int:
    return int(pyarrow.compute.sum(matches).as_py() or 0)


def encoder_bytes(job: Job, base: loading.Base) -> int:
    """The bytes of the text encoders: in fp32, or in the compute dtype if they are trained."""
    itemsize = job.compute_dtype.itemsize if is_in_step(job.config.text_encoders) else _FP32
    encoders: list[Any] = [loading.empty_text_encoder(base, name) for name in job.model.TEXT_ENCODERS]
    return itemsize * sum(parameter.numel() for encoder in encoders for parameter in encoder.parameters())
