"""Which programs do not load an adapter file as it is, and why: docs/formats.md, "What loads where", for one adapter.

The rules were read in the sources of diffusers 0.42, ComfyUI 0.3.64, Forge 2.0.1, A1111 1.10 and InvokeAI 6.14. The tests hold them
against diffusers itself and against a second reader of files that knows nothing of this package (tests/other_readers.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from sushi_research.adapters.entries import Difference, Entry, Hadamard, Kronecker, LowRank
from sushi_research.adapters.formats.writing import Layout, names_of
from sushi_research.models import ARCHITECTURES

PROGRAMS = ("diffusers", "ComfyUI", "Forge", "A1111", "InvokeAI")
# Component -> layer path -> entry.
Matches = Mapping[str, Mapping[str, Entry]]

_CLIP_PART = re.compile(r"encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])$")


def limits(
    architecture: str, matches: Matches, *, layout: Layout = "kohya", layers_per_block: int = 2
) -> dict[str, str]:
    """Program -> why it does not load a file with these entries as it is, for those that do not, in the order of PROGRAMS.

    The entries' values do not matter; they may be on the meta device.
    """
    found: dict[str, str] = {}
    for component, path, entry in _all(matches):
        if layout == "peft":
            is_text_dora = component != "unet" and getattr(entry, "magnitude", None) is not None
            reasons = {"diffusers": "it leaves out the magnitudes of a DoRA of text encoders"} if is_text_dora else {}
        else:
            reasons = _of_entry(entry) | _of_place(architecture, component, path, matches)
        for program, reason in reasons.items():
            found.setdefault(program, reason)
    if layout == "peft":
        found |= _of_pefts_names(matches)
    elif "InvokeAI" not in found:
        base = _invoke_base(architecture, matches, layers_per_block)
        if base != architecture:
            label = f"it takes it for one of {ARCHITECTURES[base].label}" if base else "it cannot tell the base"
            found["InvokeAI"] = f"{label}, because it looks for a pair of attn2.to_k or attn2.to_v"
    return {program: found[program] for program in PROGRAMS if program in found}


def sentences(found: Mapping[str, str]) -> list[str]:
    """What the plan and the tools say of `limits`: one sentence for each reason."""
    programs: dict[str, list[str]] = {}
    for program, reason in found.items():
        programs.setdefault(reason, []).append(program)
    return [
        f"{' and '.join(names)} will not load this adapter as it is: {reason}." for reason, names in programs.items()
    ]


def _all(matches: Matches) -> Iterator[tuple[str, str, Entry]]:
    return ((component, path, entry) for component, layers in matches.items() for path, entry in layers.items())


def _of_entry(entry: Entry) -> dict[str, str]:
    """Program -> reason, by the kind of an entry."""
    found: dict[str, str] = {}
    if isinstance(entry, Difference):
        found["diffusers"] = "it reads low-rank pairs only, not full differences"
        if entry.weight is None:
            found |= dict.fromkeys(("A1111", "InvokeAI"), "it knows no difference of a bias alone")
        return found
    if isinstance(entry, Hadamard):
        found["diffusers"] = "it reads low-rank pairs only, not LoHa"
    elif isinstance(entry, Kronecker):
        found["diffusers"] = "it reads low-rank pairs only, not LoKr"
        if entry.t2 is not None:
            found["ComfyUI"] = found["Forge"] = "its LoKr cannot multiply out a Tucker decomposition"
    elif entry.mid is not None:
        found["diffusers"] = "it reads low-rank pairs only, not their Tucker decomposition"
    elif entry.magnitude is not None:
        found["diffusers"] = "it leaves out the magnitudes of a DoRA that are not in peft's names"
    if entry.magnitude is not None:
        if not isinstance(entry, LowRank) or entry.mid is not None:
            found["InvokeAI"] = "it knows magnitudes of plain low-rank pairs only"
        # The one number of an input axis of a layer with one output is on both.
        if entry.magnitude.ndim < 2 or entry.magnitude.shape[0] > 1:
            reason = "it divides by other norms than a DoRA with a magnitude of each output needs"
            found |= {program: found.get(program, reason) for program in PROGRAMS[1:]}
    return found


def _of_place(architecture: str, component: str, path: str, matches: Matches) -> dict[str, str]:
    """Program -> reason, by the layer."""
    inner = path.removeprefix("text_model.")
    if component == "unet":
        is_unknown = path == "conv_norm_out" and not ARCHITECTURES[architecture].formats().STABILITY_NAMES
        return {"A1111": "it does not know diffusers' name of conv_norm_out"} if is_unknown else {}
    if _CLIP_PART.fullmatch(inner) is None:
        lost = f"it knows no adapter of {path} of a text encoder"
        programs = ["ComfyUI", "Forge", *(["A1111"] if component == "text_encoder_2" else [])]
        if inner == "text_projection" and component == "text_encoder_2":
            programs = ["A1111"]
        return dict.fromkeys(programs, lost)
    found = {}
    is_attention = re.search(r"\.[qkv]_proj$", path) is not None
    # By these names diffusers knows that the others are in the spelling to which it turns kohya's.
    if is_attention and not any(each.endswith(".out_proj") for each in matches[component]):
        found["diffusers"] = "it needs a pair of an out_proj to find q, k and v of a text encoder"
    if component == "text_encoder_2" and is_attention:
        attention = path.rpartition(".")[0]
        if not {f"{attention}.{part}_proj" for part in ("q", "k", "v", "out")} <= matches[component].keys():
            found["A1111"] = (
                "it changes an attention of the second text encoder only if q, k, v and out are all adapted"
            )
    return found


def _of_pefts_names(matches: Matches) -> dict[str, str]:
    found = {"A1111": "it finds no layer in peft's layout", "InvokeAI": "it does not know peft's layout"}
    reason = None
    if any(getattr(entry, "magnitude", None) is not None for _, _, entry in _all(matches)):
        reason = "it leaves out the magnitudes of a DoRA in peft's layout"
    if any(re.search(r"\.attn[12]\.to_(q|k|v|out\.0)$", path) for path in matches.get("unet", {})):
        reason = "it does not find the layers of attention in peft's layout"
    return found | (dict.fromkeys(("ComfyUI", "Forge"), reason) if reason else {})


def _invoke_base(architecture: str, matches: Matches, layers_per_block: int) -> str | None:
    """The architecture that InvokeAI takes a file for. It goes by the first key, in sorted order, of which it knows the inputs."""
    keys = []
    for component, layers in matches.items():
        names = names_of(architecture, component, list(layers), "kohya", layers_per_block)
        keys += [(f"{names[path]}.", component, path, entry) for path, entry in layers.items()]
    for name, component, path, entry in sorted(keys, key=lambda key: key[0]):
        if component == "unet" and path.endswith(("attn2.to_k", "attn2.to_v")) and _shows_inputs(entry):
            return architecture
        if component == "unet" and name.endswith("time_emb_proj.") and isinstance(entry, LowRank):
            return "sdxl"  # by its 1,280 inputs, which SD1.5's have too
        # The numbers of inputs of SDXL's two text encoders are never both known at the same time.
        if architecture == "sd15" and component == "text_encoder" and ".self_attn." in path and _shows_inputs(entry):
            return architecture
    deepest = max((int(each[1]) for path in matches.get("unet", {}) if (each := _BLOCK.search(path))), default=0)
    return "sdxl" if deepest >= 2 else None


_BLOCK = re.compile(r"\.transformer_blocks\.(\d+)\.")


def _shows_inputs(entry: Entry) -> bool:
    """Whether InvokeAI finds the number of inputs of a linear layer; of a LoKr only where both matrices are whole."""
    if isinstance(entry, Kronecker):
        return entry.w1 is not None and entry.w2 is not None
    return not isinstance(entry, Difference) or (entry.weight is not None and math.prod(entry.weight.shape) > 0)
