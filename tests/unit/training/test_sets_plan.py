"""What the plan says about a set of images."""

from dataclasses import replace

from sushi_research.config import SD15Training
from sushi_research.config.sets import sets_of
from sushi_research.training.sets_plan import SetPlan, names_of

PLAIN = SetPlan("cats", "cats", "train", 3, 6, (64,), "center", 1, 0.0, 0, 0.0, 1.0, "image", "none", 0.1, 0.2)


def test_masks_are_described_where_a_set_has_some():
    assert PLAIN.describe() == "cats: 3 images, 6 per epoch, at 64"
    assert replace(PLAIN, masks="files").describe() == (
        "cats: 3 images, 6 per epoch, at 64, masks: files, background 0.1, without their masks in 20% of the uses"
    )


def test_sets_of_one_folder_are_told_apart():
    sets = [{"path": "a/cats"}, {"path": "dogs"}, {"path": "a/cats", "crop": "none"}]
    config = SD15Training(model={"base": "base"}, data={"sets": sets}, train={"steps": 1})
    assert names_of(sets_of(config)) == ["cats (data.sets[0])", "dogs", "cats (data.sets[2])"]
