"""The rules that make the text of a use from the lines of a caption. Functions of the rules, seed, image and number of the variant.

The order of the rules: characters (`fix_text`), `alternatives`, `replace`, underscores, tags, prefix and suffix, trigger.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute

from sushi_research import randomness
from sushi_research.config.captions import CaptionRules
from sushi_research.data.captions import tags
from sushi_research.data.samples import Samples
from sushi_research.errors import UserError
from sushi_research.fingerprints import content_hash
from sushi_research.remembered import Remembered, columns_hash

# Increment it when the same rules give other texts.
VERSION = 2
# Captions that are Python objects at a time.
_AT_ONCE = 50_000
# `{a|b}`, which has no braces in it, as in kohya's sd-scripts.
_ALTERNATIVES = re.compile(r"\{([^{}]*)\}")
# What stands for {{ and }} in the meantime; `caption_text.problem` refuses both in a caption.
_OPEN, _CLOSE = "\0", "\1"
# No space before these at the beginning of a suffix.
_PUNCTUATION = ",.;:!?"


@dataclass(frozen=True)
class Rules:
    """The rules of a data set, ready for use: `rates` are the dropout probabilities of the tags in categories."""

    config: CaptionRules
    rates: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_random(self) -> bool:
        """Whether a line gives more than one text."""
        return self.config.is_random

    @property
    def settings(self) -> list[Any]:
        """What determines the texts: the rules, the tags of categories in place of their files, and the version of ftfy in use.

        Where captions are from is not in it, nor are the keys of the run as a whole, which may change.
        """
        names = CaptionRules.model_fields.keys() - {"source", "allow_empty", "tag_categories"}
        rules = [self.config.model_dump(include=names), sorted(self.rates.items())]
        return [*rules, f"ftfy {_ftfy().__version__}"] if self.config.fix_text else rules

    @property
    def changes_text(self) -> bool:
        """Whether `plain` gives anything but the line itself."""
        rules = self.config
        return bool(
            rules.is_random
            or rules.fix_text
            or rules.replace
            or rules.underscores_to_spaces
            or rules.prefix
            or rules.suffix
            or rules.trigger
        )

    def plain(self, line: str) -> str:
        """The line with the rules that are not random: the first of alternatives, no tag moved or dropped.

        For what is measured and shown: held-out images, sample prompts, pages and the adapter file.
        """
        rules = self.config
        text = self._words(line, lambda number: 0)
        if rules.has_tag_rules and rules.keep_separator in text:
            text = tags.split(text, rules).joined(rules.tag_separator)
        return self._framed(text)

    def variant(self, line: str, seed: int, image: str, number: int) -> str:
        """Variant `number` of the line, for the image with this content hash."""
        rules = self.config
        if not rules.is_random:
            return self.plain(line)
        generator = randomness.key(seed, "caption", image, number)
        text = self._words(line, lambda count: int(generator.integers(count)))
        if rules.has_tag_rules:
            found = tags.split(text, rules)
            if rules.trigger is not None:  # `_framed` puts it first
                trigger = tags.normal(rules.trigger)
                found = found._replace(free=[tag for tag in found.free if tags.normal(tag) != trigger])
            text = tags.varied(found, rules, self.rates, generator).joined(rules.tag_separator)
        return self._framed(text)

    def _words(self, line: str, choose: Callable[[int], int]) -> str:
        """The line with the rules about words. `choose(n)` gives the number of one of n alternatives."""
        rules, text = self.config, line
        if rules.fix_text:
            text = _fixed(text)
        if rules.alternatives:
            text = _chosen(text, choose)
        if self._replaced is not None:
            removed = any(not rules.replace[match[0]] for match in self._replaced.finditer(text))
            text = self._replaced.sub(lambda match: rules.replace[match[0]], text)
            text = _tidy(text, rules.tag_separator) if removed else text
        if rules.underscores_to_spaces:
            of_trigger = (rules.trigger or "").lower().split()  # which stays as it is written
            text = self._long_words.sub(
                lambda match: match[0] if match[0].lower() in of_trigger else match[0].replace("_", " "), text
            )
        return text

    def _framed(self, text: str) -> str:
        """The text with prefix, suffix and trigger."""
        rules = self.config
        text = " ".join(part for part in (rules.prefix, text) if part)
        if rules.suffix:
            space = "" if rules.suffix[0] in _PUNCTUATION else " "
            text = f"{text}{space}{rules.suffix}" if text else rules.suffix.lstrip(f"{_PUNCTUATION} ")
        if rules.trigger and not _phrase(rules.trigger, re.IGNORECASE).search(text):
            return f"{rules.trigger}{rules.tag_separator} {text}" if text else rules.trigger
        return text

    @cached_property
    def _replaced(self) -> re.Pattern[str] | None:
        """Matches what is replaced, the longest first; a text that a replacement makes is not replaced again."""
        longest = sorted(self.config.replace, key=lambda text: (-len(text), text))
        return re.compile("|".join(_phrase(text).pattern for text in longest)) if longest else None

    @cached_property
    def _long_words(self) -> re.Pattern[str]:
        """Matches words of four letters and more: shorter ones with an underscore are emoticons."""
        return re.compile(f"(?:(?!{re.escape(self.config.tag_separator)})\\S){{4,}}")


def rules_of(config: CaptionRules, place: str = "captions") -> Rules:
    """The rules with the tags of their files. Raises UserError if one cannot be read, or if ftfy is missing.

    `place` is the section that has them, for messages.
    """
    if config.fix_text:
        _ftfy()
    return Rules(config, tags.category_rates(config, place))


def with_plain(samples: Samples, rules: Sequence[Rules], remembered: Remembered | None = None) -> Samples:
    """The samples with the captions that `Rules.plain` makes of their first lines; `rules[s]` are those of the data set s.

    `remembered` has those that were made before.
    """
    if not np.array([each.changes_text for each in rules])[samples.sets].any():
        return samples
    first = pyarrow.compute.list_element(samples.captions, 0)
    make = partial(_plain_texts, first, samples.sets, rules)
    if remembered is None:
        return replace(samples, plain=make())
    key = content_hash(repr([VERSION, columns_hash(first, samples.sets), [each.settings for each in rules]]).encode())
    return replace(samples, plain=remembered.arrays("plain-captions", key, lambda: {"texts": make()})["texts"])


def _plain_texts(first: pyarrow.Array, sets: np.ndarray, rules: Sequence[Rules]) -> pyarrow.Array:
    parts = []
    for start in range(0, len(first), _AT_ONCE):
        rows = zip(first[start : start + _AT_ONCE].to_pylist(), sets[start : start + _AT_ONCE].tolist(), strict=True)
        parts.append(pyarrow.array([rules[number].plain(line) for line, number in rows], pyarrow.large_string()))
    return pyarrow.concat_arrays(parts)


def lines_of(captions: Sequence[str], rules: Rules) -> Sequence[str]:
    """The lines that are used of a caption."""
    return captions if rules.config.lines == "all" else captions[:1]


def line_of(lines: Sequence[str], seed: int, image: str, number: int) -> str:
    """The line that variant `number` is made from: each in turn, beginning at a random one of the image's."""
    if len(lines) == 1:
        return lines[0]
    return lines[(randomness.integer(seed, "caption-line", image, high=len(lines)) + number) % len(lines)]


