"""A run on several sets of images: what is used how often, what is cached, and what the run says of it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from script_runs import Trainer

from sushi_research.errors import UserError


def pictures(folder: Path, count: int, size: tuple[int, int], first: int) -> None:
    """Captioned pictures; `first` is the seed of the first."""
    folder.mkdir(parents=True)
    for number in range(count):
        coarse = np.random.default_rng(first + number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number} of {folder.parent.name}")


@pytest.fixture
def sets(tmp_path) -> list[dict]:
    """Three photos at two resolutions with random crops, and five class images that are mirrored and learn nothing."""
    pictures(tmp_path / "photos" / "me", 3, (160, 96), 0)
    pictures(tmp_path / "class" / "me", 5, (96, 96), 10)
    return [
        {"path": str(tmp_path / "photos" / "me"), "resolutions": [64, 96], "crop": "random", "crops": 3},
        {
            "path": str(tmp_path / "class" / "me"),
            "role": "regularisation",
            "flip": 1.0,
            "target": "base",
            "loss_weight": 0.5,
        },
    ]


@pytest.mark.parametrize("architecture", ["sdxl"])
def test_a_run_on_two_sets(trainer: Trainer, sets, capsys, tmp_path):
    changes = {"data.path": None, "data.sets": sets, "train.steps": 4, "train.batch_size": 3}
    changes |= {
        "sample.enabled": True,
        "sample.every": None,
        "sample.steps": 1,
        "sample.width": 32,
        "sample.height": 32,
    }
    assert trainer.train("two", changes) == 0
    plan, printed = trainer.plan("two"), capsys.readouterr().out
    # 3 photos at 2 resolutions, and as many uses of the 5 class images: one of them twice.
    assert plan["items_per_epoch"] == 12 and plan["images"] == 8
    assert [(each["folder"], each["images"], each["uses"]) for each in plan["sets"]] == [
        ("photos/me", 3, 6),
        ("class/me", 5, 6),
    ]
    assert "sets         photos/me: 3 images, at 64 and 96, 3 random crops each\n" in printed
    assert (
        "class/me (regularisation): 5 images, 6 per epoch, at 64, mirrored 1, loss x 0.5, target: the base's" in printed
    )
    # Each crop of each photo at each resolution, and each class image mirrored alone.
    assert plan["cache"]["images"]["needed"] == 3 * 2 * 3 + 5
    assert sorted(plan["sampling"]["prompts"]) == [f"picture {number} of photos" for number in range(3)]
    losses = [line["loss"] for line in trainer.metrics("two")]
    assert len(losses) == 4 and all(np.isfinite(losses))

    # A copy of the same images elsewhere continues the run; another loss weight does not.
    (tmp_path / "photos").rename(tmp_path / "moved")
    moved = [sets[0] | {"path": str(tmp_path / "moved" / "me")}, sets[1]]
    assert trainer.train("two", changes | {"data.sets": moved, "train.steps": 5}) == 0
    assert [line["step"] for line in trainer.metrics("two")] == [1, 2, 3, 4, 5]
    other = [moved[0], sets[1] | {"loss_weight": 1.0}]
    with pytest.raises(UserError, match="data.sets was"):
        trainer.train("two", changes | {"data.sets": other, "train.steps": 6})


@pytest.mark.parametrize("architecture", ["sd15"])
def test_one_set_is_the_same_run_as_its_path(trainer: Trainer, photos):
    """And goes on with the run of the short form."""
    assert trainer.train("one", {"train.steps": 2}) == 0
    whole = {"data.path": None, "data.sets": [{"path": str(photos)}]}
    assert trainer.train("set", whole | {"train.steps": 2}) == 0
    assert trainer.metrics("set") == trainer.metrics("one")
    assert trainer.train("one", whole | {"train.steps": 3}) == 0
    assert len(trainer.metrics("one")) == 3
