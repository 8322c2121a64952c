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
class Question:
    """A question that one score of one variant answers, against the plain runs."""

    text: str
    study: str
    variant: str
    score: str


LEAD = (
    "Rules about captions, masks and prior preservation, each against a plain run, on data where it should matter. The base is the "
    "embedded SD1.5 (docs/demo.md), which draws sushi on plates; its adapters learn a star plate. A checker reads the pictures "
    "without a model, and a score is how many pictures show exactly what was asked for. No photo shows a scene that is asked for.",
    "`make experiment EXP=configs/experiments/tags.yaml` and `stamp.yaml` train the runs, with the seeds 0, 1 and 2, and "
    "`python -m demo.data_study` writes this page from them. Their records are next to it, so that "
    "`compare_runs.py docs/examples/data/stamp/runs --reference plain` compares them again.",
)
ABOUT = {
    "stamp": About(
        "Masks and prior preservation",
        (
            "16 photos of the star plate, each with the same stamp in its corner, and nothing else: without other images an "
            "adapter forgets what the base knew (docs/demo.md).",
            "`masks` has masks that are black on the stamp and 6 pixels around it, with `masks.background` 0. `prior` has a second "
            "set with images of the base's own world, `role: regularisation` and `target: base`: half of the samples, for which "
            "the target is what the base predicts without the adapter. `both` has both. `plate` is the star plate whatever is in "
            "the corner, `plate without the stamp` the whole picture, and `kept` the base's own world.",
        ),
        "Of 24 pictures, the mean of three seeds and each of them.",
    ),
    "tags": About(
        "Captions",
        (
            "48 photos, 16 of them with the star plate. The caption of each is four tags, the dish first and the others always in "
            "the same order (`star plate, two, tuna, maki`), with another wording in the next line (`a star plate with two tuna "
            "maki`). The base knows sentences in one order of words, and reads neither well.",
            "`plain` uses the first line as it is. `shuffle` has `captions.shuffle` with `keep_tags: 1`, `lines` uses both lines "
            "in turn, and `dropout` has `captions.dropout` 0.1. `tags in other orders` asks with the first tag kept and the others "
            "moved, `second wording` with the other wording, and `strong guidance` as in training with a guidance of 5, the "
            "default of `sample.guidance`; all other pictures have 2.5. `kept` are sentences of the base's own world.",
        ),
        "Of 24 pictures, the mean of three seeds and each of them.",
    ),
}
QUESTIONS = (
    Question("Do masks keep what is masked out of the pictures?", "stamp", "masks", "plate without the stamp"),
    Question("Do masks cost what is to be learned?", "stamp", "masks", "plate"),
    Question("Do masks keep more of what the base knew?", "stamp", "masks", "kept"),
    Question("Does prior preservation keep more of what the base knew?", "stamp", "prior", "kept"),
    Question("Does it cost what is to be learned?", "stamp", "prior", "plate"),
    Question("Does it keep the stamp out of the pictures of the plate?", "stamp", "prior", "plate without the stamp"),
    Question(
        "Do masks and prior preservation together keep the stamp out?", "stamp", "both", "plate without the stamp"
    ),
    Question("And do both together keep more of what the base knew?", "stamp", "both", "kept"),
    Question(
        "Does shuffling tags help where tags are asked for in other orders?", "tags", "shuffle", "tags in other orders"
    ),
    Question("What does shuffling do to tags in the order of the training?", "tags", "shuffle", "tags as in training"),
    Question("Do two captions for each photo help with the second wording?", "tags", "lines", "second wording"),
    Question("What do they do to the first wording?", "tags", "lines", "tags as in training"),
    Question("Does caption dropout help with strong guidance?", "tags", "dropout", "strong guidance"),
    Question("What does it do at the usual guidance?", "tags", "dropout", "tags as in training"),
)
LIMITS = [
    "The base is tiny, the data is drawn, and the trainings are short: on a real base an effect may differ in size and in sign.",
    "The data sets were made so that plain runs fail at what a rule is for. On other data the rules have less to do.",
    "Pilots with seed 0 led to these data sets, and two earlier ones were given up. One had photos on a cloth, with everything but "
    "the plate masked (`masks.background` 0): the cloth was gone, but the plate came out round, because nothing says where "
    "black begins. In the other one the tags had the order of the base's own sentences, `shuffle` moved all of them, and it was "
    "right less often than `plain` where tags were asked for in other orders (8 against 12 of 24). After it the order, the first "
    "tag that is kept and the length of the training were changed.",
    "With three seeds only large differences are found. That no difference is shown does not mean that there is none.",
]
