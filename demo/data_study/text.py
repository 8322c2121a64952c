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
    "tags": About(
        "Captions",
        (
            "48 photos, 16 of them with the star plate. The caption of each is four tags, the dish first and the others "
            "always in the "
            "same order (`star plate, two, tuna, maki`), with another wording in the next line (`a star plate with two "
            "tuna maki`). The "
            "base knows sentences in one order of words, and reads neither well.",
            "`plain` uses the first line as it is. `shuffle` has `captions.shuffle` with `keep_tags: 1`, `lines` uses "
            "both lines in "
            "turn, and `dropout` has `captions.dropout` 0.1. `tags in other orders` asks with the first tag kept and the others "
            "moved, `second wording` with the other wording, and `strong guidance` as in training with a guidance of 5, "
            "the default of "
            "`sample.guidance`; all other pictures have 2.5. `kept` are sentences of the base's own world.",
        ),
        "Means of three seeds, and each seed, of 24 pictures.",
    ),
    "stamp": About(
        "Masks and prior preservation",
        (
            "16 photos of the star plate, each with the same stamp in its corner, and nothing else: without other "
            "images an adapter "
            "forgets what the base knew (docs/demo.md).",
            "`masks` has masks that are black on the stamp and 6 pixels around it, with `masks.background` 0. `prior` "
            "has a second set, "
            "32 images of the base's own world with `role: regularisation` and `target: base`: half of the samples, for which the "
            "target is what the base predicts without the adapter. `both` has both. `plate` is the star plate whatever "
            "is in the corner, "
            "`plate without the stamp` the whole picture, and `kept` the base's own world.",
        ),
        "Means of three seeds, and each seed, of 24 pictures.",
    ),
}
CLAIMS: tuple[Claim, ...] = ()
LIMITS: list[str] = []
