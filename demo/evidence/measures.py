"""Whether losses and distances follow the pictures: the answers from the recorded study of measures (demo/study)."""

from __future__ import annotations

import numpy as np

from demo.evidence.answers import IN_PART, NO, YES, Answer
from demo.study import choices, results
from demo.study.analysis import ordered
from demo.study.page import GOAL, scores, values
from demo.study.results import Measured

# Each question with the score and the measure that it is about, as the page calls them.
QUESTIONS = (
    ("Does mean squared error on held-out images follow the right pictures of the concept?", "learned", "mse"),
    ("Does log loss on held-out images (t >= 750)?", "learned", "log, t >= 750"),
    (
        "Does the distance of pictures from the held-out images?",
        "learned",
        "pictures, distance from the held-out images",
    ),
    ("Does drift follow the right pictures of the base's world?", "kept", "drift"),
    ("Does log loss on the base's own pictures?", "kept", "log, the base's images"),
    ("Does log loss on prior images?", "kept", "log, prior images"),
    ("Does the distance of pictures from the base's?", "kept", "pictures, distance from the base's"),
)
KEEP_BEST = "Does the step that evaluation.keep_best takes have a better score than the last?"


def answers() -> list[Answer]:
    """An answer for each measure, by the share of pairs of adapters that it puts in the order of the score."""
    studied = results.recorded()
    return [*(_of(studied, *question) for question in QUESTIONS), _of_keep_best(studied)]


def _of(studied: dict[str, list[Measured]], text: str, kind: str, name: str) -> Answer:
    told, reached = [], []
    for setting, adapters in studied.items():
        right, of = ordered(np.array(values(adapters, kind, name)), np.array(scores(adapters, kind)))
        reached.append(of > 0 and right / of >= GOAL)
        told.append(f"{setting} {right / max(of, 1):.0%} of {of}")
    return Answer(text, _label(reached), f"pairs in order: {', '.join(told)}", 0)


def _of_keep_best(studied: dict[str, list[Measured]]) -> Answer:
    heads, *rows = choices.lengths_table(studied)
    of_rule = {name: [float(cell) for cell in cells] for name, *cells in rows}
    pairs = list(zip(of_rule["the last"], of_rule["as evaluation.keep_best"], strict=True))
    told = [f"{setting} {last:.3f} and {chosen:.3f}" for setting, (last, chosen) in zip(studied, pairs, strict=True)]
    said = "score lost against the best length, by the last and by the one that it takes: "
    return Answer(KEEP_BEST, _label([chosen < last for last, chosen in pairs]), said + ", ".join(told), 0)


def _label(reached: list[bool]) -> str:
    return YES if all(reached) else IN_PART if any(reached) else NO