def _phrase(text: str, flags: int = 0) -> re.Pattern[str]:
    """Matches the text, not within a longer word of Latin letters and digits. Other scripts may not separate words."""
    before = r"(?<![A-Za-z0-9])" if re.match("[A-Za-z0-9]", text) else ""
    after = r"(?![A-Za-z0-9])" if re.search("[A-Za-z0-9]$", text) else ""
    return re.compile(before + re.escape(text) + after, flags)


def _chosen(text: str, choose: Callable[[int], int]) -> str:
    """The text with one of each {a|b}. Braces without a partner stay."""
    text = text.replace("{{", _OPEN).replace("}}", _CLOSE)

    def one(match: re.Match[str]) -> str:
        options = match[1].split("|")
        return options[choose(len(options))].strip()

    return _ALTERNATIVES.sub(one, text).replace(_OPEN, "{").replace(_CLOSE, "}")


def _tidy(text: str, separator: str) -> str:
    """The text without the double spaces and the empty tags that a removed word leaves."""
    parts = [" ".join(part.split()) for part in text.split(separator)]
    return f"{separator} ".join(part for part in parts if part)


def _fixed(text: str) -> str:
    """The text as `basic_clean` and `whitespace_clean` of OpenAI's simple_tokenizer.py make it."""
    return " ".join(html.unescape(html.unescape(_ftfy().fix_text(text))).split())


def _ftfy() -> ModuleType | Any:
    try:
        import ftfy
    except ImportError:
        raise UserError(
            "captions.fix_text needs the package ftfy: install the extra (pip install --editable '.[text]'), or set it to false."
        ) from None
    return ftfy
