"""The texts of a run: known beforehand, used equally often, and the same however the run is cut into launches."""

from dataclasses import replace

import numpy as np
import pytest

from sushi_research.config.captions import CaptionRules, CaptionSection
from sushi_research.data.buckets import BucketRule
from sushi_research.data.captions import run_captions
from sushi_research.data.captions.rules import Rules, with_plain
from sushi_research.data.captions.run_captions import RunCaptions, chosen_variants, require_effect
from sushi_research.data.items import make_items
from sushi_research.data.samples import Sample, Samples
from sushi_research.errors import UserError
from sushi_research.remembered import Remembered

RULE = BucketRule(resolution=64, step=32, min_side=32, max_side=128)
TAGS = "a, b, c, d, e, f"


def captions_of(keys, *, lines=((TAGS,),), repeats=1, **options):
    """The captions of images with these lines; `keys` are those of the rules."""
    rules = tuple(Rules(CaptionRules(**each)) for each in ([keys] if isinstance(keys, dict) else keys))
    samples = [
        Sample(f"{n}.png", f"{n:032x}", each[0], 64, 64, repeats, bytes, lines=each, set=n % len(rules))
        for n, each in enumerate(lines)
    ]
    items, _ = make_items(with_plain(Samples.of(samples), rules), RULE)
    return RunCaptions(items, rules, **options)


def used(captions):
    return [captions.text_of(index, epoch) for epoch in range(captions.epochs) for index in range(len(captions.items))]


def test_without_rules_a_caption_is_its_only_text():
    captions = captions_of({}, lines=[("x",), ("y",), ("x",)], epochs=5, repeats=2)
    assert captions.texts.to_pylist() == ["x", "y"] and set(used(captions)) == {"x", "y"} and captions.facts() is None
    assert RunCaptions(captions.items, captions.rules, in_step=True).texts.to_pylist() == []


@pytest.mark.parametrize("variants", [None, 4, 100])
def test_the_texts_are_exactly_those_that_are_used(variants):
    captions = captions_of({"shuffle": True}, lines=[(TAGS,), ("x, y, z",)], repeats=3, epochs=5, variants=variants)
    texts = used(captions)
    assert set(texts) == set(captions.texts.to_pylist())
    assert captions.largest == (4 if variants == 4 else 15)
    longer = captions_of({"shuffle": True}, lines=[(TAGS,), ("x, y, z",)], repeats=3, epochs=9, variants=variants)
    assert used(longer)[: len(texts)] == texts


def test_variants_come_equally_often():
    captions = captions_of({"shuffle": True}, epochs=40, variants=5)
    texts = used(captions)
    assert all(sorted(texts[start : start + 5]) == sorted(texts[:5]) for start in range(0, 40, 5))
    assert len({tuple(texts[start : start + 5]) for start in range(0, 40, 5)}) > 4


def test_lines_take_turns():
    lines = [("one", "two", "three")] * 20
    captions = captions_of({"prefix": "a"}, lines=lines, epochs=3)
    texts = used(captions)
    for image in range(20):
        assert sorted(texts[image::20]) == ["a one", "a three", "a two"]
    assert len(set(texts[:20])) == 3  # not all begin with the first
    assert captions.texts.to_pylist() == ["a one", "a three", "a two"] and captions.items[0].sample.caption == "a one"
    first = captions_of({"lines": "first"}, lines=lines, epochs=3)
    assert set(used(first)) == {"one"} and first.facts() is None and captions.facts().keys() == {"texts"}


def test_a_dropped_caption_is_empty_at_its_rate():
    captions = captions_of({"dropout": 0.3}, lines=[("x",)] * 50, epochs=20)
    share = np.mean([text == "" for text in used(captions)])
    assert 0.25 < share < 0.35  # three standard deviations: 0.3 +- 0.043
    assert captions.facts() is None, "the settings say it all"
    assert not any(captions_of({}, lines=[("x",)]).is_dropped(0, epoch) for epoch in range(50))


