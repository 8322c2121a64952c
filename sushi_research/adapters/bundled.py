"""New tokens in adapter files, and in files of their own.

In an adapter file they have the keys that A1111 defines (its pull request 13568; Forge has them too):

    bundle_emb.TOKEN.string_to_param.*                    SD1.5, [vectors, 768]
    bundle_emb.TOKEN.clip_l, bundle_emb.TOKEN.clip_g      SDXL, [vectors, 768] and [vectors, 1280]

ComfyUI leaves them out, and diffusers refuses a file with them. So there is a file for each token besides: `emb_params`, or
`clip_l` and `clip_g`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from sushi_research.adapters import tensor_names
from sushi_research.config.text_encoders import file_part
from sushi_research.errors import UserError
from sushi_research.files import write_atomic

# Token -> name of a text encoder -> vectors [n, width].
Tokens = dict[str, dict[str, torch.Tensor]]

_KEY = re.compile(r"bundle_emb\.(.+)\.(string_to_param\.\*|emb_params|clip_l|clip_g)", re.DOTALL)
_ENCODERS = {
    "string_to_param.*": "text_encoder",
    "emb_params": "text_encoder",
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
}
# Text encoders -> their names in an adapter file, and in one of its own.
_BUNDLED = {1: ("string_to_param.*",), 2: ("clip_l", "clip_g")}
_ALONE = {1: ("emb_params",), 2: ("clip_l", "clip_g")}
# Program -> why it does not load an adapter file with new tokens as it is, as in portability.py.
LIMITS = {"diffusers": "it refuses a file with new tokens (docs/new_tokens.md)"}
# Of all tokens of a file. More than anyone trains; it bounds what a file can ask for.
MOST_VECTORS = 1_000


def tokens_of(state: Mapping[str, torch.Tensor]) -> Tokens:
    """The new tokens among tensors with the names of checkpoints."""
    found: Tokens = {}
    for name, tensor in state.items():
        if tensor_names.is_of_token(name):
            component, _, token = tensor_names.parse(name)
            found.setdefault(token, {})[component] = tensor
    return found


def bundled_tensors(state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of an adapter file for the new tokens of a state, by key."""
    return {key: vectors.to("cpu", dtype).contiguous() for key, vectors in by_key(tokens_of(state)).items()}


def by_key(tokens: Tokens) -> dict[str, torch.Tensor]:
    """New tokens by the keys of an adapter file."""
    return {
        f"bundle_emb.{token}.{key}": own[encoder]
        for token, own in tokens.items()
        for key, encoder in zip(_BUNDLED[len(own)], sorted(own), strict=True)
    }


def files_of(path: Path, tokens: list[str]) -> dict[str, Path]:
    """Token -> the file of its own next to the adapter file `path`: NAME-TOKEN.safetensors."""
    return {token: path.with_name(f"{path.stem}-{file_part(token)}.safetensors") for token in tokens}


def write_files(path: Path, state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Writes the file of each new token of a state; UserError if one cannot be written."""
    tokens = tokens_of(state)
    for token, file in files_of(path, list(tokens)).items():
        write_atomic(file, _file(tokens[token], dtype))


def files_from(path: Path) -> dict[str, tuple[str, bytes]]:
    """Token -> (name, content) of a file of its own, from an adapter file: what `write_files` wrote, if it did."""
    from safetensors import safe_open

    tokens: Tokens = {}
    with safe_open(path, "pt") as file:
        for key in sorted(file.keys()):
            if place := place_of_token(key):
                tokens.setdefault(place[0], {})[place[1]] = file.get_tensor(key)
    names = files_of(path, list(tokens))
    return {token: (names[token].name, _file(own, next(iter(own.values())).dtype)) for token, own in tokens.items()}


def _file(own: Mapping[str, torch.Tensor], dtype: torch.dtype) -> bytes:
    """The content of the file of one token, whose vectors are by text encoder."""
    import safetensors.torch

    keys = _ALONE[len(own)]
    ordered = (own[name] for name in sorted(own))
    return safetensors.torch.save(
        {key: each.to("cpu", dtype).contiguous() for key, each in zip(keys, ordered, strict=True)}
    )


def without_tokens(path: Path) -> dict[str, torch.Tensor] | None:
    """The tensors of an adapter file besides its new tokens; None if it has none."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        keys = list(file.keys())
        others = [key for key in keys if place_of_token(key) is None]
        return None if len(others) == len(keys) else {key: file.get_tensor(key) for key in others}


def place_of_token(key: str) -> tuple[str, str] | None:
    """(token, name of the text encoder) of a key of an adapter file; None if it is that of no new token."""
    match = _KEY.fullmatch(key)
    return None if match is None else (match[1], _ENCODERS[match[2]])


def require_sound(path: Path, tokens: Tokens) -> None:
    """UserError unless each token has finite vectors, for the same text encoders and as many for each."""
    encoders = {frozenset(own) for own in tokens.values()}
    total = 0
    for token, own in tokens.items():
        shown = f"{token!r:.100}"
        if not token.isprintable() or token.split() != [token] or len(token) > 100:
            raise UserError(
                f"{path} holds a new token with the name {shown}: take a copy with a word of letters and signs."
            )
        shapes = [tuple(vectors.shape) for vectors in own.values()]
        if any(len(shape) != 2 or not shape[0] for shape in shapes) or len({shape[0] for shape in shapes}) > 1:
            raise UserError(
                f"{path} holds the new token {shown} with the shapes {', '.join(str(list(each)) for each in shapes)}, and "
                "each text encoder needs as many [n, width]: take another copy."
            )
        if not all(vectors.is_floating_point() for vectors in own.values()):
            raise UserError(
                f"{path} holds the new token {shown} with vectors that are no floating-point numbers: take another copy."
            )
        total += shapes[0][0]
    if total > MOST_VECTORS:
        raise UserError(
            f"{path} holds new tokens with {total:,} vectors, and at most {MOST_VECTORS:,} can be used: give another file."
        )
    if len(encoders) > 1 or any("text_encoder" not in each for each in encoders):
        raise UserError(
            f"{path} holds new tokens of different text encoders: take a copy that has all of them for each."
        )
    if len({token.lower() for token in tokens}) < len(tokens):
        raise UserError(f"{path} holds a new token twice, in upper and lower case: take a copy that has it once.")


def require_fitting(path: Path, tokens: Tokens, widths: Mapping[str, int]) -> None:
    """UserError unless the vectors are those of text encoders with these widths, by name."""
    for token, own in tokens.items():
        found = {name: vectors.shape[1] for name, vectors in own.items()}
        if found != dict(widths):
            raise UserError(
                f"{path}: the vectors of the new token {token:.100} have {' and '.join(map(str, found.values()))} numbers, and the "
                f"text encoders of this base have {' and '.join(map(str, widths.values()))}: give an adapter for this base."
            )
