"""Pictures from cached text equal those of diffusers' own pipeline, called as anybody would call it."""

import functools
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from sushi_research import objectives
from sushi_research.config.other_scripts import SamplingConfig
from sushi_research.config.outputs import SampleSection
from sushi_research.errors import UserError
from sushi_research.models import loading, sd15, sdxl
from sushi_research.models.prediction import Prediction
from sushi_research.sampling.pipeline import decode, generate_latents, sampling_scheduler, unconditional

CPU = torch.device("cpu")
MODELS = {"sd15": sd15, "sdxl": sdxl}
PROMPTS, SEEDS = ["a salmon nigiri", "tuna " * 10], [0, 7]
SETTINGS = {"steps": 3, "guidance": 4.0, "height": 48, "width": 64}


# What SD1.5's repository says of its scheduler, which is of another class.
CONFIG = {
    "_class_name": "PNDMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
EPSILON, V, ZERO = Prediction(), Prediction("v_prediction"), Prediction("v_prediction", zero_terminal_snr=True)
PREDICTIONS = pytest.mark.parametrize("prediction", [EPSILON, V, ZERO], ids=Prediction.describe)


def oracle(x0, prediction):
    """A perfect model of the one picture x0: of x_t at timestep t it gives the very target that training would set."""
    schedule = objectives.make_schedule(prediction)

    def predict(noisy, timestep):
        timesteps = timestep.long().expand(len(noisy))
        signal, strength = (table[timesteps].view(-1, 1, 1, 1) for table in (schedule.signal, schedule.noise))
        noise = (noisy.float() - signal * x0) / strength  # DDPM equation 4 for eps
        return objectives.target(x0, noise, timesteps, schedule, prediction.type).to(noisy.dtype)

    return predict


def errors(taken_for, prediction, dtype=torch.float32, steps=20):
    """The largest error of each step's guess at x0, and of the result, when the oracle's `prediction` is `taken_for` another."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    scheduler, predict = sampling_scheduler(CONFIG, taken_for, steps), oracle(x0, prediction)
    scheduler.set_timesteps(steps)
    latents, found = (noise * scheduler.init_noise_sigma).to(dtype), []
    for timestep in scheduler.timesteps:
        step = scheduler.step(predict(scheduler.scale_model_input(latents, timestep), timestep), timestep, latents)
        latents = step.prev_sample
        assert latents.dtype == dtype and torch.isfinite(latents).all()
        found.append((step.pred_original_sample - x0).abs().max().item())
    return found, (latents.float() - x0).abs().max().item()


@PREDICTIONS
def test_the_sampler_undoes_what_training_aims_at(prediction):
    guesses, result = errors(prediction, prediction)
    # In place of abar = 0 diffusers puts 2^-24, a signal of 1/4096 of the noise: its first guess is off by that.
    assert guesses[0] < (2e-3 if prediction.zero_terminal_snr else 1e-5)
    assert max(guesses[1:]) < 1e-5  # fp32; seen: 4e-6
    assert result < 1e-6


def test_a_base_taken_for_another_kind_shows():
    for prediction, taken_for in itertools.permutations((EPSILON, V, ZERO), 2):
        assert errors(taken_for, prediction)[0][0] > 0.1, (prediction, taken_for)


@PREDICTIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_arrives_too(prediction, dtype):
    # The first latents are 4,096 times the noise where it is alone: fp16 ends at 65,504. bf16 has 8 bits: 0.016 at 4.
    assert errors(prediction, prediction, dtype)[1] < 0.02


@PREDICTIONS
def test_the_scheduler_is_the_base_s_with_what_it_predicts(prediction):
    for spacing in ("leading", "linspace", "trailing"):
        assert_scheduler(prediction, spacing)


def assert_scheduler(prediction, spacing):
    config = CONFIG | {"timestep_spacing": spacing, "prediction_type": "sample", "rescale_betas_zero_snr": True}
    kept = dict(config)
    made = sampling_scheduler(config, prediction, 20)
    assert config == kept
    assert (made.config.prediction_type, made.config.rescale_betas_zero_snr) == (
        prediction.type,
        prediction.zero_terminal_snr,
    )
    assert made.config.timestep_spacing == ("trailing" if prediction.zero_terminal_snr else spacing)
    assert (made.config.beta_start, made.config.steps_offset) == (0.00085, 1)
    if prediction.zero_terminal_snr:
        assert made.timesteps[0] == 999 and made.init_noise_sigma == pytest.approx(4096, rel=1e-6)


def test_the_scheduler_of_a_base_that_predicts_the_noise_is_diffusers_own(base_folder):
    from diffusers import EulerDiscreteScheduler

    right = EulerDiscreteScheduler.from_pretrained(base_folder / "scheduler")
    config = json.loads((base_folder / "scheduler/scheduler_config.json").read_text())
    made = sampling_scheduler(config, EPSILON, 20)
    right.set_timesteps(20)
    assert torch.equal(made.timesteps, right.timesteps) and torch.equal(made.sigmas, right.sigmas)
    assert made.init_noise_sigma == right.init_noise_sigma


COUNTS = [*range(1, 130), *range(130, 1000, 13), 333, 334, 499, 500, 501, 600, 999, 1000]


@pytest.mark.parametrize("settings", [{}, {"timestep_spacing": "trailing"}, {"final_sigmas_type": "sigma_min"}])
@pytest.mark.parametrize("prediction", [EPSILON, ZERO], ids=Prediction.describe)
def test_any_number_of_steps_begins_at_the_end_of_the_schedule(prediction, settings):
    for steps in COUNTS:
        timesteps = sampling_scheduler(CONFIG | settings, prediction, steps).timesteps
        assert len(timesteps) == steps
        assert 999 >= timesteps[0] >= (999 if prediction.zero_terminal_snr else 900), steps
        assert timesteps[-1] >= 0 and (timesteps.diff() < 0).all(), steps


def test_usual_numbers_of_steps_keep_the_base_s_spacing():
    for steps in range(10, 112):
        assert sampling_scheduler(CONFIG, EPSILON, steps).config.timestep_spacing == "leading", steps


def test_more_steps_than_timesteps_are_refused_here_and_in_every_config():
    with pytest.raises(UserError, match="cannot be sampled in 1001 steps: choose another number"):
        sampling_scheduler(CONFIG, EPSILON, objectives.NUM_TIMESTEPS + 1)
    for config in (SampleSection, functools.partial(SamplingConfig, base="x", prompts=["a cat"])):
        assert config(steps=objectives.NUM_TIMESTEPS).steps == 1000
        with pytest.raises(ValidationError, match="less than or equal to 1000"):
            config(steps=objectives.NUM_TIMESTEPS + 1)


def test_noise_predicted_from_noise_alone_is_refused():
    with pytest.raises(AssertionError):
        sampling_scheduler(CONFIG, Prediction("epsilon", zero_terminal_snr=True), 20)


@PREDICTIONS
def test_sampling_takes_what_the_base_predicts(prediction, model, base, unet, encode, monkeypatch):
    """One step from the last timestep, where only the base's own kind of prediction leads to the picture."""
    x0 = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(1))
    predict = oracle(x0, prediction)
    monkeypatch.setattr(unet, "forward", lambda noisy, timestep, **_: (predict(noisy, timestep),))
    said = SimpleNamespace(prediction=prediction, scheduler=CONFIG | {"timestep_spacing": "trailing"})
    text = encode("a cat")
    [generated] = generate_latents(model, said, unet, [text], text, seeds=[0], **SETTINGS | {"steps": 1})
    torch.testing.assert_close(generated, x0, rtol=0, atol=2e-3)


