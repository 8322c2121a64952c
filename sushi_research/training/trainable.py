"""What an adapter needs to be trained: its shapes, and the checks of optimizer, schedule and kernels before anything is encoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sushi_research.adapters import lora, tensor_names
from sushi_research.adapters.entries import Entry
from sushi_research.adapters.settings import AdapterSettings
from sushi_research.errors import UserError
from sushi_research.models import attention, loading, storage
from sushi_research.runs import tracking
from sushi_research.runs.job import Job
from sushi_research.training import averages, optim, optimizer_check
from sushi_research.training.optimizer_classes import optimizer_class
from sushi_research.training.parameter_groups import Group, require_trained


def require_attention(job: Job, unet: Any) -> None:
    """UserError unless the kernels of train.attention compute the attentions of the UNet (without weights) on this device."""
    train, captions = job.config.train, job.config.captions
    if train.attention == "xformers":
        loading.require_xformers()
    elif train.attention != "sdpa":
        if captions.encode == "while_training":
            raise UserError(
                "train.attention as a list holds for the whole process while the UNet computes, and with captions.encode "
                "while_training the text encoders compute at the same time: leave train.attention at sdpa, or captions.encode at "
                "its default."
            )
        masked = captions.chunks > 1
        attention.require_order(train.attention, unet, job.compute_dtype, job.device, masked=masked)


def require_trainable(
    job: Job,
    unet: Any,
    steps: int,
    rate: Callable[[int], float],
    shapes: Mapping[str, Sequence[int]],
    groups: Sequence[Group],
) -> None:
    """Fail fast: checks the attention kernels, the optimizer and W&B before anything is encoded.

    `unet` has no weights; `rate` is the learning rate of each step, `shapes` are those of the adapters' tensors, which are in these
    parameter `groups`. Raises the UserErrors of `require_attention`, `optimizer_check.require_usable`, `storage.require_usable` and
    `tracking.resolve_trackers`.
    """
    config = job.config
    require_attention(job, unet)
    storage.require_usable(config.model.base_storage, job.compute_dtype, job.device)
    tracking.resolve_trackers(config.tracking.wandb, config.tracking.tensorboard)
    spread = [rate(step * steps // optimizer_check.STEPS) for step in range(optimizer_check.STEPS)]
    require_trained(groups, config, steps)
    optimizer_check.require_usable(config.optimizer, shapes, spread, job.device, groups)
    averages_itself = optim.averages_weights(optimizer_class(config.optimizer.name))
    if averages_itself and averages.names_of(config.ema):
        raise UserError(
            f"{config.optimizer.name} averages the weights itself, and its average is the result, so ema has nothing to add: "
            "remove ema.decay and ema.post_hoc, or choose another optimizer.name."
        )
    if config.lora.max_norm is not None and all(
        group.has_ended(0) or all(map(tensor_names.is_of_token, group.names)) for group in groups
    ):
        raise UserError(
            "lora.max_norm has no effect, because no adapter is trained, only new tokens: remove it, or give another lr_factor in "
            "lora.overrides."
        )
    if config.lora.max_norm is not None and averages_itself:
        raise UserError(
            f"lora.max_norm limits the weights that {config.optimizer.name} trains, and not their average, which is the result: "
            "remove it, or choose another optimizer.name."
        )


def adapter_shapes(
    unet: Any, settings: AdapterSettings, start: Mapping[str, Entry] | None = None
) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter's tensors by name. `unet` is the base's without weights; it gets the adapter.

    `start` are the entries of lora.start_from.
    """
    lora.attach(unet, settings, start=start)
    return {name: tuple(parameter.shape) for name, parameter in lora.adapter_parameters({"unet": unet}).items()}
