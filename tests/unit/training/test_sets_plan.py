"""What the plan says about a set of images."""

from dataclasses import replace

from sushi_research.training.sets_plan import SetPlan

PLAIN = SetPlan("cats", "cats", "train", 3, 6, (64,), "center", 1, 0.0, 0, 0.0, 1.0, "image", "none", 0.1, 0.2)


def test_masks_are_described_where_a_set_has_some():
    assert PLAIN.describe() == "cats: 3 images, 6 per epoch, at 64"
    assert replace(PLAIN, masks="files").describe() == (
        "cats: 3 images, 6 per epoch, at 64, masks: files, background 0.1, without their masks in 20% of the uses"
    )
