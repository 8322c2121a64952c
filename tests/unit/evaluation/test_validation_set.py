"""The validation set is the same for every run, and the loss on it is the plain one, whoever computes which part."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sushi_research.errors import UserError
from sushi_research.evaluation import validation_set
from sushi_research.evaluation.results import Results
from sushi_research.models import loading
from sushi_research.models.prediction import Prediction

CPU = torch.device("cpu")
V_ZERO = Prediction("v_prediction", zero_terminal_snr=True)
FLOW = Prediction("rectified_flow", shift=2.5)


def test_timesteps_are_one_in_each_part_of_the_schedule():
    for image in ("a", "b", "c"):
        times = validation_set.timesteps(image, 8)
        assert list(times // 125) == list(range(8))
        assert np.array_equal(times, validation_set.timesteps(image, 8))
    assert len({tuple(validation_set.timesteps(str(image), 8)) for image in range(50)}) == 50
    # Uniform over the schedule: the mean of many is that of uniform draws, 499.5, within five standard errors.
    many = np.stack([validation_set.timesteps(str(image), 8) for image in range(2000)])
    assert abs(many.mean() - 499.5) < 5 * (125 / 12**0.5) / (2000 * 8) ** 0.5
    assert many.min() == 0 and many.max() == 999


def test_noise_differs_between_images_and_samples_and_is_normal():
    one = validation_set.noise("a", 0, (4, 16, 16))
    assert torch.equal(one, validation_set.noise("a", 0, (4, 16, 16)))
    assert not torch.equal(one, validation_set.noise("a", 1, (4, 16, 16)))
    assert not torch.equal(one, validation_set.noise("b", 0, (4, 16, 16)))
    assert abs(one.mean()) < 0.15 and abs(one.std() - 1) < 0.1


@pytest.mark.parametrize("prediction", [Prediction(), V_ZERO, FLOW], ids=["epsilon", "v", "flow"])
def test_losses_equal_a_plain_reference(architecture, setting, prediction):
    """Written out with diffusers' scheduler, one draw at a time. Batches of four round otherwise: a few units in the 6th digit."""
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    here = setting(architecture)
    # Eight noise samples, the default of the config, go through the UNet in two chunks.
    val_set = here.validation_set(8, prediction=prediction)
    found = here.losses(val_set, prediction)
    assert found.shape == (len(val_set.items), 8) and found.dtype == np.float32
    schedule = DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction.type if prediction != FLOW else "epsilon",
        rescale_betas_zero_snr=prediction.zero_terminal_snr,
    )
    flow = FlowMatchEulerDiscreteScheduler(shift=prediction.shift)
    vae = loading.load_vae(here.base, torch.float32, CPU)
    for index in (0, len(val_set.items) - 1):
        item = val_set.items[index]
        row = here.caches.latents.get(here.caches.latent_key(item, False))
        x0 = row["mean"].float()[None] * vae.config.scaling_factor
        hidden = {name: value[None] for name, value in here.caches.text(item.sample.caption).items()}
        geometry = item.geometry
        sizes = torch.tensor([geometry.time_ids(False, "image")], dtype=torch.float32)
        for number in range(8):
            t = torch.from_numpy(val_set.timesteps()[index, number : number + 1])
            eps = validation_set.noise(item.sample.image_hash, number, tuple(x0.shape[1:]))[None]
            added = {"text_embeds": hidden["pooled"].float(), "time_ids": sizes} if architecture == "sdxl" else None
            noisy, time = schedule.add_noise(x0, eps, t), t
            if prediction == FLOW:
                time = flow.timesteps[999 - t]  # most noise first
                noisy = flow.scale_noise(x0, time, eps)
            with torch.no_grad():
                predicted = here.unet(
                    noisy,
                    time,
                    encoder_hidden_states=hidden["hidden"].float(),
                    added_cond_kwargs=added,
                ).sample
            goal = {"epsilon": eps, "rectified_flow": eps - x0, "v_prediction": schedule.get_velocity(x0, eps, t)}
            assert found[index, number] == pytest.approx(
                (predicted - goal[prediction.type]).square().mean().item(), rel=2e-5
            )


