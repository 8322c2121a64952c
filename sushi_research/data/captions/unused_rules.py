"""Notes on caption rules that change nothing, because no caption has what they are about, such as a misspelt word."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow
import pyarrow.compute as pc

from sushi_research.config import TrainingConfig
from sushi_research.config.sets import sets_of
from sushi_research.data.captions import tags
from sushi_research.data.captions.rules import Rules
from sushi_research.data.samples import Samples
from sushi_research.errors import some

# Of more captions the tags are not compared with those of categories, which takes seconds for a million.
MOST_COMPARED = 100_000


def unused_rules(config: TrainingConfig, samples: Samples, rules: Sequence[Rules]) -> list[str]:
    """A note for each rule that concerns no caption of the data sets that have it. `rules[s]` are those of the data set s."""
    sets_with: dict[str, list[int]] = {}
    for each in sets_of(config):
        place = "captions" if each.captions == config.captions else each.key("captions")
        sets_with.setdefault(place, []).append(each.index)
    notes = []
    for place, numbers in sets_with.items():
        own = np.isin(samples.sets, numbers)
        captions = samples.captions if own.all() else samples.captions.filter(pyarrow.array(own))
        lines = pc.list_flatten(captions) if rules[numbers[0]].config.lines == "all" else pc.list_element(captions, 0)
        notes += [f"{place}.{note}" for note in _unused(rules[numbers[0]], lines)]
    return notes


def _unused(rules: Rules, lines: pyarrow.Array) -> list[str]:
    config, notes = rules.config, []
    if config.fix_text or not len(lines):  # ftfy may make what a rule is about
        return notes
    if lost := [text for text in config.replace if not _any(pc.match_substring(lines, text))]:
        notes.append(f"replace: no caption has {some(lost, 3)}")
    if config.alternatives and not _any(pc.match_substring_regex(lines, r"\{[^{}]*\|[^{}]*\}")):
        notes.append("alternatives: no caption has {a|b}")
    separated = _any(pc.match_substring(lines, config.keep_separator))
    if config.shuffle and not separated:
        # Two tags that may move are one separator more than those that stay.
        most = pc.max(pc.count_substring(lines, config.tag_separator)).as_py() or 0
        if most < config.keep_tags + 1:
            after = f" after the first {config.keep_tags}" if config.keep_tags else ""
            notes.append(
                f"shuffle: no caption has two tags{after} (captions.tag_separator is {config.tag_separator!r})"
            )
    if rules.rates and not separated and len(lines) <= MOST_COMPARED:
        parts = pc.unique(pc.list_flatten(pc.split_pattern(lines, config.tag_separator)))
        if not any(tags.normal(tag) in rules.rates for tag in parts.to_pylist()):
            notes.append("tag_categories: no caption has one of their tags")
    return notes


def _any(matches: pyarrow.Array) -> bool:
    return bool(pc.any(matches).as_py())
