"""`torchvision.transforms`: the classes that diffusers' text-to-image LoRA scripts and sd-scripts use."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from torchvision.transforms.functional import crop


class InterpolationMode(enum.Enum):
    """How an image is resized."""

    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class Compose:
    """One transform after another."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = transforms

    def __call__(self, image: Any) -> Any:
        for transform in self.transforms:
            image = transform(image)
        return image


class Lambda:
    """Any function."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __call__(self, image: Any) -> Any:
        return self.function(image)


class Resize:
    """Resizes to a shorter side of `size` pixels."""

    def __init__(self, size: int, interpolation: InterpolationMode = InterpolationMode.BILINEAR) -> None:
        self.size, self.interpolation = size, Image.Resampling[interpolation.name]

    def __call__(self, image: Image.Image) -> Image.Image:
        shorter = min(image.size)
        if shorter == self.size:
            return image
        width, height = (int(self.size * side / shorter) for side in image.size)
        return image.resize((width, height), self.interpolation)


class CenterCrop:
    """Cuts out the middle, `size` pixels square."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        left, top = (round((side - self.size) / 2) for side in image.size)
        return crop(image, top, left, self.size, self.size)


class RandomCrop:
    """Cuts out a random square of `size` pixels."""

    def __init__(self, size: int) -> None:
        self.size = size

    @staticmethod
    def get_params(image: Image.Image, output_size: tuple[int, int]) -> tuple[int, int, int, int]:
        """(top, left, height, width) of a random part of the size `output_size`, (height, width)."""
        height, width = output_size
        top = int(torch.randint(0, image.height - height + 1, (1,)))
        left = int(torch.randint(0, image.width - width + 1, (1,)))
        return top, left, height, width

    def __call__(self, image: Image.Image) -> Image.Image:
        return crop(image, *self.get_params(image, (self.size, self.size)))


class RandomHorizontalFlip:
    """Mirrors with the probability `p`."""

    def __init__(self, p: float = 0.5) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if float(torch.rand(1)) < self.p else image


class ToTensor:
    """[channels, height, width] fp32 in 0 to 1."""

    def __call__(self, image: Image.Image | np.ndarray) -> torch.Tensor:
        pixels = np.array(image, copy=True)
        return torch.from_numpy(pixels).reshape(*pixels.shape[:2], -1).permute(2, 0, 1).contiguous().float().div(255)


class Normalize:
    """(value - mean) / standard deviation, per channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return (image - self.mean) / self.std
