"""The losses against torch's, kohya's formulas, and computations by hand; masks."""

import pytest
import torch
from torch.nn import functional

from sushi_research import objectives
from sushi_research.objectives import Loss, loss_per_sample
from sushi_research.objectives.losses import c_table

TYPES = ("mse", "l1", "huber", "smooth_l1", "pseudo_huber")
SCHEDULES = {
    "diffusion": objectives.diffusion_schedule(),
    "zero terminal SNR": objectives.diffusion_schedule(zero_terminal_snr=True),
    "flow": objectives.flow_schedule(3.0),
}


def test_the_masked_loss_and_its_gradient_are_those_worked_out_by_hand():
    """Two pixels of two channels: errors 1, 2 and 3, 4, weights 1 and 0.25 -> (1 + 4 + (9 + 16) / 4) / (2 * 1.25)."""
    prediction = torch.tensor([[[[1.0, 3.0]], [[2.0, 4.0]]]], requires_grad=True)
    mask = torch.tensor([[[[1.0, 0.25]]]])
    loss = objectives.mse_per_sample(prediction, torch.zeros(1, 2, 1, 2), mask)
    assert loss.tolist() == [11.25 / 2.5]
    loss.sum().backward()
    # 2 w e / sum(w)
    assert torch.equal(prediction.grad, torch.tensor([[[[2.0, 1.5]], [[4.0, 2.0]]]]) / 2.5)


@pytest.mark.parametrize("kind", TYPES)
def test_a_mask_of_ones_is_no_mask_and_a_mask_s_scale_and_area_do_not_matter(kind):
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 3, 4, 8, 6, generator=generator)
    timesteps, loss = torch.tensor([0, 500, 999]), Loss(kind, torch.linspace(1, 0.1, 1000))

    def found(mask, part=slice(None)):
        return loss_per_sample(prediction[:, :, part], target[:, :, part], timesteps, loss, mask)

    # Another order of 192 sums in fp32.
    torch.testing.assert_close(found(torch.ones(3, 1, 8, 6)), found(None))
    torch.testing.assert_close(found(torch.full((3, 1, 8, 6), 0.3)), found(None))
    half = torch.zeros(3, 1, 8, 6)
    half[:, :, :4] = 1
    torch.testing.assert_close(found(half), found(None, slice(4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", TYPES)
def test_a_sample_without_any_weight_has_no_loss_and_no_gradient(kind, dtype):
    prediction = torch.full((1, 4, 2, 2), 3.0, dtype=dtype, requires_grad=True)
    chosen = Loss(kind, torch.full((1000,), 0.1))
    loss = loss_per_sample(prediction, torch.zeros(1, 4, 2, 2), torch.tensor([0]), chosen, torch.zeros(1, 1, 2, 2))
    loss.sum().backward()
    assert loss.tolist() == [0.0] and not prediction.grad.any()


def test_the_losses_and_gradients_are_those_of_torch_and_of_kohyas_formula():
    """c is the sample's own; torch's functions take one c for all."""
    prediction = torch.randn(3, 4, 8, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    target, timesteps = torch.zeros(3, 4, 8, 6), torch.tensor([3, 500, 999])
    table = c_table("exponential", 0.1, SCHEDULES["diffusion"])
    expected = {
        "mse": lambda d, c: d.square(),
        "l1": lambda d, c: d.abs(),
        "huber": lambda d, c: 2 * functional.huber_loss(d, torch.zeros_like(d), delta=c, reduction="none"),
        "smooth_l1": lambda d, c: 2 * functional.smooth_l1_loss(d, torch.zeros_like(d), beta=c, reduction="none"),
        "pseudo_huber": lambda d, c: 2 * c * (torch.sqrt(d**2 + c**2) - c),
    }
    assert expected.keys() == set(TYPES)
    for kind, formula in expected.items():
        found = loss_per_sample(prediction, target, timesteps, Loss(kind, table))
        wanted = torch.stack([formula(d, c).mean() for d, c in zip(prediction, table[timesteps].tolist(), strict=True)])
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(
            *(torch.autograd.grad(each.sum(), prediction, retain_graph=True)[0] for each in (found, wanted))
        )


@pytest.mark.parametrize("kind", ["huber", "pseudo_huber"])
def test_a_large_c_is_mse(kind):
    """With the difference sqrt(d^2 + c^2) - c in fp32, the loss of errors of 0.01 would be 0 at a c of 1000."""
    timesteps = torch.tensor([0])
    for size in (1.0, 0.01):
        prediction = size * torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        for c in (50.0 * size, 1000.0):
            found = loss_per_sample(
                prediction, torch.zeros_like(prediction), timesteps, Loss(kind, torch.full((1000,), c))
            )
            # Of pseudo_huber about d^2 / 4 c^2 is missing.
            torch.testing.assert_close(found, prediction.square().mean((1, 2, 3)), rtol=1e-3, atol=0)


def test_mse_is_that_of_earlier_runs_bit_for_bit():
    prediction = torch.randn(2, 4, 8, 6).bfloat16()
    target = torch.randn(2, 4, 8, 6)
    plain = (prediction.float() - target).square().flatten(1).mean(1)
    assert torch.equal(loss_per_sample(prediction, target, torch.tensor([0, 1]), Loss()), plain)
    assert torch.equal(objectives.mse_per_sample(prediction, target), plain)


@pytest.mark.parametrize("kind", TYPES)
def test_an_error_is_taken_in_float32(kind):
    prediction = torch.full((2, 4, 64, 64), 0.1, dtype=torch.bfloat16, requires_grad=True)
    target = torch.zeros(2, 4, 64, 64)
    target[1] = 1.0
    table = torch.full((1000,), 0.3)
    loss = loss_per_sample(prediction, target, torch.tensor([0, 1]), Loss(kind, table))
    exact = loss_per_sample(prediction.detach().float(), target, torch.tensor([0, 1]), Loss(kind, table))
    assert loss.dtype == torch.float32 and torch.equal(loss, exact)
    loss.sum().backward()
    assert prediction.grad.dtype == torch.bfloat16 and prediction.grad.isfinite().all()


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_c_falls_from_about_one_to_its_smallest_as_in_kohyas_formulas(schedule):
    t = torch.arange(1000)
    exponential = c_table("exponential", 0.1, schedule)
    torch.testing.assert_close(exponential, torch.exp(torch.log(torch.tensor(0.1)) * t / 1000), rtol=1e-5, atol=0)
    by_snr = c_table("snr", 0.1, schedule)
    sigma = schedule.noise / schedule.signal
    torch.testing.assert_close(by_snr, (1 - 0.1) / (1 + sigma) ** 2 + 0.1, rtol=1e-4, atol=0)
    assert by_snr[0] > 0.9 and (by_snr.diff() <= 0).all() and by_snr[-1] < 0.11
    if schedule.snr[-1] == 0:
        assert by_snr[-1].item() == pytest.approx(0.1, rel=1e-6)
    assert torch.equal(c_table("constant", 0.1, schedule), torch.full((1000,), 0.1))