def test_each_set_has_its_own_rules():
    captions = captions_of([{"trigger": "sks"}, {"dropout": 1.0}], lines=[("x",), ("y",), ("z",)])
    assert [captions.text_of(index, 0) for index in range(3)] == ["sks, x", "", "sks, z"]


def test_the_largest_number_of_variants_that_fits_is_chosen(monkeypatch):
    captions = captions_of({"shuffle": True}, lines=[(TAGS,)] * 10, epochs=20)
    assert chosen_variants(captions, None, 1) is None
    monkeypatch.setattr(run_captions, "MOST_CHUNKS", 79)
    assert [chosen_variants(captions, None, chunks) for chunks in (1, 3, 100)] == [7, 2, 1]
    assert chosen_variants(captions, 12, 1) == 12
    assert (
        chosen_variants(captions, None, 1, kept=9) == 9
        and chosen_variants(captions, None, 1, kept="one per use") is None
    )


def test_the_facts_have_what_the_texts_depend_on():
    def facts(keys=None, lines=((TAGS,),), rates=(), **options):
        captions = captions_of({"shuffle": True} | (keys or {}), lines=lines, **options)
        return RunCaptions(
            captions.items, (Rules(captions.rules[0].config, dict(rates)),), variants=captions.variants
        ).facts()

    assert facts() == facts(epochs=7) and facts()["variants"] == "one per use"
    others = [facts({"keep_tags": 1}), facts(lines=(("x, y",),)), facts(rates={"a": 0.5}), facts(variants=3)]
    assert len({str(each) for each in [facts(), *others]}) == 5


def test_the_facts_leave_out_what_may_change():
    """captions.encode and captions.variants may change while K stays the same, and where captions are from is a place."""
    captions = captions_of({"shuffle": True})
    facts = [
        replace(captions, rules=(Rules(CaptionSection(shuffle=True, **keys)),)).facts()
        for keys in ({}, {"encode": "while_training"}, {"variants": 9}, {"source": "name"}, {"allow_empty": True})
    ]
    assert facts == [captions.facts()] * 5


def test_remembered_texts_are_those_of_the_same_captions_and_use(tmp_path):
    remembered = Remembered(tmp_path)
    images = [{"lines": lines} for lines in ((("x",), ("y", "z")), (("w",), ("y", "z")), (("x",), ("y", "v")))]
    others = [{"epochs": 2}, {"rest": np.array([1])}, {"seed": 5, "epochs": 1}, {"keys": {"prefix": "p"}}]
    for options in [*images, *({**images[0], **other} for other in others)] * 2:
        captions = captions_of(**{"keys": {}, **options}, remembered=remembered)
        assert captions.texts.to_pylist() == replace(captions, remembered=None).texts.to_pylist()


def test_variants_need_a_random_rule():
    require_effect([Rules(CaptionRules()), Rules(CaptionRules(alternatives=True))], variants=3)
    with pytest.raises(UserError, match="captions.variants has no effect"):
        require_effect([Rules(CaptionRules(dropout=0.5))], variants=3)


def test_keys_about_tags_need_a_rule_about_tags():
    require_effect([Rules(CaptionRules(keep_tags=1)), Rules(CaptionRules(shuffle=True))])
    with pytest.raises(UserError, match="captions.keep_tags has no effect"):
        require_effect([Rules(CaptionRules(keep_tags=1))])


@pytest.mark.parametrize("variants", [None, 3, 5, 100])
def test_of_an_epoch_that_is_only_begun_no_other_text_is_needed(variants):
    whole = captions_of(
        {"shuffle": True}, lines=[(TAGS,), ("u, v, w, x, y, z",)], repeats=3, epochs=1, variants=variants
    )
    begun = RunCaptions(whole.items, whole.rules, epochs=1, rest=np.array([1, 4, 5]), variants=variants)
    texts = used(begun) + [begun.text_of(index, 1) for index in begun.rest]
    assert set(texts) <= set(begun.texts.to_pylist())
    assert len(begun.texts) == {None: 9, 3: 6, 5: 9, 100: 9}[variants] and begun.all_uses.tolist() == [4, 5]
