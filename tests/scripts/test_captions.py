"""Caption rules through the training scripts: what the cache holds, what each step is given, what a resumed run keeps."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
from script_runs import Trainer, assert_equal

from sushi_research.data.captions import run_captions
from sushi_research.errors import UserError
from sushi_research.training.batch_text import BatchText

TAGS = "a, b, c, d, e, f"
# Seven images; two steps of four are an epoch and one image.
SHUFFLED = {"captions.shuffle": True, "captions.keep_tags": 1, "train.steps": 4}


@pytest.fixture
def mine(architecture, bases, photos, tmp_path) -> Trainer:
    """A trainer with a copy of the photos, whose captions are tags, and a cache of its own."""
    copy = shutil.copytree(photos, tmp_path / "photos")
    for number, path in enumerate(sorted(copy.rglob("*.txt"))):
        path.write_text(f"{number}, {TAGS}", encoding="utf-8")
    return Trainer(architecture, bases[architecture], copy, tmp_path / "runs", tmp_path / "cache")


@pytest.fixture
def used(monkeypatch) -> list[tuple[str, int, str]]:
    """(image, epoch, text) of every sample that a step is given, in order."""
    found: list[tuple[str, int, str]] = []
    embed = BatchText.__call__

    def record(self: BatchText, samples: Any) -> Any:
        for sample in samples:
            name = self.captions.items[sample.index].sample.name
            found.append((name, sample.epoch, self.captions.text_of(sample.index, sample.epoch)))
        return embed(self, samples)

    monkeypatch.setattr(BatchText, "__call__", record)
    return found


@pytest.mark.parametrize("architecture", ["sd15"])
def test_a_longer_run_goes_on_with_the_variants_that_it_has(mine, used, monkeypatch):
    monkeypatch.setattr(run_captions, "MOST_CHUNKS", 14)
    assert mine.train("run", SHUFFLED | {"train.steps": 3}) == 0
    first = used.copy()
    plan = mine.plan("run")["captions"]
    assert (plan["variants"], plan["largest"], plan["is_limited"]) == (None, 2, False)
    # Each use has a variant of its own, which begins with the tag that is kept, and no other text is encoded.
    assert len({text for _, _, text in first}) == 12 == plan["texts"] == len(first)
    assert all(text.startswith(tuple("0123456")) for _, _, text in first)
    # A new run of this length would have two variants of each caption.
    assert mine.train("run", SHUFFLED | {"train.steps": 8}) == 0
    assert mine.plan("run")["captions"]["variants"] is None
    used.clear()
    assert mine.train("other", SHUFFLED | {"train.steps": 8}) == 0
    assert mine.plan("other")["captions"]["variants"] == 2
    with pytest.raises(UserError, match=r"number of variants.* was \"one per use\", is now 3"):
        mine.train("run", SHUFFLED | {"train.steps": 8, "captions.variants": 3})


@pytest.mark.parametrize("architecture", ["sd15"])
def test_encoding_in_the_step_trains_the_same(mine):
    changes = SHUFFLED | {
        "captions.tag_dropout": 0.3,
        "captions.dropout": 0.3,
        "captions.trigger": "sks",
        "captions.chunks": 2,
    }
    assert mine.train("before", changes) == 0
    assert mine.train("while", changes | {"captions.encode": "while_training"}) == 0
    assert_equal(mine.adapter("while"), mine.adapter("before"))
    assert mine.plan("while")["captions"]["encoders"] > 0 and mine.plan("while")["captions"]["texts"] is None
