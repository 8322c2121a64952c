"""The arguments of kohya's `network_args`, those of networks.lora and of LyCORIS (4.1.3), and what they are called here."""

from __future__ import annotations

# Of each group: the names, our key ("" = there is none), and what a user has to know.
OPTIONS: list[tuple[str, str, str]] = [
    (
        "algo",
        "lora.kind",
        "lora for lora and locon, loha or lokr; full, glora, ia3, dylora and diag-oft are not trained",
    ),
    ("preset", "lora.targets", "a preset, or a list of name suffixes; lora.overrides leaves modules out with rank: 0"),
    ("conv_dim", "lora.conv_rank", "with lora.targets: kohya_conv; lora.rank by default"),
    ("conv_alpha", "lora.conv_alpha", "lora.alpha by default, 1 in networks.lora"),
    (
        "block_dims conv_block_dims",
        "lora.overrides",
        "rank of an entry: {modules: down_blocks.1, rank: 8}; 0 leaves it out",
    ),
    ("block_alphas conv_block_alphas", "lora.overrides", "alpha of an entry: {modules: down_blocks.1, alpha: 4}"),
    (
        "down_lr_weight mid_lr_weight up_lr_weight block_lr_zero_threshold",
        "lora.overrides",
        "lr_factor of an entry: {modules: mid_block, lr_factor: 0.5}; there are no named curves such as cosine",
    ),
    ("loraplus_lr_ratio loraplus_unet_lr_ratio", "optimizer.lora_plus_ratio", ""),
    ("loraplus_text_encoder_lr_ratio", "optimizer.lora_plus_ratio", "one ratio for all parts"),
    ("rank_dropout", "lora.rank_dropout", ""),
    ("module_dropout", "lora.module_dropout", ""),
    ("dora_wd", "lora.kind", "dora; not together with loha and lokr"),
    (
        "wd_on_output",
        "",
        "DoRA's magnitude is of the inputs (false): only such files load in ComfyUI, Forge and InvokeAI as they were trained",
    ),
    ("rs_lora", "lora.rank_stabilized", ""),
    ("factor", "lora.lokr_factor", ""),
    (
        "decompose_both full_matrix unbalanced_factorization use_tucker use_cp use_conv_cp disable_conv_cp use_scalar bypass_mode "
        "block_size constraint rescaled",
        "",
        "LoHa and LoKr are LyCORIS's own, without these variants",
    ),
    ("train_norm", "", "norms are not trained"),
]
