"""The sample images of a list of prompts: every setting of each image, its file name and its label."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sushi_research.config import TrainingConfig
from sushi_research.config.prompts import Prompt
from sushi_research.config.section import require_few_images
from sushi_research.errors import UserError

# Chunks of 75 tokens to which two texts of different length are repeated: the least common multiple of 60 and 59 is 3,540.
MOST_CHUNKS = 64


@dataclass(frozen=True)
class SamplePrompt:
    """One sample image. `scale` is the LoRA scale, relative to that of the adapter; `height` and `width` are in pixels.

    `number` is that of its prompt in the list, from 0. `label` is the prompt, with what distinguishes the image from others;
    `prompt_label` is the same without the seed, unless the prompt has a seed of its own.
    """

    prompt: str
    negative_prompt: str
    seed: int
    width: int
    height: int
    steps: int
    guidance: float
    scale: float = 1.0
    number: int = 0
    label: str = ""
    prompt_label: str = ""

    @property
    def file_name(self) -> str:
        return f"{self.number:02d}-seed{self.seed}.png"


def of_run(config: TrainingConfig, prompts: Sequence[Prompt]) -> list[SamplePrompt]:
    """The sample images of a run, in their order; UserError if two of them would be the same."""
    defaults = {
        "negative_prompt": config.sample.negative_prompt,
        "width": config.sample.width or config.data.resolution,
        "height": config.sample.height or config.data.resolution,
        "steps": config.sample.steps,
        "guidance": config.sample.guidance,
    }
    return expand(prompts, config.sample.seeds, defaults)


def expand(prompts: Sequence[Prompt], seeds: Sequence[int], defaults: Mapping[str, Any]) -> list[SamplePrompt]:
    """The image of each prompt and seed (outer loop: prompts). A prompt with a seed of its own has one image.

    `defaults` are the settings of prompts that do not have their own. UserError for too many images, or two that would be the same.
    """
    try:
        require_few_images(len(prompts), len(seeds), "the prompts and seeds")
    except ValueError as error:
        raise UserError(f"{error}.") from None
    defaults = {**defaults, "scale": 1.0}
    found: dict[SamplePrompt, int] = {}
    for number, prompt in enumerate(prompts):
        settings = defaults | prompt.given
        for seed in seeds if prompt.seed is None else [prompt.seed]:
            image = SamplePrompt(**settings | {"seed": seed})
            if image in found:
                raise UserError(
                    f"the prompts {found[image] + 1} and {number + 1} are the same image ({image.prompt[:60]!r}, seed {seed}): "
                    "remove one, or give it another seed."
                )
            found[image] = number
    several = len({image.seed for image in found}) > 1
    return [
        replace(
            image,
            number=number,
            label=_label(image, defaults, several),
            prompt_label=_label(image, defaults, several and prompts[number].seed is not None),
        )
        for image, number in found.items()
    ]


def require_few_chunks(images: Sequence[SamplePrompt], chunks: Mapping[str, int]) -> None:
    """UserError if an image's prompt and negative prompt must be repeated so often that no memory holds them.

    `chunks` is the number of chunks of 75 tokens of each text that has more than one (models/truncation.py). Both texts are
    repeated to the same number (pipeline.embeddings).
    """
    for image in images:
        own, negative = chunks.get(image.prompt, 1), chunks.get(image.negative_prompt, 1)
        if (together := math.lcm(own, negative)) > max(MOST_CHUNKS, own, negative):
            raise UserError(
                f"the prompt {image.prompt[:60]!r} and its negative prompt have {own} and {negative} chunks of 75 tokens, which "
                f"are repeated to {together} each, and at most {MOST_CHUNKS} can be: shorten one of them."
            )


def _label(image: SamplePrompt, defaults: Mapping[str, Any], with_seed: bool) -> str:
    """The prompt, followed by the seed if wanted, and by every setting that is not the default."""
    parts = [f"seed {image.seed}"] if with_seed else []
    if (image.width, image.height) != (defaults["width"], defaults["height"]):
        parts.append(f"{image.width}x{image.height}")
    numbers = ("steps", "guidance", "scale")
    parts += [f"{name} {getattr(image, name):g}" for name in numbers if getattr(image, name) != defaults[name]]
    if image.negative_prompt != defaults["negative_prompt"]:
        parts.append(f"negative: {image.negative_prompt}" if image.negative_prompt else "no negative prompt")
    return f"{image.prompt} ({', '.join(parts)})" if parts else image.prompt
