"""The noise against the formulas of kohya's sd-scripts with the same random numbers; a sample does not depend on others."""

import math

import pytest
import torch
from torch.nn import functional

from sushi_research.fast.batch import Batch
from sushi_research.objectives.noise import Noise, draw_noise, multires_noise, offset_noise, perturb_input


def batch_of(*names, shape=(4, 16, 24)):
    """A batch of samples with these names; only its random numbers matter."""
    count = len(names)
    return Batch(
        mean=torch.zeros(count, *shape),
        std=torch.zeros(count, *shape),
        text={},
        time_ids=torch.zeros(count, 6),
        loss_weights=torch.ones(count),
        names=names,
        keys=tuple((0, name, 0) for name in names),
        seed=3,
        device=torch.device("cpu"),
        prefetched={},
    )


def pyramid(noise, coarse, ratios, discount):
    """One sample by the text of `pyramid_noise_like`: a loop over levels, torch's own enlarging, one standard deviation."""
    height, width = noise.shape[1:]
    for level, (drawn, ratio) in enumerate(zip(coarse, ratios, strict=True)):
        rows, columns = max(1, int(height / ratio**level)), max(1, int(width / ratio**level))
        enlarged = functional.interpolate(drawn[None, :, :rows, :columns], size=(height, width), mode="bilinear")
        noise = noise + enlarged[0] * discount**level
        if rows == 1 or columns == 1:
            break
    return noise / noise.std()


def test_multires_noise_is_kohyas_for_each_sample():
    generator = torch.Generator().manual_seed(0)
    ratios = 2 + 2 * torch.rand(3, 6, generator=generator)
    ratios[0] = 2.0  # the finest levels that there are
    noise = torch.randn(3, 4, 16, 24, generator=generator)
    coarse = [torch.randn(3, 4, max(1, 16 >> i), max(1, 24 >> i), generator=generator) for i in range(6)]
    found = multires_noise(noise, coarse, ratios, 0.3)
    for sample in range(3):
        expected = pyramid(noise[sample], [each[sample] for each in coarse], ratios[sample].tolist(), 0.3)
        torch.testing.assert_close(found[sample], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.std((1, 2, 3)), torch.ones(3))


def test_noise_offset_moves_whole_channels_by_a_random_share_if_asked_for():
    batch, plain = batch_of("a", "b", "c"), batch_of("a", "b", "c").normal("noise")
    offset = batch.normal("noise_offset", (4,))
    moved = draw_noise(batch, Noise(offset=0.1))
    assert torch.equal(moved, plain + 0.1 * offset[:, :, None, None])
    share = batch.uniform("noise_offset_strength")
    assert len(set(share.tolist())) == 3 and ((share >= 0) & (share < 1)).all()
    random = draw_noise(batch, Noise(offset=0.1, offset_random=True))
    torch.testing.assert_close(random, plain + 0.1 * (share[:, None] * offset)[:, :, None, None])
    assert torch.equal(offset_noise(torch.zeros_like(plain), offset, 1.0)[..., 3, 5], offset)


def test_input_perturbation_is_in_the_input_alone():
    batch = batch_of("a", "b")
    noise = draw_noise(batch, Noise(input_perturbation=0.1))
    assert torch.equal(noise, batch.normal("noise")), "the target's"
    assert perturb_input(noise, batch, Noise()) is noise
    further = (perturb_input(noise, batch, Noise(input_perturbation=0.1)) - noise) / 0.1
    torch.testing.assert_close(further, batch.normal("input_perturbation"), rtol=0, atol=1e-5)
    assert abs(torch.corrcoef(torch.stack([further.flatten(), noise.flatten()]))[0, 1]) < 3 / math.sqrt(3072)


@pytest.mark.parametrize(
    "options", [Noise(offset=0.1, offset_random=True), Noise(multires_iterations=8, offset=0.05), Noise()], ids=str
)
def test_a_sample_s_noise_does_not_depend_on_those_beside_it(options):
    together = perturb_input(draw_noise(batch_of("a", "b"), options), batch_of("a", "b"), options)
    alone = perturb_input(draw_noise(batch_of("b"), options), batch_of("b"), options)
    # The products of matrices may be summed in another order.
    torch.testing.assert_close(together[1:], alone, rtol=1e-6, atol=1e-6)


def test_multires_noise_has_more_of_the_low_frequencies():
    batch = batch_of(*map(str, range(64)))
    plain, multires = draw_noise(batch, Noise()), draw_noise(batch, Noise(multires_iterations=8, multires_discount=0.5))
    means = [each.mean((2, 3)).square().mean().item() for each in (plain, multires)]
    assert means[0] == pytest.approx(1 / 384, rel=0.3) and means[1] > 5 * means[0]
