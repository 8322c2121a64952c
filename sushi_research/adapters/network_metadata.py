"""What an adapter file's metadata says about the adapter itself: kohya's `ss_network_*` keys."""

from __future__ import annotations

import json
import math
from typing import Any

from sushi_research.adapters.targets import CONVOLUTIONS, resolve_targets

# LyCORIS' names of the kinds; that of DoRA says that the magnitudes are those of the inputs.
_ALGORITHMS: dict[str, dict[str, str]] = {
    "dora": {"algo": "lora", "dora_wd": "True", "wd_on_output": "False"},
    "loha": {"algo": "loha"},
    "lokr": {"algo": "lokr"},
}


def network_entries(section: Any, is_uniform: bool, found: tuple[int, float] | None = None) -> dict[str, Any]:
    """The entries for the config section `lora`. With `is_uniform` all modules have one rank and one alpha: the section's, unless
    `found`, the rank and scale that they have, says otherwise (convolutions alone, or an override that fits every module)."""
    rank = section.rank
    alpha = section.alpha * math.sqrt(rank) if section.rank_stabilized else section.alpha
    if found is not None and not (rank == found[0] and math.isclose(alpha, found[1] * rank)):
        rank, alpha = found[0], float(f"{found[1] * found[0]:.12g}")
    if section.kind == "dora":  # its scale is within the second matrix (kohya_format.file_entries)
        alpha = float(rank)
    arguments = dict(_ALGORITHMS.get(section.kind, {}))
    if section.kind == "lokr":
        arguments["factor"] = str(section.lokr_factor)
    # Of a file whose modules differ, these too would be wrong for some.
    if is_uniform and set(resolve_targets(section.targets)) & set(CONVOLUTIONS):
        arguments |= {"conv_dim": str(rank), "conv_alpha": str(alpha)}
    return {
        "ss_network_module": "lycoris.kohya" if section.kind in _ALGORITHMS else "networks.lora",
        # "Dynamic" as kohya's resize_lora.py writes it for a file whose modules differ.
        "ss_network_dim": rank if is_uniform else "Dynamic",
        "ss_network_alpha": alpha if is_uniform else "Dynamic",
        "ss_network_dropout": section.dropout,
        "ss_network_args": json.dumps(arguments),
    }
