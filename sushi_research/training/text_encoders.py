"""The text encoders of a run that trains adapters on them (`text_encoders.train`) or new tokens, and those of one that does not.

Their captions come as token ids, and `training_step` encodes them: in the compute dtype, with the adapters' working copies. Master
weights, gradients and optimizer state are in the same buffers as those of the UNet's adapter. Everything else that needs the
conditioning (evaluating, sampling) asks `caption` and `prompt` here. Tensors have the names `text_encoder.<path>.<matrix>` and
`text_encoder_2.<path>.<matrix>` in checkpoints.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
from torch import nn

from sushi_research.adapters import lora, settings
from sushi_research.adapters.settings import AdapterSettings
from sushi_research.caches import encoding
from sushi_research.caches.inputs import Inputs
from sushi_research.conditioning import ALL_CHUNKS, Chunks
from sushi_research.config import TrainingConfig
from sushi_research.config.text_encoders import endings
from sushi_research.models.new_tokens import rows_of
from sushi_research.models.tokenizers import folder_of
from sushi_research.runs.job import Job
from sushi_research.sampling.lora_scale import scaled
from sushi_research.training import new_tokens

Embedding = dict[str, torch.Tensor]
# Captions whose token ids are kept in memory: 25 MB of one chunk for each of SDXL's two tokenizers.
MOST_IDS = 20_000


@dataclass(eq=False)
class TextEncoders:
    """The text encoders of a run, with adapters on those that are trained: `components` by name, none if nothing is trained.
    With new tokens, `base_text` is `text` with tokenizers that do not know them: the base reads a text as it stands.

    `idle` are the names of tensors that get no gradient (`idle_names`), `long_prompts` the prompts that are not encoded as captions
    are. Of a run that trains none, a text is its embedding from the cache (`CACHED`), and the functions change nothing.
    """

    components: Mapping[str, nn.Module] = field(default_factory=dict)
    model: ModuleType | None = None
    text: Any = None
    base_text: Any = None
    chunks: Chunks = field(default_factory=Chunks)
    settings: Mapping[str, Any] = field(default_factory=dict)
    long_prompts: frozenset[str] = frozenset()
    idle: tuple[str, ...] = ()
    is_training: bool = True
    is_base: bool = False
    _ids: dict[tuple[str, Chunks], Embedding] = field(default_factory=dict, repr=False)
    # A tokenizer has a state of its own, and the loader's thread uses it too.
    _tokenizing: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, text: Embedding) -> Embedding:
        """The embeddings [B, ...] of a batch's text: encoded from its ids, with gradients while the adapters are trained."""
        if not self.components:
            return text
        with torch.set_grad_enabled(self.is_training and torch.is_grad_enabled()):
            return self._encoded(text)

    def _encoded(self, text: Embedding) -> Embedding:
        found = self.model.encode_ids(self.text, text, self.chunks.layout, **self.settings)
        if "mask" in text:  # captions of fewer chunks: zeros after them, as in `conditioning.batch_text`
            found["hidden"] = found["hidden"].masked_fill(~text["mask"][..., None], 0.0)
            found["mask"] = text["mask"]
        if "zeros" in text:  # dropped captions
            for name in self.model.TEXT_TENSORS:
                found[name] = found[name].masked_fill(text["zeros"].view(-1, *[1] * (found[name].ndim - 1)), 0.0)
        return found

    def ids(self, caption: str, chunks: Chunks | None = None) -> Embedding:
        """The token ids [N, 77] of a caption, by name; any thread may ask."""
        key = caption, chunks or self.chunks
        with self._tokenizing:
            found = self._ids.get(key)
            if found is None:
                found = self.model.token_ids(self.text, *key)
                if len(self._ids) < MOST_IDS:
                    self._ids[key] = found
            return found

    @property
    def caption(self) -> Callable[[str], Embedding] | None:
        """Encodes a caption with the encoders as they are, in fp16 on the CPU like the cache; None: the cache has it."""
        return self._alone if self.components else None

    @property
    def prompt(self) -> Callable[..., Embedding] | None:
        """Encodes a prompt of the sample images at a LoRA scale, as `caption`; None: the cache has it."""
        return self._prompt if self.components else None

    @torch.no_grad()
    def _alone(self, caption: str, chunks: Chunks | None = None) -> Embedding:
        chunks = chunks or self.chunks
        if self.is_base and self.base_text is not None:
            found = self.model.token_ids(self.base_text, caption, chunks)
        else:
            found = self.ids(caption, chunks)
        ids = {name: rows[None] for name, rows in found.items()}
        with self._evaluating():
            found = self.model.encode_ids(self.text, ids, chunks.layout, **self.settings)
        return encoding.in_halves({name: tensor[0] for name, tensor in found.items()}, caption)

    def _prompt(self, prompt: str, scale: float = 1.0) -> Embedding:
        with contextlib.ExitStack() as scales:
            for encoder in self.components.values():
                scales.enter_context(scaled(encoder, scale))
            return self._alone(prompt, ALL_CHUNKS if prompt in self.long_prompts else None)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """A block without dropout."""
        before = {name: encoder.training for name, encoder in self.components.items()}
        try:
            for encoder in self.components.values():
                encoder.eval()
            yield
        finally:
            for name, encoder in self.components.items():
                encoder.train(before[name])

    @contextlib.contextmanager
    def without_adapters(self, unet: nn.Module) -> Iterator[None]:
        """A block in which UNet and text encoders are the base's. New tokens in ids are what they began as."""
        tokens = [rows for encoder in self.components.values() if (rows := rows_of(encoder)) is not None]
        self.is_base = True
        for rows in tokens:
            rows.is_base = True
        try:
            with lora.without_adapter(unet, *self.components.values()):
                yield
        finally:
            self.is_base = False
            for rows in tokens:
                rows.is_base = False

    def freeze(self) -> None:
        """From here on the adapters stay as they are: the encoders compute no gradients any more, and leave nothing out."""
        self.is_training = False
        for encoder in self.components.values():
            encoder.eval()


