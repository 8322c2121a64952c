"""Fills the caches: images to VAE posteriors, captions to text embeddings. Only missing entries are computed.

On a CPU, images and captions are encoded one at a time; on a GPU in batches, images in those of one bucket. In a batch of four the
VAE changes the last bit of 0.4 % of the stored fp16 values, so there an entry may depend, by that much, on which others were
missing with it. Entries are stored in fp16, which changes the adapter's gradient by 4.7e-5 to 1.3e-3 of its size (measured). The
VAE computes in fp32 unless its config declares it safe in fp16 (`loading.vae_dtype`).

The encoder waits neither for the images, which threads read, decode and resize ahead of it, nor for the disk (`writer.py`).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np
import torch

from sushi_research.caches.keys import hex_digits, owners
from sushi_research.caches.latent_entries import LatentEntries
from sushi_research.caches.store import Store
from sushi_research.caches.text_keys import TextEntries
from sushi_research.data import images
from sushi_research.data.items import Item
from sushi_research.errors import UserError
from sushi_research.progress import progress
from sushi_research.runs import machine
from sushi_research.workers import cores

LATENT_TENSORS = ("mean", "std")
# Threads that read and decode images, at most: each may hold an image of hundreds of megapixels.
_MOST_THREADS = 16
# Memory that SDXL's VAE takes to encode an image, measured: bytes per pixel and byte of its dtype (2.5 GiB for 1024x1024 in fp32).
_BYTES_PER_PIXEL = 640
# Chunks of captions that a GPU encodes at once: six times as fast as one by one (docs/performance.md).
_TEXT_BATCH = 32
# Pixels of a batch, four of 1024x1024: more makes the VAE no faster (docs/performance.md).
_MOST_PIXELS = 4 * 2**20

_logger = logging.getLogger(__name__)


def encode_latents(store: Store, missing: LatentEntries, vae: Any, *, rank: int = 0, world: int = 1) -> None:
    """Encodes this process's share of `missing` and adds it to the store, bucket by bucket.

    Raises UserError if an image was changed or a posterior is not finite; what was encoded before is kept.
    """
    mine = missing.take(owners(missing.keys, world) == rank).by_bucket()
    buckets, limit = mine.buckets, _MOST_PIXELS
    bar = progress(total=len(mine), description="encoding images", unit="image", disable=rank > 0)
    with bar, store.writer() as writer, closing(_pixels(mine)) as pixels:
        batch: list[tuple[Item, bool, np.ndarray]] = []
        for number, (item, image) in enumerate(pixels):
            batch.append((item, bool(mine.flips[number]), image))
            ends = number + 1 == len(mine) or tuple(buckets[number + 1]) != item.bucket
            if not ends and len(batch) < _batch_size(vae, item.bucket, limit):
                continue
            keys = hex_digits(mine.keys[number + 1 - len(batch) : number + 1])
            encoded, limit = _encode(vae, np.stack([each for *_, each in batch]), limit)
            for key, (each, flip, _), mean, std in zip(keys, batch, *encoded, strict=True):
                _require_finite(each, mean, std)
                metadata = {"image": each.sample.image_hash, "size": list(each.bucket), "flip": flip}
                writer.add(key, {"mean": mean, "std": std}, metadata)
            bar.update(len(batch))
            batch = []


def _pixels(entries: LatentEntries) -> Iterator[tuple[Item, np.ndarray]]:
    """(item, pixels [H, W, 3] uint8) of each entry, in order. Threads make them ahead; Pillow works without the GIL."""
    if not len(entries):
        return
    threads = min(_MOST_THREADS, cores())
    # Entries of one image are its crops, and their mirror images: it is decoded once.
    same = entries.images
    starts = np.flatnonzero(np.r_[True, same[1:] != same[:-1]]).tolist()
    jobs = deque(zip(starts, [*starts[1:], len(entries)], strict=True))

    def make(start: int, end: int) -> list[tuple[Item, np.ndarray]]:
        items = [entries.item(number) for number in range(start, end)]
        sample = items[0].sample
        try:
            image = images.decode(sample.read())
        except images.BadImage as error:  # what is known of it is remembered, and an image library is another one now
            raise UserError(
                f"{sample.name} could be decoded when it was checked, but not now: {error.reason}; install the libraries that were "
                "there then (such as pillow-heif), or remove the image."
            ) from error
        flips = entries.flips[start:end].tolist()
        return [
            (item, images.resize_and_crop(image, item.geometry, flip)) for item, flip in zip(items, flips, strict=True)
        ]

    with ThreadPoolExecutor(threads, "images") as pool:
        waiting: deque[Future[list[tuple[Item, np.ndarray]]]] = deque()
        try:
            while jobs or waiting:
                while jobs and len(waiting) < 2 * threads:
                    waiting.append(pool.submit(make, *jobs.popleft()))
                yield from waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _batch_size(vae: Any, bucket: tuple[int, int], limit: int) -> int:
    """How many images of a bucket the VAE encodes at once: one on a CPU; on a GPU `limit` pixels, if its memory allows."""
    if vae.device.type != "cuda":
        return 1
    pixels = bucket[0] * bucket[1]
    unused = torch.cuda.memory_reserved(vae.device) - torch.cuda.memory_allocated(vae.device)
    free = machine.free_gpu_memory(vae.device) + unused
    fits = int(0.8 * free) // (_BYTES_PER_PIXEL * vae.dtype.itemsize * pixels)
    return max(1, min(limit // pixels, fits))


def _encode(vae: Any, pixels: np.ndarray, limit: int) -> tuple[tuple[torch.Tensor, torch.Tensor], int]:
    """(`encode_images` of a batch, the pixels that fit). Where the device runs out of memory, the batch is halved."""
    size = len(pixels)
    while True:
        try:
            parts = [encode_images(vae, pixels[start : start + size]) for start in range(0, len(pixels), size)]
            mean, std = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            return (mean, std), limit
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        # Outside of the except block, so that nothing of the failed attempt is held any more.
        size = -(-size // 2)
        limit = size * pixels.shape[1] * pixels.shape[2]
        torch.cuda.empty_cache()
        _logger.warning("out of memory while encoding the images: now %d at a time", size)


@torch.no_grad()
def encode_images(vae: Any, pixels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, std) of the VAE's posteriors, each [B, 4, H/8, W/8] float16 on the CPU, of images [B, H, W, 3] uint8.

    Unscaled, as in `AutoencoderKL.encode(...).latent_dist`: the scaling factor is applied after sampling.
    """
    # Contiguous: otherwise a convolution takes other algorithms (channels last), which are slower on a GPU and round differently.
    image = torch.tensor(pixels).to(vae.device).permute(0, 3, 1, 2).contiguous().to(vae.dtype) / 127.5 - 1.0
    posterior = vae.encode(image).latent_dist
    return posterior.mean.half().cpu(), posterior.std.half().cpu()


