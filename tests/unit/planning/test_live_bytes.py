"""The bytes that are alive at once, on real tensors and on fake ones."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sushi_research.planning.live_bytes import LiveBytes

KIB = 1024


def block(count: int = 1) -> torch.Tensor:
    return torch.zeros(count * KIB // 4)


@pytest.fixture(params=["real", "fake"], autouse=True)
def tensors(request):
    with FakeTensorMode() if request.param == "fake" else contextlib.nullcontext():
        yield


def test_a_storage_counts_from_its_operator_until_it_is_freed():
    weights = block(4)
    with LiveBytes([weights, weights[:10]]) as bytes_:
        assert bytes_.live == bytes_.peak == 4 * KIB, "a view is no storage of its own"
        one = block() + block()  # three blocks for a moment
        assert (bytes_.live, bytes_.peak) == (5 * KIB, 7 * KIB)
        part = one[:10]
        del one
        assert bytes_.live == 5 * KIB, "the view keeps it alive"
        del part
        assert bytes_.live == 4 * KIB
        bytes_.peak = bytes_.live
        block(2)
        weights.add_(1)
        assert (bytes_.live, bytes_.peak) == (4 * KIB, 6 * KIB)


def test_what_autograd_keeps_is_alive_until_the_backward_pass():
    inputs, weight = block(), block().requires_grad_()
    with LiveBytes([inputs, weight]) as bytes_:
        hidden = (inputs * weight).exp()  # exp keeps its result; the product of fixed inputs keeps nothing new
        loss = (hidden * hidden).sum()
        del hidden
        assert bytes_.live == 3 * KIB + loss.nbytes
        loss.backward()
        del loss
        assert bytes_.live == 3 * KIB, "the inputs, the weight and its gradient"
        assert bytes_.peak >= 5 * KIB
