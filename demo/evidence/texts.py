"""What the pages of the experiments say besides their numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Texts:
    """`about`: what the experiment is, and what it cannot say. `variants`: what each is, in a few words. `limits`: further ones."""

    title: str
    about: str
    variants: dict[str, str]
    limits: tuple[str, ...]


STAR = (
    "A LoRA of rank 8 (219,136 numbers, kohya's modules) learns a star plate on the embedded SDXL base in 160 steps. The length is "
    "that of [kinds](../kinds/kinds.md), whose runs have min-SNR weighting: there it leaves room for better and for worse."
)
TINY = "The base is tiny (3 million weights, 16 x 16 latents). Sizes of differences do not carry over to SDXL."
ONE = "One concept, one length, three seeds, fp32 on a CPU. Whatever is not found with three seeds may still be there."
RATE = (
    "1.2e-2 is the best of three learning rates for AdamW and the plain loss by one run with another seed "
    "([learning_rates.json](../optimizers/learning_rates.json), with a cosine). It came from the experiment on "
    "[kinds](../kinds/kinds.md), and was checked with the plain loss after this experiment had been written."
)
ONE_RATE = (
    f"One learning rate for all. {RATE} AdamW divides by the size of the gradients, so a factor on the whole loss changes nothing "
    "but how often they are clipped, but another variant may still have another best rate."
)
# Of each page with the sentences of the tests.
INTERVALS = (
    'Each interval is that of one pair alone, without a correction for the number of tests; "among" gives the p-value with it. '
    '"Within the margin" is decided by these intervals, so with many pairs now and then one is said wrongly.'
)

TEXTS = {
    "objectives": Texts(
        "Loss weights, losses, noise and timesteps",
        f"{STAR} Each variant changes one option of the loss or of the timesteps ([objectives.md](../../objectives.md)).",
        {
            "plain": "mean squared error of the noise, uniform timesteps",
            "min_snr": "min-SNR, gamma 5",
            "debiased": "debiased estimation",
            "v_like": "weighted as v-prediction would be",
            "pseudo_huber": "pseudo-Huber, c from 1 to 0.1 with the noise",
            "multires": "multi-resolution noise, 6 iterations, discount 0.3",
            "perturbed": "input perturbation, 0.1",
            "logit_normal": "timesteps from a logit-normal distribution",
        },
        (
            TINY,
            ONE,
            ONE_RATE,
            "The base was itself trained with the weight of v-prediction, limited to 10 (demo/make_base/unet.py).",
            "All training pictures are sound. A robust loss is made for those that are not, and cannot show here what it is for.",
        ),
    ),
    "night": Texts(
        "Dark pictures: noise offset, and zero-terminal SNR",
        "A LoRA of rank 16 learns a style, night, in 360 steps. Its drawings are darker than those of the base's world: the "
        "mean brightness of a drawing, from 0 (black) to 1 (white), is 0.41 for the 32 scenes that are asked for (0.32 to "
        "0.52) and 0.65 for the base's world (0.47 to 0.86). The ranges overlap. The likely reason why a usual training does "
        "not learn it: sampling starts from noise of mean 0, and on the usual schedule a base has learned to read the "
        "brightness from the noisiest input. Noise offset changes the noise; v-prediction with zero-terminal SNR changes the "
        "base ([sd15_v](../../../demo/base/sd15_v/README.md)).",
        {
            "plain": "the SD1.5 base (epsilon)",
            "offset_01": "noise offset 0.1",
            "offset_03": "noise offset 0.3",
            "offset_random": "noise offset of random strength up to 0.3",
            "multires": "multi-resolution noise, 6 iterations, discount 0.3",
            "zero_snr": "the base with v-prediction and zero-terminal SNR",
            "zero_snr_min_snr": "the same, with min-SNR weighting, whose weight is 0 at the last timestep",
        },
        (
            TINY,
            ONE,
            "The two bases predict different things, so their losses are not compared, only their pictures. They know the same "
            "pictures, but the second one was trained on from the first.",
            "Learning rate and length are those of the demo for both bases; a rate chosen for v-prediction might do better.",
            "Pictures of middle brightness: very dark ones were not tried, nor bright ones.",
        ),
    ),
    "optimizers": Texts(
        "Eight optimizers",
        f"{STAR} Each optimizer has the best of three learning rates by one run with another seed "
        "([optimizers.md](../../optimizers.md)).",
        {
            "plain": "AdamW",
            "adafactor": "Adafactor, without its own learning rates",
            "lion": "Lion",
            "prodigy": "Prodigy, which estimates its learning rate",
            "adamw_schedulefree": "Schedule-Free AdamW, constant rate, averaged weights",
            "came": "CAME",
            "muon": "Muon for matrices, AdamW for the rest",
            "stableadamw": "StableAdamW",
        },
        (
            TINY,
            ONE,
            "Three learning rates each. Where the best one is at the end of the range, a better one may lie beyond it; the "
            "table says where.",
            "The validation loss by which they were chosen is mostly that of the timesteps with the least noise, and what is "
            "learned shows at the others: pictures might choose another rate.",
            "Optimizers for few bits and little memory have nothing to save here.",
            "The CPU time of a step is that of tiny layers, where the optimizer weighs more than it does on a GPU.",
        ),
    ),
    "ema": Texts(
        "Averages of the adapter's weights",
        f"{STAR} The learning rate is constant, or falls as a cosine. An average changes nothing that is trained: runs of one "
        "schedule and seed end with the same weights, and differ in which of the two files is measured "
        "([ema.md](../../ema.md)).",
        {
            "plain": "constant rate, the trained weights",
            "ema_090": "constant rate, average with decay 0.9",
            "ema_097": "constant rate, average with decay 0.97",
            "ema_099": "constant rate, average with decay 0.99",
            "cosine": "cosine, the trained weights",
            "cosine_ema_097": "cosine, average with decay 0.97",
        },
        (
            TINY,
            ONE,
            "A run of 160 steps is short, and its best average is short with it.",
            f"{RATE} At a constant rate a lower one may be better, and would leave an average less to gain.",
            "The averages at a constant rate are compared with the weights at that rate. Whether a cosine does as much as an "
            "average is not tested: two variants that are both better than a third need not be equal.",
        ),
    ),
}
