"""Every way in which files spell the layers of a model, without the prefix, and with underscores for dots."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from sushi_research.adapters.formats import kohya
from sushi_research.models import Architecture
from sushi_research.models.original_names import unet_name


def spellings(component: str, paths: Collection[str], layers_per_block: int) -> dict[str, str]:
    """Spelling -> path of a layer of the component. `layers_per_block` is the UNet's, after which Stability numbers its blocks."""
    found: dict[str, str] = {}
    plain = _plain_up_blocks(paths)
    for path in paths:
        ways = _of_unet(path, layers_per_block, plain) if component == "unet" else _of_encoder(path)
        for way in ways:
            key = underscored(way)
            assert found.setdefault(key, path) == path, f"{key} is the spelling of two layers"
    return found


def underscored(name: str) -> str:
    """A module's name with underscores for dots, as kohya's naming has it."""
    return name.replace(".", "_")


def belongs(architecture: Architecture, prefix: str) -> bool:
    """Whether names for this architecture can have the prefix: kohya numbers text encoders only where there are two."""
    several = len(architecture.formats().TEXT_ENCODERS) > 1
    return prefix not in (kohya.OF_ONE_ENCODER if several else kohya.OF_TWO_ENCODERS)


def _of_unet(path: str, layers_per_block: int, plain: Collection[int]) -> Iterator[str]:
    yield path
    try:
        yield unet_name(path, layers_per_block=layers_per_block, plain_up_blocks=plain)
    except KeyError:
        return  # a layer that no UNet of Stability has


def _of_encoder(path: str) -> Iterable[str]:
    # transformers 5 dropped `text_model.` from the paths of CLIPTextModel, but not from those with a projection.
    short = path.removeprefix("text_model.")
    return dict.fromkeys((path, short, f"text_model.{short}"))


def _plain_up_blocks(paths: Iterable[str]) -> set[int]:
    """The up blocks of a UNet without attention, as `unet_name` needs them."""
    blocks: dict[int, bool] = {}
    for path in paths:
        if path.startswith("up_blocks."):
            _, number, kind, *_ = path.split(".")
            blocks[int(number)] = blocks.get(int(number), False) or kind == "attentions"
    return {number for number, has_attention in blocks.items() if not has_attention}
