"""The parts of one module in an adapter file: checked by their shapes before any value is read, and made to an entry.

A part is named as in formats/: `down`, `up`, `alpha`, `hada_w1_a`, `diff` ... Shapes are checked among the parts here, and against
the layers of a model in matching.py, so that nothing is computed from parts that do not fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from sushi_research.adapters.entries import Difference, Entry, Hadamard, Kronecker, LowRank
from sushi_research.errors import UserError
from sushi_research.models.header import Header

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
INTEGERS = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")

# The numbers of one tensor. The largest layer of SDXL has 29 million, and a pair of rank 8,192 for its widest layer 84 million.
MOST_NUMBERS = 2**27

# What a module can be -> its parts that there must be, and those that there can be.
_KINDS: dict[type, tuple[tuple[str, ...], tuple[str, ...]]] = {
    LowRank: (("down", "up"), ("mid", "up_bias")),
    Hadamard: (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ("hada_t1", "hada_t2")),
    Kronecker: ((), ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")),
    Difference: ((), ("diff",)),
}
# What several kinds can have beside them.
_COMMON = ("alpha", "magnitude", "output_magnitude", "diff_b")

Shape = tuple[int, ...]


def kind_of(parts: Mapping[str, str]) -> type:
    """The kind of entry that a module's parts are of; that of the first if they are of several (`require_sound`)."""
    own = [part for part in parts if part not in _COMMON]
    for kind, (needed, others) in _KINDS.items():
        if own and own[0] in (*needed, *others):
            return kind
    return Difference if "diff_b" in parts else LowRank


def require_sound(header: Header, name: str, parts: Mapping[str, str]) -> None:
    """UserError unless the parts, each with its tensor's name, are those of one entry: complete, of numbers, of shapes that fit."""
    path, kind = header.path, kind_of(parts)
    needed, others = _KINDS[kind]
    if strange := [part for part in parts if part not in (*needed, *others, *_COMMON)]:
        first = next(part for part in parts if part in (*needed, *others))
        raise UserError(
            f"{path} holds {shown(parts[first])} and {shown(parts[strange[0]])}, which are parts of two kinds of adapter of one "
            "module: take another copy of the adapter."
        )
    if missing := _missing(kind, needed, parts):
        raise UserError(
            f"{path} holds {shown(min(parts.values()))} without the {missing} matrix of that module: take a complete copy."
        )
    for part, key in parts.items():
        dtype = header.tensors[key].dtype
        if dtype not in (FLOATS + INTEGERS if part == "alpha" else FLOATS):
            wanted = "an alpha is a real number" if part == "alpha" else f"matrices are read in {', '.join(FLOATS)}"
            raise UserError(f"{path} holds {shown(key)} in {dtype}, and {wanted}: take another copy of the adapter.")
    shapes = {part: header.tensors[key].shape for part, key in parts.items()}
    if large := [part for part, shape in shapes.items() if math.prod(shape) > MOST_NUMBERS]:
        raise UserError(
            f"{path} holds {shown(parts[large[0]])} of the shape {_sizes(shapes[large[0]])}, more numbers than an adapter of any "
            "layer needs: take another copy of the adapter."
        )
    if "alpha" in parts and (kind is Difference or math.prod(shapes["alpha"]) != 1):
        fault = (
            "beside a whole difference, which has none"
            if kind is Difference
            else f"with {math.prod(shapes['alpha'])} values, and an alpha is one number"
        )
        raise UserError(f"{path} holds {shown(parts['alpha'])} {fault}: take another copy of the adapter.")
    if {"magnitude", "output_magnitude"} & shapes.keys():
        _require_magnitude(path, kind, parts, shapes)
    if fault := _FAULTS[kind](shapes):
        raise UserError(f"{path}: the matrices of {shown(name)} {fault}: take another copy of the adapter.")
    for part in ("diff_b", "up_bias"):
        if part in shapes and (len(shapes[part]) != 1 or shapes[part][0] == 0):
            raise UserError(
                f"{path} holds {shown(parts[part])} of the shape {_sizes(shapes[part])}, and a bias is a list of numbers: "
                "take another copy of the adapter."
            )
    if "diff_b" in parts and "up_bias" in parts:
        raise UserError(
            f"{path} holds {shown(parts['diff_b'])} and {shown(parts['up_bias'])}, which change the same bias: take another "
            "copy of the adapter."
        )


def rank_of(shapes: Mapping[str, Shape]) -> int | None:
    """The number by which an alpha is divided; None for an entry without one, whose scale is 1.

    A LoKr of two whole matrices has an alpha in its file that no program uses.
    """
    places = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
    return next((shapes[part][0] for part in places if part in shapes), None)


def make(name: str, parts: Mapping[str, torch.Tensor], scale: float) -> Entry:
    """The entry of sound parts, in the file's dtypes. `scale` is alpha / rank."""
    kind = kind_of(dict.fromkeys(parts, ""))
    if kind is Difference:
        return Difference(name, parts.get("diff"), parts.get("diff_b"))
    magnitude, bias = parts.get("magnitude"), parts.get("diff_b")
    if "output_magnitude" in parts:
        count = 2 if any(each.ndim == 2 for part, each in parts.items() if part in ("down", "hada_w1_b")) else 4
        magnitude = parts["output_magnitude"].reshape(-1, *[1] * (count - 1))
    if "up_bias" in parts:
        bias = parts["up_bias"] if scale == 1 else parts["up_bias"].float() * scale
    common = {"name": name, "scale": scale, "magnitude": magnitude, "bias": bias}
    own = {part.removeprefix("hada_").removeprefix("lokr_"): value for part, value in parts.items()}
    fields = {field: value for field, value in own.items() if field in kind.__dataclass_fields__}
    return kind(**fields | common)


