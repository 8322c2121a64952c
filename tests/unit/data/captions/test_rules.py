"""What the rules make of a caption, and that each text is a function of the seed, the image and the number of the variant."""

from collections import Counter
from types import SimpleNamespace

import pytest

from sushi_research.config.captions import CaptionRules
from sushi_research.data.captions import rules
from sushi_research.data.captions.rules import Rules, rules_of
from sushi_research.errors import UserError

CAPTION = "1girl, long_hair, smile, ^_^, red dress"
PLAIN = [
    ({}, "as_it is,,  really", "as_it is,,  really"),
    ({"prefix": "photo of"}, "a cat", "photo of a cat"),
    ({"suffix": "at night"}, "a cat", "a cat at night"),
    ({"suffix": ", at night"}, "a cat", "a cat, at night"),
    ({"prefix": "photo of"}, "", "photo of"),
    ({"trigger": "sks"}, "a cat", "sks, a cat"),
    ({"trigger": "sks"}, "a photo of SKS cat", "a photo of SKS cat"),
    ({"trigger": "sks"}, "sksy cat", "sks, sksy cat"),
    ({"trigger": "sks"}, "", "sks"),
    ({"trigger": "sks", "prefix": "photo of"}, "a cat", "sks, photo of a cat"),
    ({"replace": {"cat": "dog", "dog": "cow"}}, "cat, caterpillar, dog", "dog, caterpillar, cow"),
    ({"replace": {"cat": "sks", "black cat": "rex"}}, "a black cat, a cat", "a rex, a sks"),
    ({"replace": {"猫": "犬"}}, "黒猫と白猫", "黒犬と白犬"),
    ({"replace": {"(a+": "b"}}, "x (a+ y", "x b y"),
    ({"replace": {"solo": ""}}, "1girl, solo, a  solo smile", "1girl, a smile"),
    ({"replace": {"solo": ""}}, "in 1,000  years", "in 1,000  years"),
    ({"trigger": " sks "}, "sks cat", "sks cat"),
    ({"trigger": "mr_cat", "underscores_to_spaces": True}, "Mr_cat, long_hair", "Mr_cat, long hair"),
    ({"underscores_to_spaces": True}, CAPTION, "1girl, long hair, smile, ^_^, red dress"),
    ({"underscores_to_spaces": True, "tag_separator": ";"}, "o_o;long_hair", "o_o;long hair"),
    ({"alternatives": True}, "a {red|blue} {cat}, {{a|b}} }", "a red cat, {a|b} }"),
    ({"shuffle": True}, "a,b , c", "a,b , c"),
    ({"shuffle": True}, "a, b ||| c,d|||e", "a, b, c, d, e"),
    ({"fix_text": True}, "the cat\u2019s \ufb01sh &amp;quot;A&amp;quot;", 'the cat\'s fish "A"'),
]


@pytest.mark.parametrize(("keys", "line", "expected"), PLAIN)
def test_plain_captions(keys, line, expected):
    assert Rules(CaptionRules(**keys)).plain(line) == expected


def variants(keys, line=CAPTION, number=200, image="i", seed=0, rates=None):
    rules = Rules(CaptionRules(**keys), rates or {})
    return [rules.variant(line, seed, image, each) for each in range(number)]


def test_a_shuffle_moves_all_tags_but_those_kept():
    found = [text.split(", ") for text in variants({"shuffle": True, "keep_tags": 2})]
    assert {tuple(tags[:2]) for tags in found} == {("1girl", "long_hair")}
    assert all(sorted(tags[2:]) == ["^_^", "red dress", "smile"] for tags in found)
    # Each of the three free tags comes third equally often: 67 of 200, with a standard deviation of 6.7.
    assert all(40 < count < 94 for count in Counter(tags[2] for tags in found).values())
    kept = [text.split(", ") for text in variants({"shuffle": True}, "a, b ||| c, d, e ||| y, z")]
    assert {(*tags[:2], *tags[-2:]) for tags in kept} == {("a", "b", "y", "z")} and len(set(map(tuple, kept))) == 6


def test_tags_are_dropped_at_the_rate_of_their_category():
    keys = {"tag_dropout": 0.5, "keep_tags": 1}
    found = Counter(
        tag for text in variants(keys, number=400, rates={"long hair": 0.0, "smile": 1.0}) for tag in text.split(", ")
    )
    assert found["1girl"] == found["long_hair"] == 400 and found["smile"] == 0
    assert 150 < found["red dress"] < 250
    # Another rate changes no order.
    few, all_ = (variants({"shuffle": True, "tag_dropout": rate}) for rate in (0.3, 0.0))
    for dropped, whole in zip(few, all_, strict=True):
        left = dropped.split(", ")
        assert [tag for tag in whole.split(", ") if tag in left] == (left if dropped else [])


def test_the_trigger_is_first_and_is_never_dropped():
    found = variants(
        {"shuffle": True, "tag_dropout": 1.0, "trigger": "mr_cat", "suffix": ", night"}, "smile, Mr cat, red"
    )
    assert set(found) == {"mr_cat, night"}


def test_a_variant_depends_on_seed_image_and_number_alone():
    keys = {"shuffle": True, "tag_dropout": 0.2, "alternatives": True}
    line = "{a|b|c}, " + CAPTION
    first = variants(keys, line)
    assert first == variants(keys, line) and first[7] == Rules(CaptionRules(**keys)).variant(line, 0, "i", 7)
    assert first != variants(keys, line, seed=1) and first != variants(keys, line, image="j")


def test_the_first_category_that_has_a_tag_counts(tmp_path):
    (tmp_path / "style.txt").write_text("Long_Hair\n\n  smile \n", encoding="utf-8")
    (tmp_path / "other.txt").write_text("smile\nred dress\n", encoding="utf-8")
    (tmp_path / "empty.txt").write_text("\n")
    category = lambda name, rate: {"file": str(tmp_path / f"{name}.txt"), "dropout": rate}  # noqa: E731
    config = CaptionRules(tag_categories={"style": category("style", 0.1), "other": category("other", 0.9)})
    assert rules_of(config).rates == {"long hair": 0.1, "smile": 0.1, "red dress": 0.9}
    for name in ("empty", "missing"):
        with pytest.raises(UserError, match=rf"captions\.tag_categories\.c: .*{name}\.txt"):
            rules_of(CaptionRules(tag_categories={"c": category(name, 0.5)}))


def test_another_version_of_ftfy_is_another_rule(monkeypatch):
    fixed, plain = Rules(CaptionRules(fix_text=True)), Rules(CaptionRules())
    known = []
    for number in ("6.3.1", "7.0"):
        monkeypatch.setattr(rules, "_ftfy", lambda number=number: SimpleNamespace(__version__=number))
        known.append((fixed.settings, plain.settings))
    assert known[0][0] != known[1][0] and known[0][1] == known[1][1]
