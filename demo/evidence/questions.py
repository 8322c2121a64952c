"""The questions of docs/findings.md: each is one variant against the reference of its experiment."""

from __future__ import annotations

from dataclasses import dataclass

from demo.data_study.text import QUESTIONS as DATA
from demo.evidence.study import Study


@dataclass(frozen=True)
class Question:
    """`score`: the one score that answers it; "": the result of the pair, by all that was measured."""

    study: str
    variant: str
    text: str
    score: str = ""


@dataclass(frozen=True)
class Experiment:
    """An experiment with its questions: where its records and its page are, and the file of the experiment if it has another "
    "name."""

    title: str
    folder: str
    page: str
    questions: tuple[Question, ...]
    command: str = ""

    def study(self, name: str) -> Study:
        return Study.of(name, self.folder)


def _asked(study: str, **texts: str) -> tuple[Question, ...]:
    return tuple(Question(study, variant, text) for variant, text in texts.items())


def _of_data(study: str) -> tuple[Question, ...]:
    return tuple(Question(study, each.variant, each.text, each.score) for each in DATA if each.study == study)


EXPERIMENTS = (
    Experiment(
        "Losses, noise and timesteps",
        "objectives",
        "objectives.md",
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
        "night.md",
        _asked(
            "night",
            offset_01="Does noise offset 0.1 make a dark style learnable?",
            offset_03="Does noise offset 0.3?",
            offset_random="Does noise offset of random strength up to 0.3?",
            multires="Does multi-resolution noise?",
            zero_snr="Does a base with v-prediction and zero-terminal SNR?",
            zero_snr_min_snr="Does the same base with min-SNR weighting?",
        ),
    ),
    Experiment(
        "Optimizers",
        "optimizers",
        "optimizers.md",
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
        "ema.md",
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
        "kinds.md",
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
        "comparison.md",
        _asked("rank", **{"rank-2": "Is rank 2 enough?", "rank-32": "Does rank 32 help over rank 8?"}),
    ),
    Experiment(
        "The base in fewer bits",
        "base_storage",
        "base_storage.md",
        tuple(
            Question("base_storage", variant, f"Does {words} cost right pictures?", "concept")
            for variant, words in (("int8", "a base in int8"), ("fp8", "a base in fp8"), ("nf4", "a base in nf4"))
        ),
    ),
    Experiment("Masks and prior preservation", "data/stamp", "../data.md", _of_data("stamp")),
    Experiment("Captions", "data/tags", "../data.md", _of_data("tags")),
)
