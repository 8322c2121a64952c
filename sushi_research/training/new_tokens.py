"""The new tokens of a run: what they begin at, and the part of the plan about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sushi_research import randomness
from sushi_research.adapters import bundled
from sushi_research.adapters.tensor_names import NEW_TOKENS
from sushi_research.caches.inputs import Inputs
from sushi_research.config import TrainingConfig
from sushi_research.config.text_encoders import NewToken, vectors_of
from sushi_research.errors import UserError, some
from sushi_research.files import size_text
from sushi_research.models import loading
from sushi_research.models.new_tokens import install, with_words
from sushi_research.runs.job import Job
from sushi_research.training.caption_plan import encoder_bytes

# Samples of the first epoch whose captions are searched for the tokens.
_MOST_CAPTIONS = 10_000


def attach(encoder: Any, name: str, tokenizer: Any, job: Job) -> None:
    """Adds the run's new tokens to a text encoder, trainable, in fp32, and to its tokenizer. UserError for a start without tokens.

    They begin at the vectors of the file that the run starts from, or else at those that the base has for `start_from`, in its
    dtype here.
    """
    config, first = job.config, len(tokenizer)
    of_file = job.start.tokens if job.start else {}
    starts = {
        each.token: of_file[each.token][name]
        if each.token in of_file
        else _start(each, name, encoder, tokenizer, config.train.seed)
        for each in config.text_encoders.new_tokens
    }
    rows = install(encoder, first)
    for token, vectors in starts.items():
        rows.add(token, vectors, is_trained=True)
    with_words(tokenizer, vectors_of(config.text_encoders))


def attach_empty(encoder: Any, config: TrainingConfig) -> None:
    """`attach` for a text encoder without weights (on the meta device), whose tokenizer is not needed."""
    rows = install(encoder, encoder.config.vocab_size)
    for each in config.text_encoders.new_tokens:
        rows.add(each.token, torch.empty(each.vectors, encoder.config.hidden_size, device="meta"), is_trained=True)


def _start(token: NewToken, name: str, encoder: Any, tokenizer: Any, seed: int) -> torch.Tensor:
    """[vectors, width]: what a token begins at."""
    table = encoder.get_input_embeddings().weight.detach()
    if token.start_from is None:
        noise = randomness.normal(seed, "new_token", name, token.token, shape=(token.vectors, table.shape[1]))
        return torch.from_numpy(noise).to(table.device) * table.float().std()
    ids = tokenizer(token.start_from, truncation=False, verbose=False).input_ids[1:-1]
    if not ids:
        raise UserError(
            f"text_encoders.new_tokens: the token {token.token} starts from {token.start_from!r}, which has no tokens: give a word."
        )
    return table[[ids[number % len(ids)] for number in range(token.vectors)]].float()


def shapes_of(job: Job, base: loading.Base) -> dict[str, tuple[int, ...]]:
    """The shapes of the new tokens' tensors by their names in checkpoints."""
    return {
        f"{name}.{NEW_TOKENS}.{token}": (vectors, base.config(name)["hidden_size"])
        for name in job.model.TEXT_ENCODERS
        for token, vectors in vectors_of(job.config.text_encoders).items()
    }


@dataclass(frozen=True)
class TokenPlan:
    """The new tokens of a run, `vectors` of each. Of `captions` samples of the first epoch, `without` have none of them.

    Those of `from_file` begin at the vectors of lora.start_from. `width` is that of a vector in all text encoders together, `bytes`
    what these take in the compute dtype.
    """

    vectors: Mapping[str, int]
    starts: Mapping[str, str | None]
    from_file: tuple[str, ...]
    captions: int
    without: int
    width: int
    bytes: int
    file: str

    def to_json(self) -> dict[str, Any]:
        """The part of plan.json."""
        return asdict(self)

    def describe(self) -> list[str]:
        """Lines of the plan."""
        starts = {token: "noise" if start is None else repr(start) for token, start in self.starts.items()}
        starts |= dict.fromkeys(self.from_file, "lora.start_from")
        each = [
            f"{token} ({count} vector{'' if count == 1 else 's'}, from {starts[token]})"
            for token, count in self.vectors.items()
        ]
        lines = [f"new tokens   {', '.join(each)}: {sum(self.vectors.values()) * self.width:,} trainable parameters"]
        if self.without:
            lines.append(
                f"             {self.without:,} of {self.captions:,} captions have none of them, and teach them nothing"
            )
        own = bundled.files_of(Path(self.file), list(self.vectors))
        lines += [
            f"             the text encoders are run in every step, and {size_text(self.bytes)} of them stay in memory",
            "             A1111 finds them in the adapter file; ComfyUI, Forge and InvokeAI load it without them, diffusers not "
            "at all,",
            "             so each is in a file of its own besides (docs/new_tokens.md): "
            + some([path.name for path in own.values()]),
        ]
        return lines


def plan_of(job: Job, inputs: Inputs) -> TokenPlan | None:
    """The plan of the new tokens; None without any. UserError if no caption has one, so that nothing would be learned."""
    section, items = job.config.text_encoders, inputs.data.items
    if not section.new_tokens:
        return None
    captions, tokenizer = inputs.data.captions, inputs.base.load_tokenizer(job.model.TEXT_ENCODERS[0])
    assert captions is not None, "a run that encodes captions in the step has their rules"
    texts = [captions.text_of(index, 0) for index in range(min(len(items), _MOST_CAPTIONS))]
    first = len(tokenizer)
    ids = with_words(tokenizer, vectors_of(section))(texts, truncation=False, padding=False, verbose=False).input_ids
    found = {number for row in ids for number in row if number >= first}
    without = sum(max(row) < first for row in ids)
    start = first
    for token, vectors in vectors_of(section).items():
        if start not in found and len(texts) == len(items):
            raise UserError(
                f"text_encoders.new_tokens: no caption has the token {token}, so it would learn nothing: write it into them, or "
                "remove the token."
            )
        start += vectors
    return TokenPlan(
        vectors=vectors_of(section),
        starts={each.token: each.start_from for each in section.new_tokens},
        from_file=tuple(job.start.tokens) if job.start else (),
        captions=len(texts),
        without=without,
        width=sum(inputs.base.config(name)["hidden_size"] for name in job.model.TEXT_ENCODERS),
        bytes=encoder_bytes(job, inputs.base),
        file=f"{job.config.run.name or 'NAME'}.safetensors",
    )
