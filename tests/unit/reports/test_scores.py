"""Scores of a user's own judge: what is read, what is refused, and which belong to the run as it is."""

from __future__ import annotations

import json

import pytest

from sushi_research.errors import UserError
from sushi_research.reports.scores import Score, read_scores, scores_of_run


def test_the_long_form_and_both_short_ones(tmp_path):
    path = tmp_path / "scores.json"
    content = {
        "concept": {"values": {"one egg maki": 1, "two tuna maki": 0.5}, "better": "lower", "about": "learned"},
        "kept": {"values": {"one egg maki": 1}, "about": "kept"},
        "sharpness": {"one egg maki": 0.3, "values": 2},
        "votes": 17,
    }
    path.write_text(json.dumps(content))
    assert read_scores(path) == {
        "concept": Score({"one egg maki": 1.0, "two tuna maki": 0.5}, False, "learned"),
        "kept": Score({"one egg maki": 1.0}, True, "kept"),
        "sharpness": Score({"one egg maki": 0.3, "values": 2.0}, True, None),
        "votes": Score({"": 17.0}, True, None),
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not valid JSON"),
        ("[1]", "it should be a JSON object"),
        ("{}", "at least 1 item"),
        ('{"a": 1, "a": 2}', "a key occurs twice"),
        ('{"": 1}', "it needs a name"),
        ('{"a\\nb": 1}', "it needs a name that can be printed"),
        ('{"a": true}', r"\(a: it should be a valid number"),
        ('{"a": "good"}', r"\(a: it should be a valid number"),
        ('{"a": null}', r"\(a: it should be a valid number"),
        ('{"a": NaN}', r"\(a: "),
        ('{"a": 1e999}', r"\(a: "),
        ('{"a": {"one": -1e70}}', r"\(a: one: it should be 0, or a number between 1e-40 and 1e\+70 but for its sign"),
        ('{"a": {"one": 1e-41}}', r"\(a: one: it should be 0, or a number between 1e-40"),
        ('{"a": 1%s}' % ("0" * 400), r"\(a: "),
        ('{"a": {}}', r"\(a: values is missing"),
        ('{"a": {"one": 1, "two": "x"}}', r"\(a: values is missing"),
        ('{"a": {"one": true}}', r"\(a: one: it should be a valid number"),
        ('{"a": {"one": Infinity}}', r"\(a: one: "),
        ('{"a": {"": 1}}', "a unit needs a name"),
        ('{"a": {"values": {}}}', r"\(a: values: .*at least 1 item"),
        ('{"a": {"values": {"one": false}}}', r"\(a: values.one: it should be a valid number"),
        ('{"a": {"values": {"one": 1}, "beter": "lower"}}', r"\(a: beter: "),
        ('{"a": {"values": {"one": 1}, "better": "up"}}', r"\(a: better: it should be 'higher' or 'lower'"),
        ('{"a": {"values": {"one": 1}, "about": "style"}}', r"\(a: about: it should be 'learned' or 'kept'"),
    ],
)
def test_anything_else_is_one_sentence_that_names_the_file_and_the_score(tmp_path, text, words):
    path = tmp_path / "scores.json"
    path.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        read_scores(path, "that part is skipped")
    said = str(caught.value)
    assert said.startswith(str(path)) and said.endswith(": that part is skipped") and "\n" not in said


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda: {f"a{number}": 1 for number in range(101)}, "at most 100 items"),
        (lambda: {"a": dict.fromkeys(map(str, range(100_001)), 1)}, r"\(a: .*at most 100000 items"),
        (lambda: {"a": {"b" * 2**24: 1}}, "is larger than 16,777,216 bytes"),
    ],
    ids=["scores", "units", "bytes"],
)
def test_the_sizes_are_bounded(tmp_path, content, words):
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(content()))
    with pytest.raises(UserError, match=words):
        read_scores(path)


def test_scores_of_another_state_of_the_run_are_not_its_scores(tmp_path):
    assert scores_of_run(tmp_path, 20, "skipped") == {}
    (tmp_path / "scores.json").write_text('{"votes": 17}')
    assert scores_of_run(tmp_path, 20, "skipped") == {"votes": Score({"": 17.0})}  # by hand
    made = {"command": "judge {run}", "adapter": "a" * 64, "step": 20, "complete": True}
    (tmp_path / "scores_source.json").write_text(json.dumps(made))
    assert list(scores_of_run(tmp_path, 20, "skipped")) == ["votes"]
    for finished_at in (40, None):
        with pytest.raises(UserError, match=r"scores.json is of step 20, which is not the run's last one"):
            scores_of_run(tmp_path, finished_at, "skipped")
    (tmp_path / "scores_source.json").write_text(json.dumps(made | {"complete": False}))
    with pytest.raises(UserError, match="has no scores, because the command that makes them did not end well"):
        scores_of_run(tmp_path, 20, "skipped")
