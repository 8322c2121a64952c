"""Config section of the captions: where they are from, the rules that change them, and how they are encoded.

`CaptionRules` are the keys that each data set can have of its own; `CaptionSection` adds those of the run as a whole.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from sushi_research.config.section import Location, Section, require_text

Probability = Annotated[float, Field(ge=0, le=1)]
# The name of a tag category: no dot, which would be a nested key.
_Name = Annotated[str, Field(pattern=r"^[^.\s]{1,100}$")]


def _one_line(text: str) -> str:
    if len(text.splitlines()) > 1:
        raise ValueError("it has several lines, and captions have one")
    return text


_Line = Annotated[str, Field(max_length=1_000), AfterValidator(_one_line)]


class TagCategory(Section):
    """Tags that have a dropout probability of their own."""

    file: Location = Field(description="Text file with one tag on each line")
    dropout: Probability = Field(description="Probability of leaving out such a tag, each time a caption is used")


class CaptionRules(Section):
    """Where the captions of a data set are from, and the rules that change them."""

    source: Literal["files", "folder", "name"] = Field(
        "files",
        description="Where captions are from: files = caption files, metadata.jsonl or the caption column; folder = the name of "
        "the image's folder, without the repeats (kohya's 10_sks person is sks person); name = the image's file name",
    )
    allow_empty: bool = Field(
        False, description="Train images that have no caption, or an empty one, with the empty caption"
    )
    lines: Literal["all", "first"] = Field(
        "all",
        description="Of a caption of several lines, or a list column: all = another line at each use, first = only the first",
    )
    fix_text: bool = Field(
        False,
        description="Replace typographic quotes, ligatures and HTML entities as CLIP's original tokenizer did "
        "(ftfy, an extra to install: text)",
    )
    alternatives: bool = Field(
        False, description="Choose one of {a|b} each time a caption is used; {{ and }} are literal brackets"
    )
    replace: dict[Annotated[str, Field(min_length=1, max_length=1_000)], _Line] = Field(
        {},
        description="Words or phrases to replace, each by another text; an empty text removes it; null removes an entry that an "
        "earlier file set",
        json_schema_extra={"allowed": "a word or phrase with the text that replaces it"},
    )
    underscores_to_spaces: bool = Field(
        False, description="Write long_hair as long hair; words of up to three letters, such as ^_^, stay"
    )
    tag_separator: Annotated[str, Field(min_length=1, max_length=10)] = Field(
        ",", description="What separates tags, for the rules about tags"
    )
    shuffle: bool = Field(False, description="Put the tags in a new order each time a caption is used")
    keep_tags: int = Field(0, ge=0, le=1_000, description="The first so many tags are neither moved nor dropped")
    keep_separator: Annotated[str, Field(min_length=1, max_length=10)] = Field(
        "|||",
        description="Tags before the first one of these, and after a second one, are neither moved nor dropped; it is removed",
    )
    tag_dropout: Probability = Field(0.0, description="Probability of leaving out a tag, each time a caption is used")
    tag_categories: dict[_Name, TagCategory] = Field(
        {},
        description="Dropout probabilities of the tags that a text file lists, one on each line; of several categories that have a "
        "tag, the first counts",
        json_schema_extra={
            "allowed": "the name of a category with {file: tags.txt, dropout: 0.3}",
        },
    )
    prefix: _Line = Field("", description="Text before every caption; no rule about tags changes it")
    suffix: _Line = Field("", description="Text after every caption; no rule about tags changes it")
    trigger: Annotated[_Line, AfterValidator(str.strip)] | None = Field(
        None, description="Word or phrase that is put before every caption that does not have it, as a tag; null = none"
    )
    dropout: Probability = Field(
        0.0, description="Probability of training with the empty caption instead of an image's own"
    )

    @property
    def has_tag_rules(self) -> bool:
        """Whether tags are moved or dropped, so that `keep_tags` and `keep_separator` mean something."""
        return self.shuffle or self.tag_dropout > 0 or bool(self.tag_categories)

    @property
    def is_random(self) -> bool:
        """Whether the text of a caption differs from use to use. Dropping a whole caption does not count."""
        return self.alternatives or self.has_tag_rules

    @model_validator(mode="after")
    def _texts_are_text(self) -> CaptionRules:
        texts = {"captions.prefix": [self.prefix], "captions.suffix": [self.suffix]}
        texts["captions.trigger"] = [self.trigger or ""]
        require_text(texts | {"captions.replace": [*self.replace, *self.replace.values()]})
        if self.trigger == "":
            raise ValueError("captions.trigger is blank: give a word, or null")
        return self

    @model_validator(mode="after")
    def _separators_differ(self) -> CaptionRules:
        if not self.tag_separator.strip():
            raise ValueError(
                "captions.tag_separator is blank, which would make each word a tag: give a character such as ,"
            )
        if self.tag_separator in self.keep_separator:
            raise ValueError(
                f"captions.keep_separator is {self.keep_separator!r}, which has the captions.tag_separator "
                f"{self.tag_separator!r} in it: choose another one"
            )
        return self


class CaptionSection(CaptionRules):
    """The captions: where they are from, the rules that change them, and how they are encoded."""

    variants: Annotated[int, Field(ge=1, le=100_000)] | None = Field(
        None,
        description="Texts that the random rules make of each caption at most, which the cache holds; null = one for each use if "
        "these are few enough, otherwise as many as fit (the plan says which)",
    )
    encode: Literal["before", "while_training"] = Field(
        "before",
        description="When the captions of the training are encoded: before = once, into the cache; while_training = in each step, "
        "with the text encoders in memory, so that each use has a text of its own",
    )
    chunks: int = Field(
        1,
        ge=1,
        le=16,
        description="Read at most so many chunks of 75 tokens of a caption; what is longer is cut",
    )
    chunk_layout: Literal["separate", "kohya"] = Field(
        "separate",
        description="How chunks are put together: separate = as inference programs do, each caption as long as it needs; kohya = "
        "as kohya's sd-scripts, every caption filled up to captions.chunks",
    )
