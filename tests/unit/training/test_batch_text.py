"""The embeddings of a micro-batch: dropped captions, and encoding in the step."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sushi_research.config.captions import CaptionRules
from sushi_research.data.buckets import BucketRule
from sushi_research.data.captions.rules import Rules
from sushi_research.data.captions.run_captions import RunCaptions
from sushi_research.data.items import make_items
from sushi_research.data.samples import Sample
from sushi_research.training.batch_text import BatchText
from sushi_research.training.sampler import StepSample

RULE = BucketRule(resolution=64, step=32, min_side=32, max_side=128)


def embedding(text):
    """Two tokens per letter; "" has two."""
    return {
        "hidden": torch.full((2 * max(1, len(text)), 3), 1.0 + len(text)),
        "pooled": torch.full((2,), 1.0 + len(text)),
    }


@pytest.fixture
def captions():
    samples = [Sample(f"{n}.png", f"{n:032x}", "abc"[: 1 + n], 64, 64, 1, bytes) for n in range(3)]
    return RunCaptions(make_items(samples, RULE)[0], (Rules(CaptionRules(dropout=0.5)),))


def test_dropped_captions_are_the_empty_one_or_zeros(captions):
    samples = [StepSample(index, epoch) for epoch in range(4) for index in range(3)]
    dropped = np.array([captions.is_dropped(sample.index, sample.epoch) for sample in samples])
    assert 0 < dropped.sum() < 12
    cache = SimpleNamespace(text=embedding)
    empty, zeros = (BatchText(captions, cache, zeros=zeros)(samples) for zeros in (False, True))
    lengths = np.where(dropped, 2, [2 * (1 + sample.index) for sample in samples])
    for batch, value in ((empty, 1.0), (zeros, 0.0)):
        assert batch["mask"].sum(1).tolist() == lengths.tolist()
        assert (batch["pooled"][dropped] == value).all() and (batch["pooled"][~dropped] >= 2).all()
        assert (batch["hidden"][dropped][:, :2] == value).all()
    assert (zeros["hidden"][~dropped] == empty["hidden"][~dropped]).all()


def test_texts_of_the_step_are_encoded_together(captions):
    asked = []
    encode = lambda texts: [*map(embedding, texts)] if asked.append(texts) is None else []  # noqa: E731
    found = BatchText(captions, None, encode)([StepSample(index, 0) for index in range(3)])
    assert asked == [[captions.text_of(index, 0) for index in range(3)]] and len(found["pooled"]) == 3
