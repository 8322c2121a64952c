"""The evaluation pack: held-out images at fixed timesteps with fixed noise, and a model's plain loss on every one of them.

The pack is the same for every run that sees the same images: its timesteps and noise are functions of the image alone, not
of the run's seed, its training options or its processes. So two runs differ by what they learned, image by image, draw by draw.
The loss is the mean squared error to what the base predicts: no weighting, no offset, no dropout, no flip.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sushi_research import conditioning, diffusion, randomness
from sushi_research.cache import entry_key
from sushi_research.errors import UserError, first_line
from sushi_research.files import write_atomic
from sushi_research.items import Item
from sushi_research.models.prediction import Prediction
from sushi_research.preparation import Caches
from sushi_research.progress import progress

if TYPE_CHECKING:
    import pyarrow

# Raise it when a pack of the same images comes to mean something else: packs of different schemes are not compared.
SCHEME = 1
# Every run shares it: a pack that followed the run's seed would not be one pack.
SEED = 0
# Draws of one image that go through the UNet together. Another number rounds otherwise in the last bits, so it is no option.
CHUNK = 4


@dataclass(frozen=True)
class Pack:
    """The frozen set: N items in an order of content alone, `draws` timesteps with noise for each, and the hash of it all."""

    items: tuple[Item, ...]
    draws: int
    time_ids: str
    hash: str

    def timesteps(self) -> np.ndarray:
        """[N, draws] int64."""
        return np.stack([timesteps(item.sample.image_hash, self.draws) for item in self.items])


def make_pack(
    items: Iterable[Item], draws: int, caches: Caches, prediction: Prediction, base_hash: str, time_ids: str = "image"
) -> Pack:
    """The pack of the items' distinct images; `draws` timesteps each, a multiple of 4 so that every band has as many.

    Its hash binds the pictures and captions as they are encoded, the base's UNet and all that fixes the draws.
    """
    assert draws % 4 == 0 and draws > 0, draws
    distinct = {(item.sample.image_hash, item.sample.caption): item for item in items}
    ordered = tuple(distinct[key] for key in sorted(distinct))
    entries = [
        [caches.latent_key(item, False), caches.text_key(item.sample.caption), item.placement.time_ids(False, time_ids)]
        for item in ordered
    ]
    digest = entry_key(
        scheme=SCHEME,
        randomness=randomness.SCHEME,
        draws=draws,
        entries=entries,
        prediction=[prediction.type, prediction.zero_terminal_snr],
        base=base_hash,
    )
    return Pack(ordered, draws, time_ids, digest)


def timesteps(image_hash: str, draws: int) -> np.ndarray:
    """[draws] int64, stratified: one timestep drawn uniformly from each of `draws` equal parts of the schedule.

    Stratified sampling (Kahn & Marshall 1953): the mean over an image's draws is that of uniform timesteps, with less variance.
    """
    within = randomness.key(SEED, "evaluation-timestep", image_hash, draws).random(draws)
    return ((np.arange(draws) + within) * diffusion.NUM_TIMESTEPS / draws).astype(np.int64)


def noise(image_hash: str, draw: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The noise of one draw, fp32."""
    return torch.from_numpy(randomness.normal(SEED, "evaluation-noise", image_hash, draw, shape=shape))


