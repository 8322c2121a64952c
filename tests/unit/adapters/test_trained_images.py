"""An adapter file knows the images that it was trained on, and a file that does not know says so."""

import pytest
import torch
from safetensors.torch import save_file

from sushi_research.adapters import trained_images
from sushi_research.adapters.trained_images import metadata_of, trained_on
from sushi_research.data.samples import Sample
from sushi_research.errors import UserError
from sushi_research.evaluation.unseen import describe, may_have_seen, require_unseen

HASHES = [f"{number:032x}"[::-1] for number in range(8)]


def adapter(path, **metadata):
    save_file({"a": torch.zeros(1)}, path, metadata=metadata or None)
    return str(path)


def samples(*numbers):
    return [Sample(f"{number}.png", HASHES[number], "a caption", 64, 64, 1, bytes) for number in numbers]


def test_images_come_back_and_too_many_are_not_written(tmp_path, monkeypatch):
    path = adapter(tmp_path / "a.safetensors", **metadata_of(HASHES[:4] + HASHES[:2]))
    file = trained_on(path)
    assert file.seen(HASHES[2:6]) == set(HASHES[2:4]) and file.dataset_hash is None
    monkeypatch.setattr(trained_images, "MAX_IMAGES", 3)
    assert metadata_of(HASHES[:4]) == {}


def test_a_file_that_saw_some_of_the_images_is_refused(tmp_path):
    new = adapter(tmp_path / "new.safetensors", **metadata_of(HASHES[:6]))
    old = adapter(tmp_path / "old.safetensors", **{trained_images.DATASET_KEY: "d" * 32})
    other = adapter(tmp_path / "other.safetensors")
    unseen = require_unseen([new, old, other], samples(6, 7), "photos", lambda: "e" * 32)
    assert unseen == {new: True, old: False, other: False}
    said = dict(zip(unseen, describe(unseen), strict=True))
    assert f"{new}: trained on none of them" in said[new] and f"{other}: not known whether" in said[other]
    with pytest.raises(
        UserError, match=r"new.safetensors was trained on 1 of the 2 images of photos \(5.png\): give images"
    ):
        require_unseen([other, new], samples(5, 6), "photos", lambda: "e" * 32)
    with pytest.raises(UserError, match=r"not seen \(--evaluation.prior_path\)"):
        require_unseen([new], samples(5, 6), "prior", lambda: None, "--evaluation.prior_path")
    with pytest.raises(UserError, match="old.safetensors was trained on the images of photos: give images"):
        require_unseen([old], samples(6, 7), "photos", lambda: "d" * 32)


def test_a_file_that_started_from_another_has_seen_the_images_of_both(tmp_path):
    first = adapter(tmp_path / "first.safetensors", **metadata_of(HASHES[:2]))
    second = adapter(tmp_path / "second.safetensors", **metadata_of(HASHES[2:4], trained_on(first)))
    assert trained_on(second).seen(HASHES[:6]) == set(HASHES[:4]) and trained_on(second).is_complete
    odd = adapter(
        tmp_path / "odd.safetensors", **{trained_images.KEY: metadata_of(HASHES[:1])[trained_images.KEY] + "0"}
    )
    after = adapter(tmp_path / "after.safetensors", **metadata_of(HASHES[1:4], trained_on(odd)))
    assert trained_on(after).seen(HASHES) == set(HASHES[:4])
    # Of a file of another trainer, and of all that start from it in turn, the images are not known.
    foreign = trained_on(adapter(tmp_path / "foreign.safetensors"))
    third = adapter(tmp_path / "third.safetensors", **metadata_of(HASHES[4:5], foreign))
    fourth = adapter(tmp_path / "fourth.safetensors", **metadata_of(HASHES[5:6], trained_on(third)))
    assert require_unseen([fourth], samples(6, 7), "photos", lambda: None) == {fourth: False}
    assert may_have_seen(fourth, HASHES[4:7]) and not may_have_seen(second, HASHES[3:5])
    with pytest.raises(UserError, match="fourth.safetensors was trained on 1 of the 2 images"):
        require_unseen([fourth], samples(4, 7), "photos", lambda: None)
