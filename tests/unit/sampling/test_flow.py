"""Pictures of a rectified flow equal those of an Euler loop that is written out here."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sushi_research.errors import UserError
from sushi_research.models import loading, sd15, sdxl
from sushi_research.models.prediction import Prediction
from sushi_research.sampling.pipeline import generate_latents, sampling_scheduler, unconditional

CPU = torch.device("cpu")
MODELS = {"sd15": sd15, "sdxl": sdxl}
STEPS, GUIDANCE, SIZE = 4, 3.0, (48, 64)


def flow(shift=1.0):
    return Prediction("rectified_flow", shift=shift)


def sigmas_of(steps, shift):
    """[steps + 1] float64: equal parts from 1 to 0, shifted (arXiv 2403.03206, equation 23)."""
    u = np.linspace(1, 0, steps + 1)
    return shift * u / (1 + (shift - 1) * u)


def test_the_noise_levels_are_equal_parts_that_are_shifted_once():
    for shift in (1.0, 3.0, 0.5):
        for steps in (1, 2, 25, 61, 1000):
            made = sampling_scheduler({}, flow(shift), steps)
            right = sigmas_of(steps, shift)
            assert made.sigmas.dtype == made.timesteps.dtype == torch.float32
            np.testing.assert_allclose(made.sigmas, right, rtol=1e-6)
            np.testing.assert_allclose(made.timesteps, 1000 * right[:-1], rtol=1e-6)  # not rounded to a whole number
            assert made.sigmas[0] == 1 and made.sigmas[-1] == 0
    with pytest.raises(UserError, match="cannot be sampled in 1001 steps"):
        sampling_scheduler({}, flow(), 1001)


def test_the_spacing_of_the_base_s_config_does_not_matter():
    config = {"_class_name": "UniPCMultistepScheduler", "flow_shift": 9.0, "timestep_spacing": "leading"}
    assert torch.equal(sampling_scheduler(config, flow(3.0), 7).sigmas, sampling_scheduler({}, flow(3.0), 7).sigmas)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_perfect_flow_arrives_from_any_number_of_steps(dtype):
    """Its velocity is the same along the line, so that even one step arrives."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    for steps in (1, 20):
        scheduler = sampling_scheduler({}, flow(3.0), steps)
        latents = (noise * scheduler.init_noise_sigma).to(dtype)
        for timestep in scheduler.timesteps:
            assert scheduler.scale_model_input(latents, timestep) is latents
            latents = scheduler.step((noise - x0).to(dtype), timestep, latents).prev_sample
        assert latents.dtype == dtype
        # bf16 has 8 bits and is rounded after each step: 0.016 at 4.
        torch.testing.assert_close(latents.float(), x0, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)


def test_pictures_equal_an_euler_loop(base_folder, architecture):
    """With classifier-free guidance (arXiv 2207.12598), one sample at a time."""
    model, shift = MODELS[architecture], 2.5
    base = loading.resolve_base(str(base_folder))
    text = model.load_text(base, CPU)
    prompt, negative = model.encode_caption(text, "a salmon nigiri")[0], model.encode_caption(text, "blurry")[0]
    unet = loading.load_unet(base, torch.float32, CPU)
    said = SimpleNamespace(prediction=flow(shift), scheduler=base.scheduler)
    settings = {"seeds": [7], "steps": STEPS, "guidance": GUIDANCE, "height": SIZE[0], "width": SIZE[1]}
    [found] = generate_latents(model, said, unet, [prompt], negative, **settings)

    def velocity(latents, sigma, encoded):
        added = {"text_embeds": encoded["pooled"][None].float()} if "pooled" in encoded else {}
        added |= {"time_ids": torch.tensor([[*SIZE, 0, 0, *SIZE]], dtype=torch.float32)} if added else {}
        time = torch.tensor([1000 * sigma], dtype=torch.float32)
        return unet(latents, time, encoded["hidden"][None].float(), added_cond_kwargs=added, return_dict=False)[0]

    latents = torch.randn(1, 4, SIZE[0] // 8, SIZE[1] // 8, generator=torch.Generator().manual_seed(7))
    sigmas = sigmas_of(STEPS, shift)
    with torch.no_grad():
        for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
            with_text, without = (velocity(latents, sigma, encoded) for encoded in (prompt, negative))
            latents = latents + (following - sigma) * (without + GUIDANCE * (with_text - without))
    # The pipeline computes both of the guidance in one batch. Seen: equal to 1e-6.
    torch.testing.assert_close(found, latents, rtol=0, atol=1e-5)
    said.prediction = flow(1.0)
    [other] = generate_latents(model, said, unet, [prompt], negative, **settings)
    assert (other - latents).abs().max() > 1e-3, "the comparison would notice another shift"
    empty = unconditional(negative, force_zeros=True)
    assert not torch.equal(next(generate_latents(model, said, unet, [prompt], empty, **settings)), other)
