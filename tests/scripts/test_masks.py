"""A run with masks, and with regularisation images whose target is the base's own prediction."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from script_runs import Trainer, largest_difference

from sushi_research.errors import UserError

# Both scripts have the same step (test_training_step.py), and all else is shared.
pytestmark = pytest.mark.parametrize("architecture", ["sdxl"])


def add_masks(folder: Path) -> None:
    """A mask next to each image: its left third is white."""
    for path in sorted(folder.iterdir()):
        if path.suffix != ".txt":
            with Image.open(path) as image:
                mask = Image.new("L", image.size)
            mask.paste(255, (0, 0, mask.width // 3, mask.height))
            mask.save(path.with_name(f"{path.stem}-masklabel.png"))


@pytest.fixture
def masked(photos: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    add_masks(folder)
    return folder


def identity(trainer: Trainer, name: str) -> dict[str, object]:
    return json.loads((trainer.folder(name) / "run.json").read_text())["identity"]


def test_a_run_with_masks_and_prior_preservation(trainer: Trainer, photos: Path, masked: Path) -> None:
    sets = [
        {"path": str(masked), "masks": {"source": "files", "background": 0.0}},
        {"path": str(photos), "role": "regularisation", "target": "base", "loss_weight": 2.0},
    ]
    # A step is an epoch: seven images, and seven regularisation images.
    settings = {"data.path": None, "train.steps": 2, "train.batch_size": 7, "train.accumulation": 2}
    assert trainer.train("both", {**settings, "data.sets": sets}) == 0
    first, second = [line for line in trainer.metrics("both") if "loss" in line]
    # At its start the adapter changes nothing, so nothing is to be learned from the base.
    assert first["loss_by_role/regularisation"] == 0 < first["loss_by_role/train"]
    assert second["loss_by_role/regularisation"] > 0
    assert first["loss"] == pytest.approx(first["loss_by_role/train"] / 2)  # the weights of all 14 samples are 1 and 2
    weighted = (second["loss_by_role/train"] + 2 * second["loss_by_role/regularisation"]) / 2
    assert second["loss"] == pytest.approx(weighted)


def test_masks_are_learned_and_belong_to_the_run(trainer: Trainer, masked: Path) -> None:
    settings = {"data.path": str(masked), "masks.source": "files", "train.steps": 2, "data.flip": 0.5}
    assert trainer.train("masked", settings) == 0
    # A mask that is white all over is no mask, up to rounding.
    for mask in masked.glob("*-masklabel.png"):
        Image.new("L", Image.open(mask).size, 255).save(mask)
    with pytest.raises(UserError, match=r"data \(hash over every image, caption.*\) was .*, is now"):
        trainer.train("masked", {**settings, "train.steps": 3})
    assert trainer.train("white", settings) == 0
    for mask in masked.glob("*-masklabel.png"):
        mask.unlink()
    assert trainer.train("plain", {**settings, "masks.source": "none"}) == 0
    facts = {name: identity(trainer, name)["facts.data"] for name in ("masked", "white", "plain")}
    assert len(set(facts.values())) == 3
    plain = trainer.master_weights("plain")
    losses = {name: [line["loss"] for line in trainer.metrics(name) if "loss" in line] for name in facts}
    assert losses["white"] == pytest.approx(losses["plain"], rel=1e-5)
    assert losses["masked"] != pytest.approx(losses["plain"], rel=1e-3)
    assert largest_difference(trainer.master_weights("masked"), plain) > 1e-4
