"""The validation set: held-out images at fixed timesteps with fixed noise, and a model's unweighted loss on each of them.

The validation set is the same for every run with the same held-out images: timesteps and noise depend on the image alone, not on
the run's seed, options or number of processes. So the losses of two runs can be compared pairwise, by image and noise sample. The
loss is the mean squared error to the target of the base's prediction type, without weighting, noise offset, dropout or flips.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sushi_research import conditioning, objectives, randomness
from sushi_research.caches.keys import entry_key
from sushi_research.data.items import Item
from sushi_research.errors import some
from sushi_research.evaluation import outcomes
from sushi_research.evaluation.outcomes import mean_with_error
from sushi_research.models.prediction import Prediction
from sushi_research.progress import progress

if TYPE_CHECKING:
    from sushi_research.caches.caches import Caches

# Increment it when the meaning of a validation set changes. Results of different schemes are not compared.
SCHEME = 1
# The same for all runs, so that they share one validation set.
SEED = 0
# UNet batch size: noise samples of one image. It is not an option, because another size changes the last bits of the losses.
CHUNK = 4


@dataclass(frozen=True)
class ValidationSet:
    """N items, sorted by content; `noise_samples` timesteps with noise for each; and a hash of everything that determines it."""

    items: tuple[Item, ...]
    noise_samples: int
    time_ids: str
    hash: str

    @property
    def names(self) -> tuple[str, ...]:
        """The N images' content hashes, which determine their timesteps and noise."""
        return tuple(item.sample.image_hash for item in self.items)

    def timesteps(self) -> np.ndarray:
        """[N, noise samples] int64."""
        return np.stack([timesteps(name, self.noise_samples) for name in self.names])

    def describe(self) -> dict[str, Any]:
        """The contents of validation_set.json."""
        images = [
            {
                "name": item.sample.name,
                "hash": item.sample.image_hash,
                "caption": item.sample.caption,
                "size": item.bucket,
            }
            for item in self.items
        ]
        return {"hash": self.hash, "scheme": SCHEME, "noise_samples": self.noise_samples, "images": images}


@dataclass(frozen=True)
class Example:
    """UNet inputs for one image: scaled latents [4, h, w] fp32, text embeddings by name, six values of SDXL's time_ids."""

    latents: torch.Tensor
    text: dict[str, torch.Tensor]
    sizes: tuple[int, ...]


def make_validation_set(
    items: Iterable[Item],
    noise_samples: int,
    caches: Caches,
    prediction: Prediction,
    base_hash: str,
    time_ids: str = "image",
) -> ValidationSet:
    """The validation set of the distinct (image, caption) pairs among `items`.

    `noise_samples` is a multiple of 4, so that each timestep bin has the same number. The hash covers the images and captions as
    they are encoded, the base's UNet, and everything that determines timesteps and noise.
    """
    assert noise_samples % 4 == 0 and noise_samples > 0, noise_samples
    distinct = {(item.sample.image_hash, item.sample.caption): item for item in items}
    ordered = tuple(distinct[key] for key in sorted(distinct))
    entries = [
        [caches.latent_key(item, False), caches.text_key(item.sample.caption), item.geometry.time_ids(False, time_ids)]
        for item in ordered
    ]
    digest = entry_key(
        scheme=SCHEME,
        randomness=randomness.SCHEME,
        noise_samples=noise_samples,
        entries=entries,
        prediction=list(prediction.facts().values()),
        base=base_hash,
    )
    return ValidationSet(ordered, noise_samples, time_ids, digest)


def timesteps(image_hash: str, noise_samples: int) -> np.ndarray:
    """[noise samples] int64: one timestep sampled uniformly from each of `noise_samples` equal parts of the schedule.

    Stratified sampling (Kahn & Marshall 1953): an image's mean loss has the same expectation as with uniform timesteps, and a
    lower variance.
    """
    within = randomness.key(SEED, "evaluation-timestep", image_hash, noise_samples).random(noise_samples)
    return ((np.arange(noise_samples) + within) * objectives.NUM_TIMESTEPS / noise_samples).astype(np.int64)


