"""Holding images out of the training data: copies of one image are never on both sides."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from sushi_research.data.held_out import hold_out
from sushi_research.data.near_duplicates import fingerprint
from sushi_research.data.samples import Sample
from sushi_research.data.scan import Scan
from sushi_research.errors import UserError


def sample(name: str, pixels: np.ndarray) -> Sample:
    return Sample(name, f"hash of {name}", "a caption", 64, 64, 1, bytes, partial(fingerprint, pixels))


def scan_with_copies(count: int = 12) -> Scan:
    """Different images, each with a darker copy of itself under another content hash."""
    rng, samples = np.random.default_rng(0), []
    for number in range(count):
        pixels = np.kron(rng.integers(60, 200, (8, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        samples += [sample(f"{number}", pixels), sample(f"{number} copy", (pixels * 0.95).astype(np.uint8))]
    return Scan("photos", samples)


@pytest.mark.parametrize("fraction", [0.2, 0.5])
def test_near_duplicates_are_held_out_together(fraction):
    scan = scan_with_copies()
    held = {found.name for found in hold_out(scan, fraction)}
    trained = {found.name for found in scan.samples}
    assert held and trained and not held & trained and len(held | trained) == 24
    assert scan.held_out == sorted(held)
    for number in range(12):
        assert (f"{number}" in held) == (f"{number} copy" in held), number


def test_equal_files_count_as_often_as_they_are_there():
    scan = Scan("photos", scan_with_copies(20).samples[::2])
    first = min(scan.samples, key=lambda found: found.name)
    for number in range(20):
        scan.samples.append(replace(first, name=f"again {number}", caption="another"))
    held = hold_out(scan, 0.2)
    assert len(held) == 8 and len(scan.samples) == 32
    assert not any(found.image_hash == first.image_hash for found in held)


def test_nothing_to_train_on_is_refused():
    with pytest.raises(UserError, match=r"holds out .* of the 1 distinct images in photos \(images that resemble"):
        hold_out(scan_with_copies(1), 0.5)
