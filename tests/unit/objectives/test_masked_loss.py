"""The masked loss against a computation by hand, and the target of prior preservation."""

import pytest
import torch

from sushi_research import objectives


def test_the_masked_loss_and_its_gradient_are_those_worked_out_by_hand():
    """Two pixels of two channels: errors 1, 2 and 3, 4, weights 1 and 0.25 -> (1 + 4 + (9 + 16) / 4) / (2 * 1.25)."""
    prediction = torch.tensor([[[[1.0, 3.0]], [[2.0, 4.0]]]], requires_grad=True)
    mask = torch.tensor([[[[1.0, 0.25]]]])
    loss = objectives.mse_per_sample(prediction, torch.zeros(1, 2, 1, 2), mask)
    assert loss.tolist() == [11.25 / 2.5]
    loss.sum().backward()
    # 2 w e / sum(w)
    assert torch.equal(prediction.grad, torch.tensor([[[[2.0, 1.5]], [[4.0, 2.0]]]]) / 2.5)


def test_a_mask_of_ones_is_no_mask_and_a_mask_s_scale_and_area_do_not_matter():
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 3, 4, 8, 6, generator=generator)
    plain = objectives.mse_per_sample(prediction, target)
    # Another order of 192 sums in fp32.
    torch.testing.assert_close(objectives.mse_per_sample(prediction, target, torch.ones(3, 1, 8, 6)), plain)
    torch.testing.assert_close(objectives.mse_per_sample(prediction, target, torch.full((3, 1, 8, 6), 0.3)), plain)
    half = torch.zeros(3, 1, 8, 6)
    half[:, :, :4] = 1
    expected = objectives.mse_per_sample(prediction[:, :, :4], target[:, :, :4])
    torch.testing.assert_close(objectives.mse_per_sample(prediction, target, half), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sample_without_any_weight_has_no_loss_and_no_gradient(dtype):
    prediction = torch.full((1, 4, 2, 2), 3.0, dtype=dtype, requires_grad=True)
    loss = objectives.mse_per_sample(prediction, torch.zeros(1, 4, 2, 2), torch.zeros(1, 1, 2, 2))
    loss.sum().backward()
    assert loss.tolist() == [0.0] and not prediction.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_prior_target_is_the_bases_prediction_where_it_is_asked_for(dtype):
    target, of_base = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2).to(dtype)
    found = objectives.prior_target(target, of_base, torch.tensor([True, False, True]))
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.stack([of_base[0].float(), target[1], of_base[2].float()]))
