"""The names of an adapter's tensors, as checkpoints and the optimizer's groups have them.

<path>.<part>               a tensor of the UNet's layer at `path`, which is its path in the UNet without the adapter
<component>.<path>.<part>   a tensor of a text encoder
<component>.new_tokens.<token>   the vectors of a new token in a text encoder (models/new_tokens.py)

part                                            of
lora_A.weight, lora_B.weight                    LoRA and DoRA: the matrix that is applied first, and the second
magnitude                                       DoRA: the change of each input's magnitude, as a share of it
hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b      LoHa
lokr_w1, lokr_w2, lokr_w1_a, ...                LoKr
"""

from __future__ import annotations

import re
from typing import NamedTuple

OTHER_COMPONENTS = ("text_encoder", "text_encoder_2")
# In place of a layer's path; the part is the token.
NEW_TOKENS = "new_tokens"
_OF_TOKEN = re.compile(rf"({'|'.join(OTHER_COMPONENTS)})\.{NEW_TOKENS}\.(.+)")
_PART = re.compile(r"\.(lora_[AB]\.weight|magnitude|(?:hada|lokr)_\w+)$")
# The parts of a new adapter that are zero, so that it adds nothing: of LoKr the last one that is not whole, or w2.
_ZERO = ("lora_B.weight", "magnitude", "hada_w2_a", "lokr_w2", "lokr_w2_b")


class TensorName(NamedTuple):
    """A tensor's component, the path of its layer in it, and its part."""

    component: str
    path: str
    part: str

    def __str__(self) -> str:
        return module_name(self.component, self.path) + f".{self.part}"


def module_name(component: str, path: str) -> str:
    """The beginning of the names of a layer's tensors."""
    return path if component == "unet" else f"{component}.{path}"


def parse(name: str) -> TensorName:
    """The parts of a tensor's name."""
    if token := _OF_TOKEN.fullmatch(name):
        return TensorName(token[1], NEW_TOKENS, token[2])
    match = _PART.search(name)
    assert match, f"{name} is no tensor of an adapter"
    path, component = name[: match.start()], "unet"
    first, _, rest = path.partition(".")
    if first in OTHER_COMPONENTS:
        component, path = first, rest
    return TensorName(component, path, match[1])


def is_of_token(name: str) -> bool:
    """Whether a tensor is the vectors of a new token."""
    return _OF_TOKEN.fullmatch(name) is not None


def is_matrix(name: str) -> bool:
    """Whether a tensor is a matrix or a convolution's kernel: not the vectors of a new token, and not a magnitude."""
    return not is_of_token(name) and parse(name).part != "magnitude"


def starts_at_zero(name: str) -> bool:
    """Whether the tensor of a new adapter is zero. While all such tensors are, the adapter adds nothing."""
    return not is_of_token(name) and name.endswith(tuple(f".{part}" for part in _ZERO))
