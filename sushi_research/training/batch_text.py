"""The text of a micro-batch: embeddings from the cache or encoded in the step, or token ids for text encoders that are trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sushi_research import conditioning
from sushi_research.caches import encoding
from sushi_research.caches.caches import Caches
from sushi_research.caches.inputs import Inputs
from sushi_research.data.captions.run_captions import RunCaptions
from sushi_research.runs.job import Job
from sushi_research.training.sampler import StepSample
from sushi_research.training.text_encoders import CACHED, TextEncoders

Embedding = dict[str, torch.Tensor]


class BatchText:
    """Gives the embeddings of samples by the captions of the run.

    `encode` encodes texts in the step; None: the cache has them. Dropped captions become the encoded empty caption, or zeros.
    """

    def __init__(
        self,
        captions: RunCaptions,
        caches: Caches,
        encode: Callable[[list[str]], list[Embedding]] | None = None,
        *,
        zeros: bool = False,
    ) -> None:
        self.captions, self.caches, self.encode, self.zeros = captions, caches, encode, zeros

    def __call__(self, samples: Sequence[StepSample]) -> Embedding:
        """`conditioning.batch_text` of the samples' captions in their epochs, float16 on the CPU."""
        dropped = [self.captions.is_dropped(sample.index, sample.epoch) for sample in samples]
        texts = [self.captions.text_of(sample.index, sample.epoch) for sample in samples]
        if self.encode is None:
            found = [self.caches.text(text) for text in texts]
        else:
            found = self.encode(texts)
        if self.zeros:
            found = [_zeros(each) if is_dropped else each for each, is_dropped in zip(found, dropped, strict=True)]
        return conditioning.batch_text(found)


class BatchTokens:
    """Gives the token ids of samples, for text encoders that are trained (`text_encoders.TextEncoders`).

    `ids` gives those of a text. Dropped captions become the empty one, or zeros instead of their embeddings.
    """

    def __init__(
        self, captions: RunCaptions, ids: Callable[[str], Embedding], *, layout: str, zeros: bool = False
    ) -> None:
        self.captions, self.ids, self.layout, self.zeros = captions, ids, layout, zeros

    def __call__(self, samples: Sequence[StepSample]) -> Embedding:
        """`conditioning.batch_ids` of the samples' captions in their epochs; with `zeros` also "zeros" [B] bool."""
        texts = [self.captions.text_of(sample.index, sample.epoch) for sample in samples]
        batch = conditioning.batch_ids([self.ids(text) for text in texts], self.layout)
        if self.zeros:
            dropped = [self.captions.is_dropped(sample.index, sample.epoch) for sample in samples]
            batch["zeros"] = torch.tensor(dropped)
        return batch


def _zeros(embedding: Embedding) -> Embedding:
    return {name: torch.zeros_like(tensor) for name, tensor in embedding.items()}


def make_batch_text(
    job: Job, inputs: Inputs, encoders: TextEncoders = CACHED, *, zeros: bool = False
) -> BatchText | BatchTokens:
    """The embeddings of the run's captions, or their token ids if `encoders` are trained.

    With captions.encode while_training, the text encoders are loaded, and stay in memory. They compute in fp32 and their output is
    rounded to fp16, as for the cache. `zeros`: what dropped captions become.
    """
    captions, caches, model = inputs.data.captions, inputs.caches, job.model
    if captions is None:
        captions = RunCaptions(inputs.data.items)
    if encoders.components:
        return BatchTokens(captions, encoders.ids, layout=caches.chunks.layout, zeros=zeros)
    if not captions.in_step:
        return BatchText(captions, caches, zeros=zeros)
    text = model.load_text(inputs.base, job.device)
    batch = encoding.text_batch(job.device)

    def encode(texts: list[str]) -> list[Embedding]:
        encoded = model.encode_captions(text, texts, caches.chunks, batch=batch, **caches.text_settings)
        return [encoding.in_halves(tensors, each) for each, (tensors, _) in zip(texts, encoded, strict=True)]

    return BatchText(captions, caches, encode, zeros=zeros)