def noise(image_hash: str, number: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The noise of noise sample `number`, fp32."""
    return torch.from_numpy(randomness.normal(SEED, "evaluation-noise", image_hash, number, shape=shape))


def example(
    val_set: ValidationSet,
    index: int,
    model: ModuleType,
    caches: Caches,
    text: Callable[[str], dict[str, torch.Tensor]],
) -> Example:
    """One image of the validation set from the caches: the mean of the VAE posterior, not flipped."""
    item = val_set.items[index]
    row = caches.latents.get(caches.latent_key(item, False))
    sizes = item.geometry.time_ids(False, val_set.time_ids)
    return Example(row["mean"].float() * model.SCALING_FACTOR, text(item.sample.caption), sizes)


def losses(
    val_set: ValidationSet,
    model: ModuleType,
    unet: Any,
    caches: Caches,
    prediction: Prediction,
    *,
    device: torch.device,
    text: Callable[[str], dict[str, torch.Tensor]] | None = None,
    rank: int = 0,
    world: int = 1,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> np.ndarray:
    """The loss of every image and noise sample, [N, noise samples] float32, complete on every process.

    Each process computes whole images in chunks of the same size and leaves zeros for the others; `reduce` sums over processes.
    So the result does not depend on the number of processes. `text` encodes a caption in place of the cached embeddings, for an
    adapter that changes the text encoders.
    """
    encoded = text or caches.text
    found = torch.zeros(len(val_set.items), val_set.noise_samples)
    shown = predictions(
        val_set.names,
        val_set.noise_samples,
        lambda index: example(val_set, index, model, caches, encoded),
        model,
        unet,
        prediction,
        device=device,
        rank=rank,
        world=world,
        what="evaluating",
    )
    for index, part, predicted, goal in shown:
        found[index, part] = objectives.mse_per_sample(predicted, goal).cpu()
    whole = found if reduce is None else reduce(found.to(device)).cpu()
    return whole.numpy()


@torch.no_grad()
def predictions(
    names: Sequence[str],
    noise_samples: int,
    example: Callable[[int], Example],
    model: ModuleType,
    unet: Any,
    prediction: Prediction,
    *,
    device: torch.device,
    rank: int,
    world: int,
    what: str,
) -> Iterator[tuple[int, slice, torch.Tensor, torch.Tensor]]:
    """Yields (index, slice of noise samples, predictions, targets) of this process's share; tensors [<= 4, 4, h, w].

    The UNet predicts in eval mode, without dropout; its mode is restored afterwards.
    """
    schedule = objectives.make_schedule(prediction).to(device)
    was_training, dtype = unet.training, unet.dtype
    unet.eval()
    try:
        work = range(rank, len(names), world)
        for index in progress(work, description=what, unit="image", leave=False):
            shown, name = example(index), names[index]
            times = torch.from_numpy(timesteps(name, noise_samples))
            latents = shown.latents[None].to(device)
            text = {key: tensor[None].to(device) for key, tensor in shown.text.items()}
            sizes = conditioning.time_ids([shown.sizes]).to(device)
            for first in range(0, noise_samples, CHUNK):
                part = slice(first, min(first + CHUNK, noise_samples))
                count, shape = part.stop - first, tuple(latents.shape[1:])
                eps = torch.stack([noise(name, number, shape) for number in range(first, part.stop)]).to(device)
                t, x0 = times[part].to(device), latents.expand(count, -1, -1, -1)
                predicted = model.predict(
                    unet,
                    objectives.add_noise(x0, eps, t, schedule),
                    schedule.times[t],
                    {key: tensor.expand(count, *tensor.shape[1:]) for key, tensor in text.items()},
                    sizes.expand(count, -1),
                    dtype=dtype,
                )
                yield index, part, predicted, objectives.target(x0, eps, t, schedule, prediction.type)
    finally:
        unet.train(was_training)


def summary(loss: np.ndarray, base: np.ndarray, times: np.ndarray) -> dict[str, float | None]:
    """The logged metrics of an evaluation: means over images (each the mean of its noise samples), with standard errors.

    `loss`, `base` and `times` are [N, noise samples]. `over_base` is the mean of the paired differences. Timestep bins are the
    quarters of the schedule, from 0 (least noise) to 3, each with the same number of noise samples per image. A mean that includes
    a loss that is not finite is None.
    """
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        difference = loss.astype(np.float64) - base
    values = mean_with_error("evaluation/loss", loss) | mean_with_error("evaluation/loss_over_base", difference)
    for timestep_bin in range(outcomes.BINS):
        chosen = outcomes.in_bins(difference, times, [timestep_bin])
        assert chosen is not None, "timesteps are stratified"
        values |= mean_with_error(f"evaluation/loss_over_base_by_timestep/{timestep_bin}", chosen)
    return values | outcomes.learned_summary(loss, base, times)


def not_finite(names: Sequence[str], times: np.ndarray, values: np.ndarray) -> str:
    """The places of values that are not finite: "2 of 64 (cat.png at timestep 981, ...)"; "" if there are none."""
    places = [
        f"{names[image]} at timestep {times[image, sample]}" for image, sample in np.argwhere(~np.isfinite(values))
    ]
    return f"{len(places)} of {values.size} ({some(places)})" if places else ""
