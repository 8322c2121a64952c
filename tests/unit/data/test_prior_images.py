"""Prior images for measuring what is kept: some of those that are trained on are held out, by content; others stay separate."""

from __future__ import annotations

import shutil

import pytest
from drawn_pictures import picture

from sushi_research.errors import UserError


def fill(folder, first: int, count: int) -> None:
    for number in range(first, first + count):
        picture(folder / f"{number}.png", number)


@pytest.fixture
def photos(tmp_path):
    """Six photos, two to hold out elsewhere, and eight prior images below the photos, repeated as in kohya's scripts."""
    fill(tmp_path / "photos", 0, 6)
    fill(tmp_path / "held", 100, 2)
    fill(tmp_path / "photos/3_prior", 200, 8)
    return tmp_path


def test_prior_images_below_the_data_are_held_out_of_training(read, photos):
    held, prior = str(photos / "held"), photos / "photos/3_prior"
    data = read(path=held, prior_path=str(prior))
    assert len(data.prior) == 2 and data.scan.prior == sorted(item.sample.name for item in data.prior)
    assert all(name.startswith("3_prior/") for name in data.scan.prior)
    trained = {item.sample.name for item in data.items}
    assert len(trained) == 12 and not trained & set(data.scan.prior) and len(data.items) == 6 + 3 * 6
    # What is memorised is measured on the photos, of which there are as many as held-out images.
    assert len(data.trained) == 2 and not any(item.sample.name.startswith("3_prior/") for item in data.trained)

    # Neither names nor the order of the files matter.
    for number, path in enumerate(sorted(prior.glob("*.png"), reverse=True)):
        shutil.move(path, prior / f"renamed{number}.png")
        shutil.move(path.with_suffix(".txt"), prior / f"renamed{number}.txt")
    for number, path in enumerate(sorted((photos / "photos").glob("*.png"), reverse=True)):
        shutil.move(path, path.with_name(f"other{number}.png"))
        shutil.move(path.with_suffix(".txt"), path.with_name(f"other{number}.txt"))
    again = read(path=held, prior_path=str(prior))
    for one, other in ((data.prior, again.prior), (data.trained, again.trained)):
        assert [item.sample.image_hash for item in one] == [item.sample.image_hash for item in other]


def test_separate_prior_images_are_all_used(read, photos):
    fill(photos / "prior", 300, 3)
    data = read(path=str(photos / "held"), prior_path=str(photos / "prior"))
    assert sorted(item.sample.name for item in data.prior) == ["300.png", "301.png", "302.png"]
    assert data.scan.prior == [] and len({item.sample.name for item in data.items}) == 14
    (photos / "prior/broken.png").write_bytes(b"no picture")
    (photos / "prior/broken.txt").write_text("a caption")
    with pytest.raises(UserError, match="broken.png"):
        read(path=str(photos / "held"), prior_path=str(photos / "prior"))
    assert [problem["name"] for problem in read.report["prior_path"]["problems"]] == ["broken.png"]


@pytest.mark.parametrize(
    ("folder", "numbers", "message"),
    [
        ("copies", (0, 2), "copies has images that are also trained on, .* give a folder below data.path"),
        ("of_held", (100, 1), "of_held has images that are held out to measure what is learned, 100.png: remove"),
        ("photos/few", (400, 1), "of the 1 images of .*few, which are trained on, none would be held out"),
        ("photos", (0, 1), "prior_path is data.path itself"),
    ],
)
def test_prior_images_that_cannot_be_used_are_one_sentence(read, photos, folder, numbers, message):
    fill(photos / folder, *numbers)
    with pytest.raises(UserError, match=message) as caught:
        read(path=str(photos / "held"), prior_path=str(photos / folder))
    assert "\n" not in str(caught.value)


def test_held_out_images_are_none_of_the_prior_images(read, photos):
    data = read(held_out=0.5, prior_path=str(photos / "photos/3_prior"))
    assert len(data.held_out) == 3 and not any("prior" in item.sample.name for item in data.held_out)
    assert len(data.prior) == 2 and len(data.prior_trained) == 6


def test_a_prior_image_with_a_copy_among_the_photos_stays_in_training(read, photos):
    """Otherwise the copy would be neither trained on nor named as held out."""
    held, prior = str(photos / "held"), photos / "photos/3_prior"
    first = read(path=held, prior_path=str(prior))
    for number, name in enumerate(first.scan.prior):
        shutil.copy(photos / "photos" / name, photos / f"photos/copy{number}.png")
        (photos / f"photos/copy{number}.txt").write_text("a caption")
    data = read(path=held, prior_path=str(prior))
    assert len({item.sample.name for item in data.items}) + len(data.scan.prior) == 16
    assert data.prior and not set(data.scan.prior) & set(first.scan.prior)