@torch.no_grad()
def losses(
    pack: Pack,
    model: ModuleType,
    unet: Any,
    caches: Caches,
    prediction: Prediction,
    *,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> np.ndarray:
    """The loss of every image and draw, [N, draws] float32, whole on every process.

    Each process computes whole images, always in the same chunks, and `reduce` sums the rest's zeros: the result does not
    depend on how many there are. The UNet is left in the mode in which it came.
    """
    abar = diffusion.alphas_cumprod(zero_terminal_snr=prediction.zero_terminal_snr).to(device)
    times, found = torch.from_numpy(pack.timesteps()), torch.zeros(len(pack.items), pack.draws)
    was_training = unet.training
    unet.eval()
    try:
        work = range(rank, len(pack.items), world)
        for index in progress(work, description="evaluating", unit="image", leave=False):
            item = pack.items[index]
            row = caches.latents.get(caches.latent_key(item, False))
            latents = (row["mean"].float() * model.SCALING_FACTOR)[None].to(device)
            text = {name: tensor[None].to(device) for name, tensor in caches.text(item.sample.caption).items()}
            sizes = conditioning.time_ids([item.placement.time_ids(False, pack.time_ids)]).to(device)
            for begin in range(0, pack.draws, CHUNK):
                draws = range(begin, min(begin + CHUNK, pack.draws))
                count, shape = len(draws), tuple(latents.shape[1:])
                eps = torch.stack([noise(item.sample.image_hash, draw, shape) for draw in draws]).to(device)
                t, x0 = times[index, begin : begin + count].to(device), latents.expand(count, -1, -1, -1)
                predicted = model.predict(
                    unet,
                    diffusion.add_noise(x0, eps, t, abar),
                    t,
                    {name: tensor.expand(count, *tensor.shape[1:]) for name, tensor in text.items()},
                    sizes.expand(count, -1),
                )
                goal = diffusion.target(x0, eps, t, abar, prediction.type)
                found[index, begin : begin + count] = diffusion.mse_per_sample(predicted, goal).cpu()
    finally:
        unet.train(was_training)
    whole = found if reduce is None else reduce(found.to(device)).cpu()
    return whole.numpy()


class Results:
    """evaluation.parquet: one row for every step, image and draw, with the base's loss on the same draw beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> pyarrow.Table | None:
        """All rows, None where nothing was evaluated yet; UserError where the file is damaged."""
        import pyarrow.parquet

        if not self.path.exists():
            return None
        try:
            return pyarrow.parquet.read_table(self.path)
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(
                f"{self.path} is damaged ({first_line(error)}): restore it, or remove it to evaluate anew."
            ) from None

    def steps(self) -> list[int]:
        """The steps that were evaluated."""
        table = self.read()
        return [] if table is None else sorted(set(table["step"].to_pylist()))

    def loss_at(self, pack: Pack, step: int) -> np.ndarray | None:
        """[N, draws] of a step, None where it was not evaluated on this pack."""
        import pyarrow.compute as compute

        table = self.read()
        if table is None or table.schema.metadata.get(b"pack") != pack.hash.encode():
            return None
        rows = table.filter(compute.equal(table["step"], step))
        shape = (len(pack.items), pack.draws)
        return rows["loss"].to_numpy().reshape(shape) if rows.num_rows == shape[0] * shape[1] else None

    def append(self, pack: Pack, step: int, loss: np.ndarray, base: np.ndarray) -> None:
        """Adds a step's losses and the base's, [N, draws] each; what there was of that step, or of another pack, is replaced."""
        import pyarrow
        import pyarrow.compute as compute

        count = len(pack.items) * pack.draws
        table = pyarrow.table(
            {
                "step": np.full(count, step, np.int32),
                "image": np.repeat([item.sample.image_hash for item in pack.items], pack.draws),
                "draw": np.tile(np.arange(pack.draws, dtype=np.int16), len(pack.items)),
                "timestep": pack.timesteps().astype(np.int16).ravel(),
                "loss": loss.astype(np.float32).ravel(),
                "base_loss": base.astype(np.float32).ravel(),
            }
        ).replace_schema_metadata({"pack": pack.hash, "scheme": str(SCHEME)})
        before = self.read()
        if before is not None and before.schema.metadata.get(b"pack") == pack.hash.encode():
            kept = before.filter(compute.not_equal(before["step"], step))
            table = pyarrow.concat_tables([kept, table]).sort_by([("step", "ascending")])
        self._write(table)

    def cut_back(self, step: int) -> None:
        """Removes what was evaluated after `step`, where the run goes on."""
        import pyarrow.compute as compute

        table = self.read()
        if table is not None:
            self._write(table.filter(compute.less_equal(table["step"], step)))

    def _write(self, table: pyarrow.Table) -> None:
        import pyarrow.parquet

        data = io.BytesIO()
        pyarrow.parquet.write_table(table, data)
        write_atomic(self.path, data.getvalue())


def summary(loss: np.ndarray, base: np.ndarray, times: np.ndarray) -> dict[str, float]:
    """What is logged of an evaluation: means over images (each the mean of its draws) with standard errors over images.

    `loss`, `base` and `times` are [N, draws]. `loss_over_base` is the mean of the paired differences; bands are the quarters
    of the schedule, 0 (least noise) to 3.
    """
    values = {}
    for name, array in (("loss", loss), ("loss_over_base", loss - base)):
        means = array.astype(np.float64).mean(1)
        values[f"evaluation/{name}"] = float(means.mean())
        if len(means) > 1:
            values[f"evaluation/{name}_se"] = float(means.std(ddof=1) / len(means) ** 0.5)
    quarters = times * 4 // diffusion.NUM_TIMESTEPS
    difference = (loss - base).astype(np.float64)
    values |= {f"evaluation/band_over_base/{band}": float(difference[quarters == band].mean()) for band in range(4)}
    return values
