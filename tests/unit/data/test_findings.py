"""What the terminal shows of the notes on the data."""

from sushi_research.data.findings import lines, summary
from sushi_research.data.samples import Problem, Scan


def test_a_frequent_note_does_not_hide_the_others():
    orphans = [f"{number}.txt: a caption without an image" for number in range(100)]
    repeats = ["02_side: 7 images, each shown 2 times per epoch", "03_back: 1 images, each shown 3 times per epoch"]
    assert summary(Scan("photos", notes=[*orphans, *repeats], ignored=2)) == [
        *orphans[:3],
        "and 97 more like the last (a run lists all in data_report.json)",
        *repeats,
        "2 other files (not images or captions)",
    ]


def test_the_lines_of_the_terminal():
    problems = [Problem(f"{number}.png", "the file is empty") for number in range(12)]
    found = lines(problems, ["one", "two"])
    assert found[:2] == ["skipped      12:", "             0.png: the file is empty"]
    assert found[10:] == [
        "             9.png: the file is empty",
        "             and 2 more (a run lists all in plan.json)",
        "notes        one",
        "             two",
    ]
    assert lines([], []) == []
