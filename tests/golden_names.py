"""The names of the modules in adapter files for the published models, written down from kohya's and OneTrainer's files.

Not made by our code, so that a name that we get wrong in writer and reader alike is found. Counts: kohya's sd-scripts adapt 192
modules of SD1.5's UNet and 722 of SDXL's, with `conv_dim` 278 and 788; the text encoders have 72 and 72 + 192; OneTrainer's preset
`full` has 282 and 794 in the UNet.
"""

from __future__ import annotations

import itertools
import re

_INNER = ("attn{1,2}_to_{q,k,v,out_0}", "ff_net_{0_proj,2}")
_CLIP = "text_model_encoder_layers_{%s}_{self_attn_{q,k,v,out}_proj,mlp_fc{1,2}}"


def _attention(blocks: str, depth: int) -> list[str]:
    """The adapted modules of a transformer: two projections, and in each of its blocks eight of attention, two of feed-forward."""
    numbers = ",".join(str(number) for number in range(depth))
    return [f"{blocks}_proj_{{in,out}}", *(f"{blocks}_transformer_blocks_{{{numbers}}}_{inner}" for inner in _INNER)]


_PATTERNS: dict[tuple[str, str], list[str]] = {
    ("sd15", "unet"): [
        *_attention("down_blocks_{0,1,2}_attentions_{0,1}", 1),
        *_attention("mid_block_attentions_0", 1),
        *_attention("up_blocks_{1,2,3}_attentions_{0,1,2}", 1),
    ],
    ("sd15", "conv"): [
        "down_blocks_{0,1,2,3}_resnets_{0,1}_{conv1,conv2,time_emb_proj}",
        "mid_block_resnets_{0,1}_{conv1,conv2,time_emb_proj}",
        "up_blocks_{0,1,2,3}_resnets_{0,1,2}_{conv1,conv2,time_emb_proj,conv_shortcut}",
        "down_blocks_{1,2}_resnets_0_conv_shortcut",
        "down_blocks_{0,1,2}_downsamplers_0_conv",
        "up_blocks_{0,1,2}_upsamplers_0_conv",
    ],
    ("sd15", "rest"): ["conv_in", "conv_out", "time_embedding_linear_{1,2}"],
    ("sdxl", "unet"): [
        *_attention("input_blocks_{4,5}_1", 2),
        *_attention("input_blocks_{7,8}_1", 10),
        *_attention("middle_block_1", 10),
        *_attention("output_blocks_{0,1,2}_1", 10),
        *_attention("output_blocks_{3,4,5}_1", 2),
    ],
    ("sdxl", "conv"): [
        "input_blocks_{1,2,4,5,7,8}_0_{in_layers_2,out_layers_3,emb_layers_1}",
        "middle_block_{0,2}_{in_layers_2,out_layers_3,emb_layers_1}",
        "output_blocks_{0,1,2,3,4,5,6,7,8}_0_{in_layers_2,out_layers_3,emb_layers_1,skip_connection}",
        "input_blocks_{4,7}_0_skip_connection",
        "input_blocks_{3,6}_0_op",
        "output_blocks_{2,5}_2_conv",
    ],
    ("sdxl", "rest"): ["input_blocks_0_0", "out_2", "time_embed_{0,2}", "label_emb_0_{0,2}"],
}
_TEXT = {"sd15": {"lora_te_": 12}, "sdxl": {"lora_te1_": 12, "lora_te2_": 32}}
# Kind -> the ends of a module's keys, of the forms that we write.
ENDS = {
    "lora": ("lora_down.weight", "lora_up.weight", "alpha"),
    "dora": ("lora_down.weight", "lora_up.weight", "alpha", "dora_scale"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"),
}


def module_names(architecture: str, *, conv: bool = False, rest: bool = False, text: bool = True) -> list[str]:
    """The names of all modules: of kohya's default, with the convolutions (`conv_dim`), and with what only OneTrainer adapts."""
    parts = ["unet", *(["conv"] if conv else []), *(["rest"] if rest else [])]
    names = [
        f"lora_unet_{name}" for part in parts for pattern in _PATTERNS[architecture, part] for name in expand(pattern)
    ]
    for prefix, depth in _TEXT[architecture].items() if text else ():
        names += [prefix + name for name in expand(_CLIP % ",".join(str(number) for number in range(depth)))]
    assert len(names) == len(set(names))
    return names


def expand(pattern: str) -> list[str]:
    """The names that a pattern with alternatives in braces, which may be nested, stands for."""
    inner = re.search(r"\{([^{}]*)\}", pattern)
    if inner is None:
        return [pattern]
    # The innermost braces first; a comma inside of them separates only there.
    chosen = [expand(pattern[: inner.start()] + part + pattern[inner.end() :]) for part in inner[1].split(",")]
    return list(dict.fromkeys(itertools.chain.from_iterable(chosen)))
