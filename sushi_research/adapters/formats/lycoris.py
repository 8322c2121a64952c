"""LyCORIS (lycoris-lora 4.1.3), whose endings ComfyUI, A1111 and others read: LoHa, LoKr, full differences, norms.

In kohya's trainer its names have kohya's prefixes; its own wrapper, which SimpleTuner uses, names the modules of a UNet
`lycoris_<module with underscores>`. Its scalars are multiplied into the first matrix when it saves.
"""

from sushi_research.adapters.formats import Naming

NAMING = Naming(
    {"lycoris_": "unet"},
    {
        **{f".{part}": part for part in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
        **{
            f".{part}": part
            for part in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
        },
        ".diff": "diff",
        ".diff_b": "diff_b",
        ".w_norm": "diff",
        ".b_norm": "diff_b",
    },
)
