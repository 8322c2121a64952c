"""The text embeddings of a micro-batch: from the cache, or encoded in the step."""

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

Embedding = dict[str, torch.Tensor]


class BatchText:
    """Gives the embeddings of samples by the captions of the run.

    `encode` encodes a text in the step; None: the cache has it. Dropped captions become the encoded empty caption, or zeros.
    """

    def __init__(
        self,
        captions: RunCaptions,
        caches: Caches,
        encode: Callable[[str], Embedding] | None = None,
        *,
        zeros: bool = False,
    ) -> None:
        self.captions, self.caches, self.zeros = captions, caches, zeros
        self._encode = encode or caches.text

    def __call__(self, samples: Sequence[StepSample]) -> Embedding:
        """`conditioning.batch_text` of the samples' captions in their epochs, float16 on the CPU."""
        return conditioning.batch_text([self._embedding(sample) for sample in samples])

    def _embedding(self, sample: StepSample) -> Embedding:
        if self.captions.is_dropped(sample.index, sample.epoch):
            empty = self.caches.text("")
            return {name: torch.zeros_like(tensor) for name, tensor in empty.items()} if self.zeros else empty
        return self._encode(self.captions.text_of(sample.index, sample.epoch))


def make_batch_text(job: Job, inputs: Inputs, *, zeros: bool = False) -> BatchText:
    """The embeddings of the run's captions. With captions.encode while_training, the text encoders are loaded, and stay in memory.

    They compute in fp32 and their output is rounded to fp16, as for the cache. `zeros`: what dropped captions become.
    """
    captions, caches, model = inputs.data.captions, inputs.caches, job.model
    if captions is None:
        captions = RunCaptions(inputs.data.items)
    if not captions.in_step:
        return BatchText(captions, caches, zeros=zeros)
    text = model.load_text(inputs.base, job.device)

    def encode(caption: str) -> Embedding:
        in_fp32 = lambda each: model.encode_caption(text, each, caches.chunks, **caches.text_settings)  # noqa: E731
        return encoding.in_halves(in_fp32, caption)[0]

    return BatchText(captions, caches, encode, zeros=zeros)
