"""Base drift: how far an adapter moves the model on captions that it was not trained on.

The base draws each caption once. Its drawing is noised as in training, and the adapted UNet's prediction is compared with the
base's own on the same input: the mean squared difference, in the unit of the loss. It is 0 for the base, and grows with what
a training changed beyond its subject; unlike the loss it needs no picture, and says nothing of which change is for the better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sushi_research import diffusion
from sushi_research.caches.store import Store, entry_key
from sushi_research.evaluation import validation_set
from sushi_research.evaluation.validation_set import Example
from sushi_research.sampling import pipeline

if TYPE_CHECKING:
    from types import ModuleType

    from sushi_research.models import loading

# Raise it when what is drawn or compared changes.
SCHEME = 1
# Denoising steps of a drawing, and timesteps with noise for each.
STEPS, NOISE_SAMPLES = 12, 4
TENSORS = ("latents",)


@dataclass(frozen=True)
class DriftSet:
    """The captions with their drawings by the base, as keys into the store of drawings, and the hash of all that fixes them."""

    names: tuple[str, ...]
    keys: tuple[str, ...]
    side: int
    hash: str
    noise_samples: int = NOISE_SAMPLES

    def timesteps(self) -> np.ndarray:
        """[N, noise samples] int64."""
        return np.stack([validation_set.timesteps(name, self.noise_samples) for name in self.names])


def make_drift_set(
    captions: Sequence[str],
    text_key: Callable[[str], str],
    model: ModuleType,
    base: loading.Base,
    base_hash: str,
    *,
    side: int,
    dtype: torch.dtype,
) -> DriftSet:
    """The drift set of the captions, drawn `side` x `side` pixels by a base in `dtype`; its hash binds all that decides a
    drawing."""
    recipe = {
        "scheme": SCHEME,
        "base": base_hash,
        "prediction": [base.prediction.type, base.prediction.zero_terminal_snr],
        "scheduler": {name: str(value) for name, value in base.scheduler.items()},
        "force_zeros": base.force_zeros,
        "empty": text_key(""),
        "sampling": [STEPS, model.GUIDANCE, side, str(dtype)],
    }
    keys = tuple(entry_key(text=text_key(caption), **recipe) for caption in captions)
    return DriftSet(
        tuple(captions), keys, side, entry_key(keys=keys, noise_samples=NOISE_SAMPLES, noise=validation_set.SCHEME)
    )


def generate_missing(
    drift_set: DriftSet,
    store: Store,
    text: Callable[[str], dict[str, torch.Tensor]],
    model: ModuleType,
    base: loading.Base,
    unet: Any,
    *,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Draws this process's share of what the store lacks, each caption alone from the noise of seed 0; `unet` is the base's."""
    mine = [number for number in range(rank, len(drift_set.keys), world) if drift_set.keys[number] not in store]
    if not mine:
        return
    latents = pipeline.generate_latents(
        model,
        base,
        unet,
        [text(drift_set.names[number]) for number in mine],
        pipeline.unconditional(text(""), base.force_zeros),
        seeds=[validation_set.SEED],
        steps=STEPS,
        guidance=model.GUIDANCE,
        height=drift_set.side,
        width=drift_set.side,
    )
    with store.writer() as writer:
        for number, latent in zip(mine, latents, strict=True):
            writer.add(
                drift_set.keys[number], {"latents": latent[0].half().cpu()}, {"caption": drift_set.names[number]}
            )


class Drift:
    """Compares predictions on the drift set with the base's, which are kept in memory (16 MB at SDXL's size with 16 captions)."""

    def __init__(
        self,
        drift_set: DriftSet,
        store: Store,
        text: Callable[[str], dict[str, torch.Tensor]],
        model: ModuleType,
        base: loading.Base,
        *,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.drift_set, self.store, self.text, self.model, self.base = drift_set, store, text, model, base
        self.device, self.rank, self.world, self.reduce = device, rank, world, reduce
        self._of_base: dict[tuple[int, int], torch.Tensor] | None = None

    @property
    def knows_base(self) -> bool:
        return self._of_base is not None

    def remember_base(self, unet: Any) -> None:
        """Keeps what the base's UNet predicts; it must come before the first `measure`."""
        self._of_base = {(index, part.start): p.float().cpu() for index, part, p, _ in self._predictions(unet, None)}

    def measure(self, unet: Any, text: Callable[[str], dict[str, torch.Tensor]] | None = None) -> np.ndarray:
        """The mean squared difference from the base's prediction, [captions, noise samples] float32, whole on every process.

        `text` encodes a caption where the adapter changes the text encoders too.
        """
        assert self._of_base is not None, "remember_base comes first"
        found = torch.zeros(len(self.drift_set.names), self.drift_set.noise_samples)
        for index, part, predicted, _ in self._predictions(unet, text):
            of_base = self._of_base[index, part.start].to(predicted.device)
            found[index, part] = diffusion.mse_per_sample(predicted, of_base).cpu()
        whole = found if self.reduce is None else self.reduce(found.to(self.device)).cpu()
        return whole.numpy()

    def _predictions(self, unet: Any, text: Callable[[str], dict[str, torch.Tensor]] | None) -> Any:
        side, encoded = self.drift_set.side, text or self.text

        def example(index: int) -> Example:
            latents = self.store.get(self.drift_set.keys[index])["latents"].float()
            return Example(latents, encoded(self.drift_set.names[index]), (side, side, 0, 0, side, side))

        return validation_set.predictions(
            self.drift_set.names,
            self.drift_set.noise_samples,
            example,
            self.model,
            unet,
            self.base.prediction,
            device=self.device,
            rank=self.rank,
            world=self.world,
            what="measuring the drift",
        )


def summary(drift: np.ndarray) -> dict[str, float]:
    """What is logged: the mean over captions [N, noise samples] and its standard error over captions."""
    return validation_set.mean_with_error("evaluation/drift", drift)
