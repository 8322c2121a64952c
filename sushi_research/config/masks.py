"""The config section of masks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sushi_research.config.section import Location, Section, Text


class MaskSection(Section):
    """Masks: how much each part of an image counts in the loss."""

    source: Literal["none", "alpha", "files", "column"] = Field(
        "none",
        description="Where the masks are: alpha = the transparency of the images; files = cat-masklabel.png, cat.mask.png or "
        "cat_mask.png next to cat.jpg, or one of them or cat.png in masks.folder; column = an image column of an HF dataset",
    )
    folder: Location | None = Field(
        None,
        description="Folder of the mask files, with the names and folders of the images; null = next to the images",
    )
    column: Text = Field("mask", description="Column of the masks in an HF dataset")
    background: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Weight of what is black in the mask; white has weight 1. 0 = the background is not learned at all",
    )
    unmasked: float = Field(
        0.0, ge=0, le=1, description="Probability that an image is used without its mask; each epoch samples again"
    )
    invert: bool = Field(False, description="Learn what is black in the mask, and not what is white")
