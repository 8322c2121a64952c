"""How the step of an adapter file was chosen, in its metadata: so that it is not tested on the images that it was chosen on.

The best of several steps on some held-out images has a lower loss there than on other images. The images are recorded as in
trained_images.py, so another number of noise samples or another caption does not hide them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from sushi_research.adapters.trained_images import DIGITS, MAX_IMAGES
from sushi_research.errors import UserError
from sushi_research.models.header import read_header

SET_KEY, IMAGES_KEY = "sushi_research.chosen_on", "sushi_research.chosen_on_images"
STEP_KEY, AMONG_KEY = "sushi_research.chosen_step", "sushi_research.chosen_among"


@dataclass(frozen=True)
class ChosenStep:
    """The step was the best of the `among` evaluations up to it, on the validation set with this hash.

    `images` are beginnings of the content hashes of its images, None if the file does not say.
    """

    validation_set: str
    step: str
    among: str
    images: frozenset[str] | None

    def describe(self) -> str:
        return f"step {self.step}, the best of the evaluations up to it ({self.among}) on the validation set {self.validation_set}"

    def is_of(self, validation_set: str, image_hashes: Collection[str]) -> bool:
        """Whether it was chosen on this validation set, or on another one with an image of these."""
        shared = self.images or ()
        return self.validation_set == validation_set or any(each[:DIGITS] in shared for each in image_hashes)


def metadata_of(validation_set: str, image_hashes: Collection[str], step: int, among: int) -> dict[str, str]:
    """The metadata entries of a file whose step was chosen; without the images if there are more than MAX_IMAGES."""
    found = {SET_KEY: validation_set, STEP_KEY: str(step), AMONG_KEY: str(among)}
    images = sorted({image_hash[:DIGITS] for image_hash in image_hashes})
    return found | ({IMAGES_KEY: "".join(images)} if len(images) <= MAX_IMAGES else {})


def chosen_step(path: Path) -> ChosenStep | None:
    """How the file's step was chosen; None if it was not chosen, does not say so, or cannot be read."""
    try:
        metadata = read_header(Path(path)).metadata
    except UserError:
        return None
    if SET_KEY not in metadata:
        return None
    text = metadata.get(IMAGES_KEY)
    images = None if text is None else frozenset(text[at : at + DIGITS] for at in range(0, len(text), DIGITS))
    return ChosenStep(metadata[SET_KEY], metadata.get(STEP_KEY, "?"), metadata.get(AMONG_KEY, "?"), images)
