"""The questions of docs/findings.md: each is one variant against the reference of its experiment."""

from __future__ import annotations

from dataclasses import dataclass

from demo.data_study.text import QUESTIONS as DATA
from demo.evidence.study import Study


@dataclass(frozen=True)
class Question:
    """`score`: the one score that answers it; "": the result of the pair, by all that was measured.

    `told`: the label and the numbers of an answer that does not follow from the pair's tests alone, as on the page.
    """

    study: str
    variant: str
    text: str
    score: str = ""
    told: tuple[str, str] | None = None


@dataclass(frozen=True)
class Experiment:
    """An experiment with its questions: where its records and its page are, and the file of the experiment if it has another "
    "name."""

    title: str
    folder: str
    page: str
    questions: tuple[Question, ...]

    def study(self, name: str) -> Study:
        return Study.of(name, self.folder)


def _asked(study: str, score: str = "", /, **texts: str) -> tuple[Question, ...]:
    return tuple(Question(study, variant, text, score) for variant, text in texts.items())


def _of_data(study: str) -> tuple[Question, ...]:
    return tuple(Question(study, each.variant, each.text, each.score) for each in DATA if each.study == study)


STORED = ("int8", "fp8", "nf4")
EXPERIMENTS = (
    Experiment(
        "Losses, noise and timesteps",
        "objectives",
        "objectives/objectives.md",
        _asked(
            "objectives",
            min_snr="Does min-SNR weighting (gamma 5) help?",
            debiased="Does debiased estimation help?",
            v_like="Does the weight of v-prediction help?",
            pseudo_huber="Does a pseudo-Huber loss help on sound pictures?",
            multires="Does multi-resolution noise help?",
            perturbed="Does input perturbation (0.1) help?",
            logit_normal="Do timesteps from a logit-normal distribution help?",
        ),
    ),
    Experiment(
        "Dark pictures",
        "night",
        "night/night.md",
        (
            *_asked(
                "night",
                "brightness error",
                offset_01="Does noise offset 0.1 bring dark pictures to their brightness?",
                offset_03="Does noise offset 0.3?",
                offset_random="Does noise offset of random strength up to 0.3?",
                multires="Does multi-resolution noise?",
                zero_snr="Does a base with v-prediction and zero-terminal SNR?",
                zero_snr_min_snr="Does the same base with min-SNR weighting?",
            ),
            # The losses of the two bases are not compared, so the result of the pair could be nothing but undecided.
            *_asked(
                "night",
                "kept",
                offset_01="Does noise offset 0.1 cost pictures of the base's world?",
                offset_03="Does noise offset 0.3 cost them?",
                offset_random="Does noise offset of random strength cost them?",
                multires="Does multi-resolution noise cost them?",
                zero_snr="Is less kept on the base with zero-terminal SNR?",
                zero_snr_min_snr="Is less kept there with min-SNR weighting?",
            ),
        ),
    ),
    Experiment(
        "Optimizers",
        "optimizers",
        "optimizers/optimizers.md",
        _asked(
            "optimizers",
            adafactor="Is Adafactor better than AdamW?",
            lion="Is Lion?",
            prodigy="Is Prodigy?",
            adamw_schedulefree="Is Schedule-Free AdamW?",
            came="Is CAME?",
            muon="Is Muon?",
            stableadamw="Is StableAdamW?",
        ),
    ),
    Experiment(
        "Averages of the weights",
        "ema",
        "ema/ema.md",
        _asked(
            "ema",
            ema_090="Does an average with decay 0.9 help at a constant rate?",
            ema_097="Does one with decay 0.97?",
            ema_099="Does one with decay 0.99?",
            cosine="Does a cosine do as much?",
            cosine_ema_097="Does an average with decay 0.97 and a cosine?",
        ),
    ),
    Experiment(
        "Kinds of adapters",
        "kinds",
        "kinds/kinds.md",
        _asked(
            "kinds",
            rslora="Is rank-stabilised LoRA better than LoRA at equal parameters?",
            loraplus="Is LoRA+?",
            dora="Is DoRA?",
            loha="Is LoHa?",
            lokr="Is LoKr?",
            conv="Are layers of the resnets worth adapting?",
            text="Does training the text encoders help?",
        ),
    ),
    Experiment(
        "Rank",
        "rank",
        "rank/comparison.md",
        (
            *_asked("rank", **{"rank-2": "Is rank 2 enough?", "rank-32": "Does rank 32 help over rank 8?"}),
            Question(
                "rank",
                "rank-32",
                "Is rank 32 better because its validation loss is lower?",
                told=(
                    "trap",
                    "log loss on held-out images -0.17 (-0.223 to -0.117), p = 0.037, but pictures and scores could not be told "
                    "apart, and on the base's own pictures its loss is higher",
                ),
            ),
        ),
    ),
    Experiment(
        "The base in fewer bits",
        "base_storage",
        "base_storage/base_storage.md",
        (
            *(
                Question("base_storage", bits, f"Does a base in {bits} cost right pictures?", "concept")
                for bits in STORED
            ),
            Question(
                "base_storage",
                "nf4",
                "Do a run's own losses say what nf4 costs?",
                told=(
                    "trap",
                    "by its own losses it kept more (-0.096 on prior images, -0.119 to -0.073), because its base begins worse; "
                    "on the whole base it forgot more (+0.045 to +0.065), by intervals over six seeds without correction",
                ),
            ),
        ),
    ),
    Experiment("Masks and prior preservation", "data/stamp", "data/data.md", _of_data("stamp")),
    Experiment("Captions", "data/tags", "data/data.md", _of_data("tags")),
)
