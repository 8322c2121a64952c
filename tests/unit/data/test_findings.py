"""What the terminal shows of the notes on the data."""

from sushi_research.data import findings
from sushi_research.data.findings import lines, summary
from sushi_research.data.scan import Problem, Scan
from sushi_research.terminal import say


def test_a_frequent_note_does_not_hide_the_others():
    orphans = [f"{number}.txt: a caption without an image" for number in range(100)]
    repeats = ["02_side: 7 images, each shown 2 times per epoch", "03_back: 1 images, each shown 3 times per epoch"]
    assert summary(Scan("photos", notes=[*orphans, *repeats], ignored=2)) == [
        *orphans[:3],
        "and 97 more like the last (a run's data_report.json lists them)",
        *repeats,
        "2 other files are ignored (neither images nor captions)",
    ]


def test_the_lines_of_the_terminal():
    problems = [Problem(f"{number}.png", "the file is empty") for number in range(12)]
    found = lines(problems, ["one", "two"])
    assert found[:2] == ["skipped      12:", "             0.png: the file is empty"]
    assert found[10:] == [
        "             9.png: the file is empty",
        "             and 2 more (a run's data_report.json lists them)",
        "notes        one",
        "             two",
    ]
    assert lines([], []) == []


def test_names_that_a_terminal_cannot_show_are_escaped(capsys):
    say(*lines([Problem("metadata.jsonl line 1", "\ud800.png is not among the images")], ["\x1b[2J: no image"]))
    assert capsys.readouterr().out.splitlines()[1:] == [
        "             metadata.jsonl line 1: \\ud800.png is not among the images",
        "notes        \\x1b[2J: no image",
    ]


def test_of_very_many_notes_of_a_kind_the_others_are_counted(monkeypatch):
    monkeypatch.setattr(findings, "LISTED", 2)
    notes = [f"{number}.txt: a caption without an image" for number in range(5)]
    assert findings.capped(notes[:2]) == notes[:2]
    assert findings.capped([*notes, "other"]) == [
        *notes[:2],
        "and 3 more like: 2.txt: a caption without an image",
        "other",
    ]