def _require_finite(item: Item, *tensors: torch.Tensor) -> None:
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise UserError(
            f"the VAE gives values that are not finite for {item.sample.name}: SDXL's original VAE does so in fp16, "
            "so use a VAE whose config does not wrongly say force_upcast: false, or remove the image."
        )


def text_batch(device: torch.device) -> int:
    """How many chunks of captions are encoded at once: one on a CPU, where each is then bit for bit what it is alone."""
    return _TEXT_BATCH if device.type == "cuda" else 1


def encode_texts(
    store: Store,
    missing: TextEntries,
    encode: Callable[[list[str]], list[tuple[dict[str, torch.Tensor], int]]],
    *,
    batch: int = 1,
    rank: int = 0,
    world: int = 1,
    what: str = "caption",
) -> None:
    """Encodes this process's share of `missing` and adds it in fp16. UserError if an embedding is not finite.

    `encode` is given `batch` texts at a time; it returns for each the tensors by name and the number of tokens that were cut.
    `what` is what the texts are called.
    """
    mine = missing.take(owners(missing.keys, world) == rank)
    bar = progress(total=len(mine), description=f"encoding {what}s", unit=what, disable=rank > 0)
    with bar, store.writer() as writer:
        for start in range(0, len(mine), batch):
            texts = mine.texts[start : start + batch].to_pylist()
            keys = hex_digits(mine.keys[start : start + batch])
            for key, text, (tensors, cut) in zip(keys, texts, encode(texts), strict=True):
                writer.add(key, in_halves(tensors, text, what), {"caption": text, "tokens_cut": cut})
            bar.update(len(texts))


def in_halves(tensors: dict[str, torch.Tensor], text: str, what: str = "caption") -> dict[str, torch.Tensor]:
    """The embedding of a text in fp16 on the CPU. UserError if it is not finite."""
    halves = {name: tensor.half().cpu() for name, tensor in tensors.items()}
    if not all(tensor.isfinite().all() for tensor in halves.values()):
        raise UserError(f"the text encoder gives values that are not finite for the {what} {text!r}: check its files.")
    return halves
