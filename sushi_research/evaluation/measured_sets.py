"""What a run is measured on: one set for each of its result files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sushi_research.evaluation.drift import DriftSet
    from sushi_research.evaluation.pictures import PictureSet
    from sushi_research.evaluation.validation_set import ValidationSet


@dataclass(frozen=True)
class MeasuredSets:
    """The sets that a run is measured on; None for each that it is not. Without a validation set there is none of them.

    `validation`: the held-out images. `drift`: neutral captions, for the distance from the base's predictions. `base_images`: the
    images that the base generated for these captions. `prior`: images of `evaluation.prior_path`. `trained`: as many training
    images as there are held-out ones. `pictures_learned`: held-out captions that pictures are drawn for, to compare with the
    held-out images. `pictures_kept`: neutral captions that pictures are drawn for, to compare with the base's own pictures.
    """

    validation: ValidationSet | None = None
    drift: DriftSet | None = None
    base_images: DriftSet | None = None
    prior: ValidationSet | None = None
    trained: ValidationSet | None = None
    pictures_learned: PictureSet | None = None
    pictures_kept: PictureSet | None = None

    @property
    def pictures(self) -> list[PictureSet]:
        """The picture sets that there are."""
        return [each for each in (self.pictures_learned, self.pictures_kept) if each is not None]
