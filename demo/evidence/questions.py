"""The questions of docs/findings.md: each is one variant against the reference of its experiment."""

from __future__ import annotations

from dataclasses import dataclass

from demo.data_study.text import QUESTIONS as DATA
from demo.evidence.study import Study
from sushi_research.experiments.comparison import SCORE


@dataclass(frozen=True)
class Question:
    """`score`: the one score that answers it, or `losses`: the one kind of losses; "": the result of the pair, by all that was
    measured. `reference`: the variant that it is compared with; "": that of the experiment."""

    study: str
    variant: str
    text: str
    score: str = ""
    reference: str = ""
    losses: str = ""

    @property
    def kind(self) -> str:
        """The kind of results that alone answers it; "" if the result of the pair does."""
        return SCORE + self.score if self.score else self.losses


@dataclass(frozen=True)
class Experiment:
    """An experiment with its questions: where its records and its page are. `chosen`: how its learning rates and its length were
    chosen."""

    title: str
    folder: str
    page: str
    chosen: str
    questions: tuple[Question, ...]

    @property
    def name(self) -> str:
        """The name of its file in configs/experiments."""
        [name] = {question.study for question in self.questions}
        return name

    @property
    def study(self) -> Study:
        return Study.of(self.name, self.folder)


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
        "The length is that of the experiment on kinds. The learning rate too; with the plain loss it was checked afterwards, "
        "and is the best of three by one run with another seed "
        "(docs/examples/optimizers/learning_rates.json). Variants have no rate of their own.",
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
        "Learning rate and length are those of the demo, for both bases; with them the demo draws no right picture "
        "([demo.md](demo.md)).",
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
            Question(
                "night",
                "zero_snr_min_snr",
                "Does min-SNR weighting help on the base with zero-terminal SNR (against that base without it)?",
                reference="zero_snr",
            ),
        ),
    ),
    Experiment(
        "Optimizers",
        "optimizers",
        "optimizers/optimizers.md",
        "Each optimizer has the best of three learning rates by the validation loss of one run with seed 100, on the held-out "
        "pictures of the experiment. The ranges lie around a rate of AdamW that had been tuned before with the same seed and "
        "pictures, which favours the reference. Those of CAME, Lion and Prodigy were moved once. The length is that of the "
        "experiment on kinds.",
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
        "Learning rate and length are those of the experiment on losses; the rate was chosen with a cosine.",
        (
            *_asked(
                "ema",
                ema_090="Does an average with decay 0.9 help at a constant rate?",
                ema_097="Does one with decay 0.97?",
                ema_099="Does one with decay 0.99?",
                cosine="Is a cosine better than the constant rate?",
                cosine_ema_097="Is a cosine with an average with decay 0.97 better than the constant rate without one?",
            ),
            Question(
                "ema",
                "cosine_ema_097",
                "Does an average with decay 0.97 help with a cosine (against the cosine alone)?",
                reference="cosine",
            ),
        ),
    ),
    Experiment(
        "Kinds of adapters",
        "kinds",
        "kinds/kinds.md",
        "Each kind has the best of three or four learning rates by the validation loss of one run with seed 100, on the "
        "held-out pictures of the experiment. The length was chosen so that the reference is right in about half of its "
        "pictures.",
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
        "The learning rate is that of the demo, for all ranks.",
        (
            *_asked("rank", **{"rank-2": "Is rank 2 enough?", "rank-32": "Does rank 32 help over rank 8?"}),
            Question("rank", "rank-32", "Does it by the loss on held-out images alone?", losses="evaluation"),
            Question("rank", "rank-32", "And by the loss on the base's own pictures alone?", losses="base_images"),
        ),
    ),
    Experiment(
        "The base in fewer bits",
        "base_storage",
        "base_storage/base_storage.md",
        "The learning rate is that of the demo. The length was chosen by the scores of longer runs; the number of seeds was "
        "raised from four to six after the first sixteen runs had been looked at.",
        _asked("base_storage", "concept", **{bits: f"Does a base in {bits} cost right pictures?" for bits in STORED}),
    ),
    Experiment(
        "Masks and prior preservation",
        "data/stamp",
        "data/data.md",
        "The learning rate is that of the demo. The data set was made so that the reference fails at what masks are for.",
        _of_data("stamp"),
    ),
    Experiment(
        "Captions",
        "data/tags",
        "data/data.md",
        "The learning rate is that of the demo. Order, kept tag and length were changed after pilots with seed 0.",
        _of_data("tags"),
    ),
)