def shown(key: str) -> str:
    """A tensor's name in a message; names from a file can be empty or long."""
    return key if 0 < len(key) <= 200 else repr(key[:200])


def _missing(kind: type, needed: tuple[str, ...], parts: Mapping[str, str]) -> str | None:
    """The title of the first matrix that an entry lacks."""
    if missing := next((part for part in needed if part not in parts), None):
        return missing.removeprefix("hada_")
    if kind is Hadamard and ("hada_t1" in parts) != ("hada_t2" in parts):
        return "t2" if "hada_t1" in parts else "t1"
    if kind is Difference and not {"diff", "diff_b"} & parts.keys():
        return "difference"
    if kind is Kronecker:
        for number in "12":
            whole, first, second = (f"lokr_w{number}{end}" for end in ("", "_a", "_b"))
            if whole in parts:
                continue
            if missing := next((part for part in (first, second) if part not in parts), None):
                return (missing if {first, second} & parts.keys() else whole).removeprefix("lokr_")
    return None


def _require_magnitude(path: Path, kind: type, parts: Mapping[str, str], shapes: Mapping[str, Shape]) -> None:
    keys = [part for part in ("magnitude", "output_magnitude") if part in shapes]
    fault = None
    if len(keys) == 2:
        fault = f"and {shown(parts[keys[1]])}, which are both the magnitude of one module"
    elif kind is Difference:
        fault = "beside a whole difference, which has no magnitude"
    elif max(shapes[keys[0]], default=0) != math.prod(shapes[keys[0]]) or 0 in shapes[keys[0]]:
        fault = f"of the shape {_sizes(shapes[keys[0]])}, and a magnitude is one number for each output or each input"
    if fault:
        raise UserError(f"{path} holds {shown(parts[keys[0]])} {fault}: take another copy of the adapter.")


def _low_rank_fault(shapes: Mapping[str, Shape]) -> str | None:
    down, up, mid = shapes["down"], shapes["up"], shapes.get("mid")
    found = f"have the shapes {_sizes(down)} and {_sizes(up)}"
    if len(down) not in (2, 4) or len(up) != len(down) or up[2:] not in ((), (1, 1)) or 0 in (*down, *up):
        return f"{found}, which are not those of a LoRA of a linear or convolutional layer"
    if down[0] != up[1]:
        return f"{found}, so the rank is {down[0]} in one and {up[1]} in the other"
    if mid is not None and (down[2:] != (1, 1) or mid[:2] != (down[0], down[0]) or len(mid) != 4 or 0 in mid):
        return f"{found}, and {_sizes(mid)} between them, which are not those of a Tucker decomposition"
    return None


def _hadamard_fault(shapes: Mapping[str, Shape]) -> str | None:
    pairs = [tuple(shapes[f"hada_w{number}_{end}"] for end in "ab") for number in "12"]
    cores = [shapes[part] for part in ("hada_t1", "hada_t2") if part in shapes]
    found = f"have the shapes {', '.join(_sizes(shape) for pair in pairs for shape in pair)}"
    if any(0 in shape for pair in pairs for shape in pair):
        return f"{found}, and some are empty"
    if cores:
        found += f" and {', '.join(map(_sizes, cores))}"
        fits = all(
            len(a) == len(b) == 2 and len(core) == 4 and core[:2] == (a[0], b[0]) and 0 not in core
            for (a, b), core in zip(pairs, cores, strict=True)
        )
    else:
        fits = all(len(a) == len(b) and len(a) in (2, 4) and a[2:] in ((), (1, 1)) and a[1] == b[0] for a, b in pairs)
    same = pairs[0][1][:1] == pairs[1][1][:1]  # one rank, by which the alpha is divided
    return None if fits and same else f"{found}, which are not those of a LoHa"


def _kronecker_fault(shapes: Mapping[str, Shape]) -> str | None:
    found = f"have the shapes {', '.join(_sizes(shape) for part, shape in shapes.items() if part.startswith('lokr_'))}"
    if any(0 in shape for part, shape in shapes.items() if part.startswith("lokr_")):
        return f"{found}, and some are empty"
    fits = "lokr_t2" not in shapes or "lokr_w2_b" in shapes
    for number in "12":
        whole, a, b = (shapes.get(f"lokr_w{number}{end}") for end in ("", "_a", "_b"))
        if whole is not None:
            fits &= a is None and b is None and len(whole) in ((2,) if number == "1" else (2, 4))
        else:
            assert a is not None and b is not None  # `_missing`
            core = shapes.get("lokr_t2") if number == "2" else None
            if core is not None:
                fits &= len(a) == len(b) == 2 and len(core) == 4 and core[:2] == (a[0], b[0])
            else:
                fits &= len(a) == 2 and len(b) in ((2,) if number == "1" else (2, 4)) and a[1] == b[0]
    return None if fits else f"{found}, which are not those of a LoKr"


def _difference_fault(shapes: Mapping[str, Shape]) -> str | None:
    shape = shapes.get("diff", (1,))
    return None if shape and 0 not in shape else f"have the shape {_sizes(shape)}, which is that of no layer"


_FAULTS = {
    LowRank: _low_rank_fault,
    Hadamard: _hadamard_fault,
    Kronecker: _kronecker_fault,
    Difference: _difference_fault,
}


def _sizes(shape: Shape) -> str:
    return f"[{', '.join(str(size) for size in shape)}]"
