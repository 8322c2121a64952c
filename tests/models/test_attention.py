"""The order of attention kernels: what it computes, and what is refused before anything is encoded."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from sushi_research.errors import UserError
from sushi_research.models import loading
from sushi_research.models.attention import OrderedAttention, require_order

CPU = torch.device("cpu")


@pytest.fixture
def base(bases):
    return loading.resolve_base(str(bases["sd15"]))


def predict(unet, mask=None):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 77, unet.config.cross_attention_dim, generator=generator)
    noisy = torch.randn(1, 4, 8, 8, generator=generator)
    return unet(noisy, torch.tensor([500]), hidden, encoder_attention_mask=mask, return_dict=False)[0]


def test_an_order_computes_the_same_attention_with_the_kernels_it_names(base, monkeypatch):
    plain, ordered = (loading.load_unet(base, torch.float32, CPU, each) for each in ("sdpa", ["math"]))
    seen, attend = [], torch.nn.functional.scaled_dot_product_attention

    def watch(*arguments, **options):
        seen.append(_cur_sdpa_kernel_backends())
        return attend(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    mask = torch.arange(77)[None] < 60
    for each in (None, mask):
        torch.testing.assert_close(predict(ordered, each), predict(plain, each), rtol=1e-4, atol=1e-4)
    attentions = len(ordered.attn_processors)
    assert all(isinstance(each, OrderedAttention) for each in ordered.attn_processors.values())
    assert seen[:attentions] == [[SDPBackend.MATH]] * attentions
    assert len(seen[attentions]) > 1, "the order holds for its own UNet alone"
    assert len(_cur_sdpa_kernel_backends()) > 1


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("order", [["math"], ["cudnn", "math"], ["flash", "efficient", "math"]])
def test_an_order_with_math_always_runs(base, order, masked):
    require_order(order, loading.empty_unet(base), torch.float32, CPU, masked=masked)


@pytest.mark.parametrize("order", [["cudnn"], ["cudnn", "efficient"]])
def test_an_order_of_which_nothing_runs_is_one_sentence(base, order):
    with pytest.raises(
        UserError, match=rf"no kernel of train.attention \[{', '.join(order)}\] computes float32 attention"
    ):
        require_order(order, loading.empty_unet(base), torch.float32, CPU, masked=False)
