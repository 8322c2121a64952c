"""The settings of the adapter that is added to a component, and what they give for each of its layers."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import nn

from sushi_research.errors import UserError

Kind = Literal["lora", "dora", "loha", "lokr"]
# How the names of the text encoders' modules begin.
TEXT_ENCODER = "text_encoder"


class Override(Protocol):
    """Other settings of the modules that a pattern fits; None for what it does not give."""

    @property
    def modules(self) -> str: ...

    @property
    def rank(self) -> int | None: ...

    @property
    def alpha(self) -> float | None: ...


@dataclass(frozen=True)
class LayerSettings:
    """Rank and alpha of one layer. The layer's change is scaled by alpha / rank."""

    rank: int
    alpha: float


@dataclass(frozen=True)
class AdapterSettings:
    """The settings of one component's adapter; the names are those of the config section `lora`.

    `conv_rank` and `conv_alpha` are those of convolutions with a kernel larger than 1x1, None for those of all layers.
    """

    targets: str | Sequence[str]
    rank: int
    alpha: float
    kind: Kind = "lora"
    conv_rank: int | None = None
    conv_alpha: float | None = None
    overrides: Sequence[Override] = ()
    rank_stabilized: bool = False
    lokr_factor: int = -1
    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    init: Literal["default", "gaussian"] = "default"
    seed: int = 0

    def of_layer(self, name: str, layer: nn.Module) -> LayerSettings | None:
        """The settings of a layer by its name (`tensor_names.module_name`); None if it gets no adapter.

        With `rank_stabilized` the scale is alpha / sqrt(rank) (arXiv 2312.03732), which is here an alpha of sqrt(rank) times the
        setting: then a file of such an adapter needs nothing special.
        """
        rank, alpha = self.rank, self.alpha
        if is_large_kernel(layer):
            rank = rank if self.conv_rank is None else self.conv_rank
            alpha = alpha if self.conv_alpha is None else self.conv_alpha
        for override in self.overrides:
            if fits(override.modules, name):
                rank = rank if override.rank is None else override.rank
                alpha = alpha if override.alpha is None else override.alpha
        if rank == 0:
            return None
        return LayerSettings(rank, alpha * math.sqrt(rank) if self.rank_stabilized else alpha)

    @property
    def drops(self) -> bool:
        """Whether random numbers are drawn while training."""
        return bool(self.dropout or self.rank_dropout or self.module_dropout)


def settings_of(section: Any, seed: int) -> AdapterSettings:
    """The settings of the UNet's adapter, from the config section `lora`."""
    return AdapterSettings(
        targets=section.targets,
        rank=section.rank,
        alpha=section.alpha,
        kind=section.kind,
        conv_rank=section.conv_rank,
        conv_alpha=section.conv_alpha,
        overrides=tuple(section.overrides),
        rank_stabilized=section.rank_stabilized,
        lokr_factor=section.lokr_factor,
        dropout=section.dropout,
        rank_dropout=section.rank_dropout,
        module_dropout=section.module_dropout,
        init=section.init,
        seed=seed,
    )


def is_large_kernel(layer: nn.Module) -> bool:
    """Whether it is a convolution with a kernel larger than 1x1."""
    return isinstance(layer, nn.Conv2d) and tuple(layer.kernel_size) != (1, 1)


def fits(pattern: str, name: str) -> bool:
    """Whether a pattern of `lora.overrides` fits a module: the beginning of its name in whole parts, or a pattern with * and ?.

    The modules of a text encoder, whose names begin with it, are fitted only by patterns that begin with `text_encoder`: `*.0.*` is
    about the UNet, and leaves the settings of the section `text_encoders` alone.
    """
    if name.startswith(TEXT_ENCODER) and not pattern.startswith(TEXT_ENCODER):
        return False
    if any(letter in pattern for letter in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    start = pattern.rstrip(".")
    return name == start or name.startswith(f"{start}.")


def require_effect(settings: AdapterSettings, names: Iterable[str], large_kernels: int) -> None:
    """UserError for an override that fits none of the modules, and for settings of convolutions that none of them is.

    `names` are all modules that the targets name, of all components; `large_kernels` is how many of them are convolutions with a
    kernel larger than 1x1.
    """
    names = list(names)
    for number, override in enumerate(settings.overrides):
        pattern = override.modules
        if any(fits(pattern, name) for name in names):
            continue
        place = f"lora.overrides[{number}].modules is {pattern}"
        if not pattern.startswith("text_encoder"):
            raise UserError(
                f"{place}, which fits none of the {len(names)} modules of lora.targets: give the beginning of a path such as "
                f"{names[0]}, or a pattern such as *.attn2.*."
            )
        encoder = pattern.partition(".")[0]
        own = [name for name in names if name.startswith(f"{encoder}.")]
        own = own or [name for name in names if name.startswith("text_encoder")]
        if not own:
            raise UserError(f"{place}, but no text encoder is trained: remove it, or set text_encoders.train true.")
        raise UserError(
            f"{place}, which fits no trained module of a text encoder: give the beginning of a path such as {own[0]}."
        )
    for key in ("conv_rank", "conv_alpha"):
        if getattr(settings, key) is not None and not large_kernels:
            raise UserError(
                f"lora.{key} has no effect, because no module of lora.targets is a convolution with a kernel larger than 1x1: "
                "remove it, or take the targets kohya_conv."
            )
