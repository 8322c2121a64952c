"""`torchvision.transforms.functional`: cutting out a part of an image."""

from __future__ import annotations

from PIL import Image


def crop(image: Image.Image, top: int, left: int, height: int, width: int) -> Image.Image:
    """The part of the image that begins at `left`, `top`."""
    return image.crop((left, top, left + width, top + height))