def test_the_number_of_processes_changes_no_bit(setting):
    here = setting("sd15")
    val_set, alone = here.validation_set(noise_samples=8), None
    alone = here.losses(val_set)
    assert here.unet.training, "the UNet is left as it came"
    for world in (2, 3):
        shares = [here.losses(val_set, rank=rank, world=world) for rank in range(world)]
        assert np.array_equal(sum(shares), alone)
        assert all((share == 0).any() for share in shares)


def test_the_validation_set_is_bound_to_what_it_is_made_of(setting):
    here = setting("sd15")
    val_set = here.validation_set()
    assert val_set == here.validation_set() and len(val_set.items) == len(
        {item.sample.image_hash for item in here.items}
    )
    again = here.validation_set(4)
    assert again.hash == val_set.hash
    shuffled = validation_set.make_validation_set(reversed(here.items), 4, here.caches, Prediction(), "base")
    assert shuffled.hash == val_set.hash and shuffled.items == val_set.items
    others = [
        here.validation_set(noise_samples=8),
        here.validation_set(prediction=V_ZERO),
        here.validation_set(prediction=FLOW),
        here.validation_set(prediction=replace(FLOW, shift=3.0)),
        here.validation_set(base_hash="another"),
    ]
    fewer = validation_set.make_validation_set(here.items[1:], 4, here.caches, Prediction(), "base")
    item = here.items[0]
    named = replace(item, sample=replace(item.sample, caption="another"))
    renamed = validation_set.make_validation_set([named, *here.items[1:]], 4, here.caches, Prediction(), "base")
    assert len({val_set.hash, fewer.hash, renamed.hash, *(other.hash for other in others)}) == 8


def test_results_are_kept_step_by_step(setting, tmp_path):
    here = setting("sd15")
    val_set, results = here.validation_set(), Results(tmp_path / "evaluation.parquet")
    assert results.read() is None and results.steps() == [] and results.loss_at(val_set, 0) is None
    shape, rng = (len(val_set.items), val_set.noise_samples), np.random.default_rng(0)
    base, *later = (rng.random(shape).astype(np.float32) for _ in range(4))
    for step, loss in ((0, base), (20, later[0]), (10, later[1])):
        results.append(val_set, step, loss, base)
    results.append(val_set, 20, later[2], base)  # again: replaced
    assert results.steps() == [0, 10, 20]
    for step, loss in ((0, base), (10, later[1]), (20, later[2])):
        assert np.array_equal(results.loss_at(val_set, step), loss)
    rows = results.read().to_pylist()
    first = rows[0]
    assert first["image"] == val_set.items[0].sample.image_hash and first["timestep"] == val_set.timesteps()[0, 0]
    assert first["loss"] == first["base_loss"] == base[0, 0] and len(rows) == 3 * base.size
    results.cut_back(10)
    assert results.steps() == [0, 10]
    assert results.loss_at(here.validation_set(noise_samples=8), 10) is None, (
        "another validation set has no losses here"
    )
    results.append(here.validation_set(noise_samples=8), 0, np.ones((shape[0], 8)), np.ones((shape[0], 8)))
    assert results.steps() == [0], "what another validation set gave cannot stand next to it"


def test_a_damaged_file_is_reported(tmp_path):
    (tmp_path / "evaluation.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="evaluation.parquet is damaged"):
        Results(tmp_path / "evaluation.parquet").read()


def test_the_summary_is_over_images():
    loss = np.array([[1.0, 3.0, 2.0, 2.0], [3.0, 5.0, 4.0, 4.0]], np.float32)
    base = np.array([[2.0, 3.0, 2.0, 3.0], [5.0, 5.0, 4.0, 6.0]], np.float32)
    times = np.array([[10, 300, 600, 900], [240, 260, 740, 760]])
    values = validation_set.summary(loss, base, times)
    assert values["evaluation/loss"] == 3.0 and values["evaluation/loss_se"] == pytest.approx(1.0)
    assert values["evaluation/loss_over_base"] == -0.75
    assert values["evaluation/loss_over_base_se"] == pytest.approx(0.25)
    assert [values[f"evaluation/loss_over_base_by_timestep/{timestep_bin}"] for timestep_bin in range(4)] == [
        -1.5,
        0.0,
        0.0,
        -1.5,
    ]
    alone = validation_set.summary(loss[:1], base[:1], times[:1])
    assert "evaluation/loss_se" not in alone and alone["evaluation/loss"] == 2.0
