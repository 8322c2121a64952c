"""Config section of the adapters on the text encoders."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from sushi_research.config.mapping_list import read_mappings
from sushi_research.config.section import Bounded, Every, Section, Text

# Module names of transformers' CLIP text models, as kohya's sd-scripts train them.
ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
PRESETS: dict[str, tuple[str, ...]] = {"kohya": (*ATTENTION, "fc1", "fc2"), "attention": ATTENTION}
# As optimizer.lr, but 0 is possible for one of two encoders.
Rate = Annotated[float, Field(ge=1e-12, le=1000)]
RateOrNone = Annotated[float, Field(ge=0, le=1000)]


def endings(targets: str | Sequence[str]) -> list[str]:
    """The module name suffixes of `text_encoders.targets`."""
    return list(PRESETS[targets]) if isinstance(targets, str) else list(targets)


# What other programs find again in a prompt and can have in a file's name. `best-STEP` is another file of a run.
_TOKEN = re.compile(r"(?!<?best-)(<[A-Za-z0-9_-]{1,60}>|[A-Za-z0-9_-]{1,60})")


def token_text(text: str) -> str:
    """A validator of a new token. ValueError for one that other programs could not use."""
    if not _TOKEN.fullmatch(text) or not re.search("[A-Za-z]", text):
        raise ValueError(
            "must be 1 to 60 letters (A to Z), digits, - and _, with a letter among them, as mycat or <mycat>; best-... is taken"
        )
    return text


class NewToken(Section):
    """A new token of the text encoders (docs/new_tokens.md)."""

    token: Annotated[Text, AfterValidator(token_text)] = Field(
        description="The word in captions and prompts, such as mycat or <mycat>; upper and lower case are alike"
    )
    vectors: int = Field(
        1, ge=1, le=16, description="Vectors that it stands for: the tokens of a caption that it takes"
    )
    start_from: Text | None = Field(
        None,
        description="Text whose tokens' vectors it begins at, repeated or cut to its own number; null = noise as large as the "
        "vectors of the base",
    )


def read_new_tokens(value: Any) -> Any:
    """A validator of `text_encoders.new_tokens`. Raises UserError with one sentence per mistake; each names its key."""
    return read_mappings(value, "text_encoders.new_tokens", NewToken, {"token": "add the word"})


def file_part(token: str) -> str:
    """The token as a part of a file's name."""
    return token.strip("<>")


class TextEncoderSection(Section):
    """Adapters on the text encoders, trained with the UNet's (docs/text_encoders.md)."""

    train: bool = Field(
        False,
        description="Train an adapter on the text encoders too: they stay in memory and encode the captions in every step",
    )
    targets: Literal["kohya", "attention"] | Annotated[list[Text], Field(min_length=1), Bounded] = Field(
        "kohya",
        description="Modules of the text encoders that get an adapter: kohya = q_proj, k_proj, v_proj, out_proj, fc1, fc2 (as in "
        "kohya's sd-scripts); attention = the first four; or a list of module name suffixes",
        json_schema_extra={"allowed": "kohya, attention, or a list of name suffixes such as [q_proj, v_proj]"},
    )
    rank: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        None, description="Rank of the text encoders' adapters; null = that of lora.start_from, or else lora.rank"
    )
    alpha: Annotated[float, Field(ge=1e-6, le=1e6)] | None = Field(
        None, description="Alpha of the text encoders' adapters; null = that of lora.start_from, or else lora.alpha"
    )
    lr: Rate | None = Field(
        None,
        description="Learning rate of the text encoders' adapters, before the schedule's factor; null = optimizer.lr",
    )
    until: Every = Field(
        None,
        description="Train them only for so many steps or epochs, or this fraction of the run; afterwards they stay as they are; "
        "null = to the end",
    )
    new_tokens: Annotated[list[NewToken], BeforeValidator(read_new_tokens), Bounded] = Field(
        [],
        description="New tokens to train with the adapter, with text_encoders.train or without (docs/new_tokens.md)",
        json_schema_extra={"allowed": "a list of mappings with token and any of vectors and start_from"},
    )
    new_tokens_lr: Rate | None = Field(
        None,
        description="Learning rate of the new tokens, before the schedule's factor; null = text_encoders.lr, or else optimizer.lr",
    )

    @model_validator(mode="after")
    def _tokens_are_distinct(self) -> TextEncoderSection:
        if len({file_part(each.token).lower() for each in self.new_tokens}) < len(self.new_tokens):
            raise ValueError(
                "text_encoders.new_tokens has a token twice (upper and lower case, < and > make no difference): keep one of each"
            )
        if self.new_tokens and self.new_tokens_lr is None and isinstance(getattr(self, "lr", None), list):
            raise ValueError(
                "text_encoders.lr is a list, so new tokens need a rate of their own: set text_encoders.new_tokens_lr"
            )
        return self

    @model_validator(mode="after")
    def _targets_are_distinct(self) -> TextEncoderSection:
        if isinstance(self.targets, list) and len(set(self.targets)) < len(self.targets):
            raise ValueError("text_encoders.targets names a module twice: keep one of each")
        return self


def is_in_step(section: TextEncoderSection) -> bool:
    """Whether the text encoders are run in the training step: with adapters or new tokens."""
    return section.train or bool(section.new_tokens)


def vectors_of(section: TextEncoderSection) -> dict[str, int]:
    """The number of vectors of each new token."""
    return {each.token: each.vectors for each in section.new_tokens}


class TwoTextEncoderSection(TextEncoderSection):
    """Adapters on the text encoders, trained with the UNet's (docs/text_encoders.md)."""

    lr: Rate | Annotated[list[RateOrNone], Field(min_length=2, max_length=2)] | None = Field(
        None,
        description="Learning rate of the text encoders' adapters, before the schedule's factor, or a list of two, of which 0 "
        "leaves that encoder untrained; null = optimizer.lr",
        json_schema_extra={
            "allowed": "a number (at least 1e-12, at most 1000), a list of two such as [5e-05, 1e-05], or null"
        },
    )

    @field_validator("lr")
    @classmethod
    def _one_is_trained(cls, given: Any) -> Any:
        if isinstance(given, list) and not any(given):
            raise ValueError("must not be 0 for both; set text_encoders.train false to train neither")
        if isinstance(given, list) and any(0 < rate < 1e-12 for rate in given):
            raise ValueError("each must be 0 or at least 1e-12")
        return given
