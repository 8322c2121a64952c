"""The words of the data study's page."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class About:
    """What the page says of one study: above its table, and below it."""

    heading: str
    texts: tuple[str, ...]
    reading: str


@dataclass(frozen=True)
class Claim:
    """A sentence about one score of one variant."""

    text: str
    study: str
    score: str
    variant: str


LEAD = (
    "Rules about captions, masks and prior preservation, each against a plain run, on data where it should matter. The base is the "
    "embedded SD1.5 (docs/demo.md), which draws sushi on plates; its adapters learn a star plate. A checker reads the pictures "
    "without a model, and a score is how many pictures show exactly what was asked for. No photo shows a scene that is asked for.",
    "`make experiment EXP=configs/experiments/tags.yaml` and `stamp.yaml` train the runs, with the seeds 0, 1 and 2, and "
    "`python -m demo.data_study` writes this page from them. Their records are next to it, so that "
    "`compare_runs.py docs/examples/data/tags/runs --reference plain` compares them again. "
    "All tests: [tags](tags/comparison.md), [stamp](stamp/comparison.md).",
)
ABOUT = {
    "tags": About("Captions", (), ""),
    "stamp": About("Masks and prior preservation", (), ""),
}
CLAIMS: tuple[Claim, ...] = ()
LIMITS: list[str] = []
