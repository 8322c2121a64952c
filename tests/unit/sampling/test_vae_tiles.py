"""The VAE decodes whole images where the memory is there, and otherwise in tiles, as diffusers does."""

import logging

import pytest
import torch

from sushi_research.models import loading
from sushi_research.sampling import pipeline, vae_tiles

LATENTS = torch.randn(1, 4, 12, 20, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def vae(bases, monkeypatch):
    """A VAE whose decoder runs out of memory above `limit` pixels; tiles of 64 and 32 pixels."""
    vae = loading.load_vae(loading.resolve_base(str(bases["sd15"])), torch.float32, torch.device("cpu"))
    monkeypatch.setattr(vae_tiles, "TILES", (64, 32))
    vae_tiles._report.cache_clear()
    decode, vae.limit, vae.shapes = vae.decoder.forward, 10**9, []

    def forward(tile, *arguments):
        vae.shapes.append((8 * tile.shape[2], 8 * tile.shape[3]))
        if 64 * tile.shape[2] * tile.shape[3] > vae.limit:
            raise torch.OutOfMemoryError("no memory")
        return decode(tile, *arguments)

    vae.decoder.forward = forward
    return vae


def test_with_enough_memory_images_are_whole(vae, caplog):
    decoded = vae_tiles.decode_latents(vae, LATENTS)
    assert vae.shapes == [(96, 160)] and not vae.use_tiling and not caplog.records
    assert torch.equal(decoded, vae.decode(LATENTS).sample)


@pytest.mark.parametrize(("limit", "tile"), [(64 * 64, 64), (32 * 32, 32)])
def test_with_too_little_memory_they_are_tiled_as_diffusers_does_it(vae, limit, tile, caplog):
    vae.limit = limit
    with caplog.at_level(logging.WARNING):
        first, second = pipeline.decode(vae, [LATENTS, LATENTS.flip(-1)], 1.0, ["a", "b"])
    assert first.size == second.size == (160, 96)
    assert len(caplog.records) == 1 and "decodes it in tiles" in caplog.text
    vae.disable_tiling()
    vae.limit = 10**9
    whole = vae.decode(LATENTS).sample
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = tile, tile // 8
    expected = vae.decode(LATENTS).sample
    assert torch.equal(vae_tiles.decode_latents(vae, LATENTS), expected) and not torch.equal(expected, whole)
    [[again]] = [pipeline.decode(vae, [LATENTS], 1.0, ["a"])]
    assert again.tobytes() == first.tobytes()


def test_what_does_not_fit_in_the_smallest_tiles_is_out_of_memory(vae):
    vae.limit = 10
    with pytest.raises(torch.OutOfMemoryError):
        vae_tiles.decode_latents(vae, LATENTS)
    assert vae.shapes == [(96, 160), (64, 64), (32, 32)]