CACHED = TextEncoders()


def prepare(job: Job, inputs: Inputs) -> TextEncoders:
    """The run's text encoders with their adapters and new tokens, in the compute dtype on the device; `CACHED` if nothing of them
    is trained."""
    config, model = job.config, job.model
    names = model.TEXT_ENCODERS if config.text_encoders.new_tokens else trained_names(job)
    if not names:
        return CACHED
    text, base_text = model.load_text(inputs.base, job.device, job.compute_dtype), None
    found = model.pipeline_text(inputs.base, text)
    components = {name: found[name] for name in names}
    for name in trained_names(job):
        attach(components[name], name, job)
    if config.text_encoders.new_tokens:
        parts = [(copy.deepcopy(found[folder_of(name)]), found[name]) for name in model.TEXT_ENCODERS]
        base_text = model.Text(*itertools.chain.from_iterable(parts))
        for name, encoder in components.items():
            new_tokens.attach(encoder, name, found[folder_of(name)], job)
    for encoder in components.values():
        to_training(encoder)
        recompute(encoder, config.train.gradient_checkpointing, draws=adapter_settings(config).drops)
    layers = {name: encoder.config.num_hidden_layers for name, encoder in components.items()}
    return TextEncoders(
        components=components,
        model=model,
        text=text,
        base_text=base_text,
        chunks=inputs.caches.chunks,
        settings=text_settings(job),
        long_prompts=frozenset(inputs.own_prompts),
        idle=tuple(idle_names(lora.adapter_parameters(components), layers, model.idle_layers(**text_settings(job)))),
    )


def trained_names(job: Job) -> list[str]:
    """The names of the text encoders that the job trains: all, or those with a learning rate above zero."""
    return names_trained(job.config, job.model)


def names_trained(config: TrainingConfig, model: ModuleType) -> list[str]:
    """`trained_names` of a config and a model module."""
    if not config.text_encoders.train:
        return []
    return [name for name in model.TEXT_ENCODERS if rate_of(config, model, name)]


def rate_of(config: TrainingConfig, model: ModuleType, name: str) -> float:
    """The learning rate of a text encoder before the schedule's factor; 0 if it is not trained."""
    given: Any = config.optimizer.lr if config.text_encoders.lr is None else config.text_encoders.lr
    return given[model.TEXT_ENCODERS.index(name)] if isinstance(given, list) else given


def text_settings(job: Job) -> dict[str, Any]:
    """The settings of the base that decide how a text is encoded."""
    return {name: getattr(job.config.model, name) for name in job.model.TEXT_SETTINGS}


def to_training(encoder: nn.Module) -> None:
    """Training mode, which the adapter's dropout and gradient checkpointing need. A dropout of the encoder's own attention, which a
    base's config may have, stays off as where the cache is made: nothing in the config asks for it."""
    encoder.train()
    for module in encoder.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0  # type: ignore[assignment]


def recompute(encoder: Any, mode: str, *, draws: bool) -> None:
    """Turns on gradient checkpointing in a text encoder if train.gradient_checkpointing is "all"."""
    if mode == "all":
        # As for the UNet, the random state is only kept where something is drawn (fast/checkpointing.py).
        encoder.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": draws})


def adapter_settings(config: TrainingConfig) -> AdapterSettings:
    """The settings of the text encoders' adapters: those of `lora`, with their own targets, rank and alpha."""
    general = settings.settings_of(config.lora, config.train.seed)
    return replace(
        general,
        targets=endings(config.text_encoders.targets),
        rank=config.text_encoders.rank or general.rank,
        alpha=config.text_encoders.alpha or general.alpha,
        conv_rank=None,
        conv_alpha=None,
    )


def attach(encoder: Any, name: str, job: Job) -> None:
    """Freezes a text encoder and adds its adapter: that of lora.start_from, with its modules, or else a new one."""
    start, own = job.start and job.start.matches.get(name), adapter_settings(job.config)
    own = own if start is None else replace(own, targets=list(start))
    lora.attach(encoder, own, name=name, start=start)


def idle_names(names: Iterable[str], layers: Mapping[str, int], last: Mapping[str, int]) -> list[str]:
    """Those of the tensors in layers whose output the UNet does not get, such as the last one of SDXL's first encoder.

    `layers` is the number of layers of each encoder, `last` how many of them are idle. Files have these tensors, as those of other
    trainers do, without an effect.
    """
    idle = [
        (f"{component}.", f".layers.{layer}.")
        for component, count in layers.items()
        for layer in range(count - last[component], count)
    ]
    return [name for name in names if any(name.startswith(start) and part in name for start, part in idle)]
