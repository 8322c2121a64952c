"""The settings of an adapter as a model card shows them: those of the config that are not at their defaults, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Key of the section `lora` -> its name in the card.
_NAMED = {
    "lokr_factor": "factor",
    "dropout": "dropout",
    "rank_dropout": "rank dropout",
    "module_dropout": "module dropout",
    "max_norm": "largest norm",
}
_OFF = (None, 0, -1, False, [])


def adapter_rows(config: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> value of the rows about ranks, dropouts and text encoders; None for what the run does not have.

    `config` is that of a run folder, of any version.
    """
    lora, encoders, optimizer = (_section(config, name) for name in ("lora", "text_encoders", "optimizer"))
    rows: dict[str, Any] = {"rank, alpha": f"{lora.get('rank')}, {lora.get('alpha')}"}
    if lora.get("conv_rank") is not None or lora.get("conv_alpha") is not None:
        of_convolutions = [
            lora.get(name) if lora.get(f"conv_{name}") is None else lora[f"conv_{name}"] for name in ("rank", "alpha")
        ]
        rows["rank, alpha of convolutions"] = ", ".join(map(str, of_convolutions))
    rows["scale"] = "alpha / sqrt(rank)" if lora.get("rank_stabilized") else None
    rows["other modules"] = "; ".join(map(_override, _mappings(lora.get("overrides")))) or None
    rows |= {title: lora[key] for key, title in _NAMED.items() if lora.get(key, None) not in _OFF}
    rows["text encoders"] = "not trained"
    if encoders.get("train"):
        own = {"rank": "rank", "alpha": "alpha", "lr": "learning rate", "until": "until"}
        given = [f"{title} {encoders[key]}" for key, title in own.items() if encoders.get(key) is not None]
        rows["text encoders"] = ", ".join(["trained", *given])
    tokens = [f"{each.get('token')} ({each.get('vectors', 1)})" for each in _mappings(encoders.get("new_tokens"))]
    rows["new tokens (vectors)"] = ", ".join(tokens) or None
    rows["learning rate of new tokens"] = encoders.get("new_tokens_lr")
    ratio = optimizer.get("lora_plus_ratio")
    rows["LoRA+ ratio"] = None if ratio == 1 else ratio
    return rows


def objective_rows(config: Mapping[str, Any], plan: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> value of the rows about loss, noise and timesteps: in the words of the run's plan, None for what is the default.

    The plan of a run of an earlier version has none, and its config the two settings that there were.
    """
    said = plan.get("objective")
    if isinstance(said, Mapping):
        noise, loss = said.get("noise"), said.get("loss")
        return {
            "loss": None if loss == "mse" else loss,
            "loss weights": said.get("weighting") or None,
            "noise": f"with {', '.join(map(str, noise))}" if isinstance(noise, list) and noise else None,
            "timesteps": said.get("timesteps") or None,
        }
    loss = _section(config, "loss")
    return {"min-SNR gamma": loss.get("snr_gamma"), "noise offset": loss.get("noise_offset") or None}


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name)
    return found if isinstance(found, dict) else {}


def _mappings(found: Any) -> list[Mapping[str, Any]]:
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _override(given: Mapping[str, Any]) -> str:
    titles = {"rank": "rank", "alpha": "alpha", "lr_factor": "learning rate times"}
    parts = [f"{title} {given[key]}" for key, title in titles.items() if given.get(key) is not None]
    return f"{given.get('modules')}: {', '.join(parts)}"