@pytest.fixture
def model(architecture):
    return MODELS[architecture]


@pytest.fixture
def base(base_folder):
    return loading.resolve_base(str(base_folder))


@pytest.fixture
def encode(base, model):
    """A caption's embedding in fp32, as the caches hold it in fp16."""
    text = model.load_text(base, CPU)
    return lambda caption: model.encode_caption(text, caption)[0]


@pytest.fixture
def unet(base):
    return loading.load_unet(base, torch.float32, CPU)


@pytest.fixture
def reference(base, unet):
    """Draws with diffusers' pipeline from a prompt."""
    from diffusers import DiffusionPipeline, EulerDiscreteScheduler

    # The frozen UNet, as pictures are drawn from while training: for weights that want a gradient torch takes other
    # kernels, also under no_grad, and the last bits differ.
    pipeline = DiffusionPipeline.from_pretrained(base.source, unet=unet)
    # The base's own spacing does not fit three steps.
    pipeline.scheduler = EulerDiscreteScheduler.from_pretrained(
        base.source, subfolder="scheduler", timestep_spacing="trailing"
    )
    pipeline.set_progress_bar_config(disable=True)

    def generate(prompt, seed, negative_prompt, output_type, guidance=SETTINGS["guidance"]):
        return pipeline(
            prompt,
            negative_prompt=negative_prompt,
            generator=torch.Generator("cpu").manual_seed(seed),
            num_inference_steps=SETTINGS["steps"],
            guidance_scale=guidance,
            height=SETTINGS["height"],
            width=SETTINGS["width"],
            output_type=output_type,
        ).images

    return generate


