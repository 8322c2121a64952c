"""Loads micro-batches from the caches to the device, prefetching the next step in a background thread."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
import torch

from sushi_research import conditioning, randomness
from sushi_research.caches import encoding
from sushi_research.caches.caches import Caches
from sushi_research.config.sets import ResolvedSet
from sushi_research.data.captions.run_captions import RunCaptions
from sushi_research.data.items import Item, Items
from sushi_research.fast.batch import Batch, normal, to_device
from sushi_research.training import set_terms
from sushi_research.training.batch_text import BatchText, BatchTokens
from sushi_research.training.sampler import Sampler, StepSample


def is_flipped(seed: int, probability: float, epoch: int, item: Item) -> bool:
    """Whether an item is mirrored in an epoch."""
    return probability > 0 and randomness.uniform(seed, "flip", epoch, *item.identity) < probability


class Loader:
    """The micro-batches of this process, step by step. The next step is prepared in a background thread.

    `sets` are those of the config (`sets_of`), by the items' set numbers. `text` gives the embeddings of the captions or their
    token ids; None: the embedding of each item's caption as it is. `ahead` lists the purposes for which noise in the latents'
    shape is generated in the background too. `steps` is the length of the run: the texts of a step beyond it may not be in the
    cache. None: there is no end.
    """

    def __init__(
        self,
        items: Items,
        sampler: Sampler,
        caches: Caches,
        *,
        batch_size: int,
        rank: int,
        world: int,
        device: torch.device,
        sets: Sequence[ResolvedSet],
        time_ids: str = "image",
        text: BatchText | BatchTokens | None = None,
        ahead: Sequence[str] = (),
        steps: int | None = None,
    ) -> None:
        self.items, self.sampler = items, sampler
        self.caches, self.sets = caches, tuple(sets)
        self.text = text or BatchText(RunCaptions(items), caches)
        self.batch_size, self.rank, self.world, self.device = batch_size, rank, world, device
        self.time_ids, self.ahead, self.steps = time_ids, tuple(ahead), steps
        self._waited = 0.0
        # A new thread's current GPU is GPU 0, so pinning memory in it would make every process allocate on GPU 0.
        # We set the main thread's current GPU instead. (`device` may lack an index, which set_device does not accept.)
        own_gpu = (torch.cuda.set_device, (torch.cuda.current_device(),)) if device.type == "cuda" else (None, ())
        self._pool = ThreadPoolExecutor(1, "loader", *own_gpu)
        self._next: tuple[int, Future[list[Batch]]] | None = None

    def step(self, step: int) -> Iterator[Batch]:
        """The micro-batches of step `step` (from 0) on the device. Starts preparing the next step, if there is one."""
        start = time.perf_counter()
        if self._next is None or self._next[0] != step:
            self._next = (step, self._pool.submit(self._prepare, step))
        batches = self._next[1].result()
        is_last = self.steps is not None and step + 1 >= self.steps
        self._next = None if is_last else (step + 1, self._pool.submit(self._prepare, step + 1))
        self._waited += time.perf_counter() - start
        yield from batches

    def wait_for_prefetch(self) -> None:
        """Waits until the background thread has nothing to do, so that it does not use the GPU while a step is recorded."""
        if self._next is not None:
            wait([self._next[1]])

    def largest(self, step: int) -> Batch | None:
        """The largest micro-batch, by latents, of the steps from `step` on, looked for in one epoch; None if there is no step."""
        stop = step + max(1, len(self.items) // self.sampler.global_batch_size)
        stop = stop if self.steps is None else min(stop, self.steps)
        if step >= stop:
            return None
        areas = np.array([height * width for height, width in self.items.buckets])
        found, samples = self.sampler.largest_micro_batch(step, stop, self.batch_size, areas)
        return self._batch(found, samples)

    def take_waited(self) -> float:
        """Seconds that training waited for data since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def close(self) -> None:
        """Stops the background thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _prepare(self, step: int) -> list[Batch]:
        share = self.sampler.share(step, self.batch_size, self.rank, self.world)
        return [self._batch(step, samples) for samples in share]

    def _items(self, samples: Sequence[StepSample]) -> list[Item]:
        """The items of these samples, each with the crop that its epoch uses."""
        items = self.items.take(np.array([sample.index for sample in samples]))
        found = list(items)
        if items.crops is None or items.most_crops == 1:
            return found
        numbers = [
            randomness.integer(self.sampler.seed, "crop", sample.epoch, *item.identity, high=count) if count > 1 else 0
            for sample, item, count in zip(samples, found, items.crops.tolist(), strict=True)
        ]
        return list(items.cropped(np.array(numbers)))

    def _batch(self, step: int, samples: Sequence[StepSample]) -> Batch:
        items, seed = self._items(samples), self.sampler.seed
        flips = [
            is_flipped(seed, self.sets[item.sample.set].flip, sample.epoch, item)
            for sample, item in zip(samples, items, strict=True)
        ]
        keys_and_flips = zip(items, flips, strict=True)
        rows = self.caches.latents.get_many([self.caches.latent_key(item, flip) for item, flip in keys_and_flips])
        keys = tuple((sample.epoch, *item.identity) for sample, item in zip(samples, items, strict=True))
        mean, std = (torch.stack([row[name] for row in rows]) for name in encoding.LATENT_TENSORS)
        ids = [i.geometry.time_ids(flip, self.time_ids) for i, flip in zip(items, flips, strict=True)]
        epochs = [sample.epoch for sample in samples]
        mask = set_terms.mask_weights(items, self.sets, epochs, flips, self.caches.masks, seed)
        roles, to_base = set_terms.roles(items, self.sets), set_terms.learns_base(items, self.sets)
        return Batch(
            mean=to_device(self.device, mean),
            std=to_device(self.device, std),
            text={name: to_device(self.device, tensor) for name, tensor in self.text(samples).items()},
            time_ids=to_device(self.device, conditioning.time_ids(ids)),
            loss_weights=to_device(self.device, set_terms.loss_weights(items, self.sets)),
            names=tuple(item.sample.name for item in items),
            keys=keys,
            seed=seed,
            device=self.device,
            prefetched={p: to_device(self.device, normal(seed, p, keys, tuple(mean.shape[1:]))) for p in self.ahead},
            mask=None if mask is None else to_device(self.device, mask),
            to_base=None if to_base is None else to_device(self.device, to_base),
            roles=None if roles is None else to_device(self.device, roles),
            step=to_device(self.device, torch.tensor(step)),
        )
