"""A static batch reads as the batch that filled it, at addresses that stay."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from made_batches import batch_of

from sushi_research.fast.batch import Batch
from sushi_research.fast.static_batch import StaticBatch, shape_key, tensors_of


def read(batch: Batch | StaticBatch) -> list[torch.Tensor]:
    """All that a step may read of a batch."""
    draws = [batch.normal("noise"), batch.normal("offset", (4,)), batch.integers("timestep", 1000)]
    return [
        *draws,
        batch.mean,
        batch.std,
        batch.text["hidden"],
        batch.time_ids,
        batch.loss_weights,
        batch.to_base,
        batch.step,
    ]


def test_it_has_the_values_of_the_batch_that_filled_it_at_the_same_addresses():
    first, second = batch_of(1), batch_of(2)
    static = StaticBatch(first)
    with static.noting_draws(first):
        noted = read(static)
    assert all(map(torch.equal, noted, read(first)))
    static.fill(second)
    found = read(static)
    assert all(map(torch.equal, found, read(second)))
    assert [each.data_ptr() for each in found] == [each.data_ptr() for each in noted]
    own = {each.data_ptr() for batch in (first, second) for each in read(batch)}
    assert not own & {each.data_ptr() for each in found}
    assert len(static) == 2 and static.mask is None and static.roles is None


def test_a_draw_that_was_not_noted_is_refused():
    batch = batch_of(1)
    static = StaticBatch(batch)
    with static.noting_draws(batch):
        static.normal("noise")
    static.normal("noise")
    for ask in (
        lambda: static.normal("other"),
        lambda: static.normal("noise", (4,)),
        lambda: static.integers("noise", 2),
    ):
        with pytest.raises(RuntimeError, match="was not asked for"):
            ask()


@pytest.mark.parametrize("name", ["names", "keys", "seed", "prefetched"])
def test_what_a_recording_would_repeat_is_missing(name):
    with pytest.raises(AttributeError, match=f"cannot read batch.{name}"):
        getattr(StaticBatch(batch_of(1)), name)


def test_each_set_of_shapes_has_a_key_of_its_own():
    batch = batch_of(1)
    long = {"hidden": torch.zeros(2, 154, 8).half()}
    others = [
        batch_of(1, size=1),
        replace(batch, mean=torch.zeros(2, 4, 6, 4)),
        replace(batch, mean=batch.mean.half()),
        replace(batch, to_base=None),
        replace(batch, mask=torch.ones(2, 1, 4, 6)),
        replace(batch, roles=torch.zeros(2, dtype=torch.int64)),
        replace(batch, text=long),
        replace(batch, text=long | {"mask": torch.ones(2, 154, dtype=torch.bool)}),
    ]
    keys = {shape_key(each) for each in [batch, *others]}
    assert len(keys) == 1 + len(others)
    assert shape_key(batch_of(7)) == shape_key(batch)
    assert set(tensors_of(batch)) == {"mean", "std", "text.hidden", "time_ids", "loss_weights", "to_base", "step"}