@pytest.mark.parametrize("negative_prompt", ["blurry", None])
def test_equal_to_the_pipeline(base, model, unet, encode, reference, negative_prompt):
    """None stands for no negative prompt: SDXL then takes zeros, as its model_index says, SD1.5 the empty caption."""
    negative = encode(negative_prompt or "")
    if negative_prompt is None:
        negative = unconditional(negative, force_zeros=model.NAME == "sdxl")
    texts = [encode(prompt) for prompt in PROMPTS]
    generated = list(generate_latents(model, base, unet, texts, negative, seeds=SEEDS, **SETTINGS))
    expected = [reference(prompt, seed, negative_prompt, "latent") for prompt in PROMPTS for seed in SEEDS]
    assert len(generated) == 4
    for found, right in zip(generated, expected, strict=True):
        assert found.shape == (1, 4, 6, 8)
        assert torch.equal(found, right)
    assert not torch.equal(generated[0], generated[1]) and not torch.equal(generated[0], generated[2])


def test_decoding_equals_the_pipeline(base, model, unet, encode, reference):
    negative = unconditional(encode(""), force_zeros=model.NAME == "sdxl")
    latents = list(generate_latents(model, base, unet, [encode("a cat")], negative, seeds=[3], **SETTINGS))
    [picture] = decode(loading.load_vae(base, torch.float32, CPU), latents, model.SCALING_FACTOR, ["a cat"])
    [right] = reference("a cat", 3, None, "pil")
    assert isinstance(picture, Image.Image) and picture.size == (64, 48)
    assert np.array_equal(np.asarray(picture), np.asarray(right))


def test_without_guidance_the_negative_does_not_matter(base, model, unet, encode):
    settings = SETTINGS | {"guidance": 1.0}
    text = [encode("a cat")]
    one, other = (
        next(generate_latents(model, base, unet, text, encode(negative), seeds=[0], **settings))
        for negative in ("blurry", "dark")
    )
    assert torch.equal(one, other)


def test_zeros_where_the_base_wants_them():
    text = {"hidden": torch.ones(77, 4), "pooled": torch.ones(3)}
    assert unconditional(text, force_zeros=False) is text
    zeros = unconditional(text, force_zeros=True)
    assert zeros.keys() == text.keys() and not any(tensor.any() for tensor in zeros.values())
    assert zeros["hidden"].shape == (77, 4) and zeros["pooled"].shape == (3,)


def test_the_unet_and_torchs_generator_are_left_as_they_were(base, model, unet, encode):
    unet.train()
    seen = []
    unet.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    state = torch.get_rng_state()
    list(generate_latents(model, base, unet, [encode("a")], encode(""), seeds=[0], **SETTINGS))
    assert seen == [False] * SETTINGS["steps"], "no dropout in a picture"
    assert unet.training
    assert torch.equal(torch.get_rng_state(), state)
    unet.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(generate_latents(model, base, unet, [encode("a")], encode(""), seeds=[0], **SETTINGS))
    assert unet.training, "after a failure too"
