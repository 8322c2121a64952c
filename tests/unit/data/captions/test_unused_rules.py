"""Caption rules that concern no caption are named, and others are not."""

import pytest

from sushi_research.config import SD15Training
from sushi_research.data.captions.of_run import rules_of_sets
from sushi_research.data.captions.unused_rules import unused_rules
from sushi_research.data.samples import Sample, Samples


def notes(captions, *, sets=None, **rules):
    """The notes on the rules, with one image of each (caption, data set)."""
    data = {"sets": sets} if sets else {"path": "photos"}
    config = SD15Training(model={"base": "base"}, data=data, captions=rules, train={"steps": 1})
    samples = [
        Sample(f"{number}.png", f"{number:032}", lines[0], 64, 64, 1, bytes, lines=lines, set=index)
        for number, (lines, index) in enumerate(captions)
    ]
    return unused_rules(config, Samples.of(samples), rules_of_sets(config))


@pytest.mark.parametrize(
    ("rules", "caption", "note"),
    [
        ({"replace": {"cat": "dog", "giraffe": "cat"}}, "a cat", "replace: no caption has giraffe"),
        ({"replace": {"cat": "dog"}}, "caterpillar, a cat", None),
        ({"alternatives": True}, "a {red} hat", "alternatives: no caption has {a|b}"),
        ({"alternatives": True}, "a {red|blue} hat", None),
        ({"shuffle": True}, "a cat", "shuffle: no caption has two tags (captions.tag_separator is ',')"),
        (
            {"shuffle": True, "keep_tags": 1},
            "a, b",
            "shuffle: no caption has two tags after the first 1 (captions.tag_separator is ',')",
        ),
        ({"shuffle": True, "keep_tags": 1}, "a, b, c", None),
        ({"shuffle": True, "keep_tags": 9}, "a ||| b, c", None),
        ({"tag_categories": {"hair": {"file": "hair.txt", "dropout": 0.5}}}, "a cat, short hair", None),
        (
            {"tag_categories": {"hair": {"file": "hair.txt", "dropout": 0.5}}},
            "a cat",
            "tag_categories: no caption has one of their tags",
        ),
    ],
)
def test_a_rule_that_concerns_no_caption_is_named(tmp_path, monkeypatch, rules, caption, note):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hair.txt").write_text("Long_Hair\nshort_hair\n")
    assert notes([((caption,), 0)], **rules) == ([f"captions.{note}"] if note else [])


def test_all_lines_and_all_data_sets_with_a_rule_count():
    rules = {"replace": {"cat": "dog"}}
    assert notes([(("a", "a cat"), 0)], **rules) == []
    assert notes([(("a", "a cat"), 0)], **rules, lines="first") == ["captions.replace: no caption has cat"]
    captions = [(("a",), 0), (("a cat",), 1)]
    assert notes(captions, sets=[{"path": "a"}, {"path": "b"}], **rules) == []
    sets = [{"path": "a", "captions": rules}, {"path": "b"}]
    assert notes(captions, sets=sets) == ["data.sets[0].captions.replace: no caption has cat"]
