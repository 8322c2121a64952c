"""Caption rules make one line of text of any caption, the same each time, whatever stands in rules and captions."""

from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from sushi_research import caption_text
from sushi_research.config.captions import CaptionRules
from sushi_research.data.captions import tags
from sushi_research.data.captions.rules import Rules
from sushi_research.errors import UserError

PIECES = [
    "a",
    "sks",
    "long_hair",
    "^_^",
    "{",
    "}",
    "{{",
    "}}",
    "|",
    "|||",
    ",",
    ", ",
    " ",
    "_",
    "(x:1.2)",
    "\u3000",
    "\\1",
]
PIECES += ["\u72ac", "e\u0301", "\ufb01", "\u200d", "\U0001f363", "\\g<0>", "%s", "&amp;", "{a|b}", "{|}", "."]
letters = st.characters(exclude_categories=("Cs", "Cc", "Cn", "Co"), exclude_characters="\ufffd\u2028\u2029")
lines = st.lists(st.sampled_from(PIECES) | st.text(letters, max_size=3), max_size=12).map("".join)
short = st.lists(st.sampled_from(PIECES) | st.text(letters, max_size=2), min_size=1, max_size=3).map("".join)
configs = st.fixed_dictionaries(
    {},
    optional={
        "alternatives": st.booleans(),
        "replace": st.dictionaries(short, short | st.just(""), max_size=3),
        "underscores_to_spaces": st.booleans(),
        "tag_separator": st.sampled_from([",", ";", "|", " |", "\u3001", "."]),
        "shuffle": st.booleans(),
        "keep_tags": st.integers(0, 3),
        "keep_separator": st.sampled_from(["|||", "#", "||"]),
        "tag_dropout": st.sampled_from([0.0, 0.5, 1.0]),
        "prefix": short | st.just(""),
        "suffix": short | st.just(""),
        "trigger": st.none() | short,
    },
)


def rules_of(config: dict) -> Rules:
    try:
        return Rules(CaptionRules(**config))
    except (ValueError, UserError):
        assume(False)
        raise


@settings(max_examples=150)
@given(lines, configs, st.integers(0, 2**63), st.integers(0, 10**6))
@example("{a|b", {"alternatives": True, "shuffle": True}, 0, 0)
@example("a|||b|||c|||d", {"shuffle": True, "tag_dropout": 1.0, "suffix": "."}, 0, 0)
@example("", {"alternatives": True, "tag_dropout": 1.0, "trigger": "sks"}, 0, 0)
def test_any_rules_of_any_caption(line, config, seed, number):
    rules = rules_of(config)
    first, plain = rules.variant(line, seed, "0" * 32, number), rules.plain(line)
    assert first == rules.variant(line, seed, "0" * 32, number) and plain == rules.plain(line)
    for text in (first, plain):
        assert caption_text.problem(text) is None and "\n" not in text
    if not rules.is_random:
        assert first == plain


@settings(max_examples=60)
@given(lines, st.integers(0, 3), st.integers(0, 10**6))
def test_a_shuffle_keeps_all_tags_and_the_first_ones_in_their_place(line, keep, number):
    config = CaptionRules(shuffle=True, keep_tags=keep)
    before = tags.split(line, config)
    after = tags.split(Rules(config).variant(line, 0, "0" * 32, number), config)
    if config.keep_separator not in line:  # it is removed, and what it kept is kept no longer
        assert after.first == before.first and sorted(after.free) == sorted(before.free)


@settings(max_examples=60)
@given(lines)
def test_without_rules_a_caption_is_what_it_was(line):
    assert Rules(CaptionRules()).plain(line) == Rules(CaptionRules()).variant(line, 0, "0" * 32, 3) == line
