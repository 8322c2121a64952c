"""The words of docs/findings.md besides its answers."""

from __future__ import annotations

LEAD = (
    "Every question that an experiment of this repository asked, with its answer. All of them were asked on the tiny embedded "
    "bases ([demo.md](demo.md)), most with three seeds: an effect on SDXL may differ in size and in sign. A row says what an "
    "option did here, with how much certainty. How an experiment of your own is made: [experiments.md](experiments.md).",
    "`python -m demo.evidence findings` writes this page from the records of the runs (`docs/examples/*/runs`), by the "
    "statistics of today.",
)
LABELS = (
    "**better**, **worse**: one of the two is better by the rules of [experiments.md](experiments.md#the-test-result): more of "
    "what was to be learned or of what the base knew, and of neither less by more than the margin. Where losses and scores "
    "contradict each other the scores decide, and the row says that losses say the opposite. A question that names one score "
    "or one loss is answered by that alone.",
    "**trap**: what looks like a gain and is not. The loss on held-out images is decidedly lower, or more was learned; and by "
    "pictures or scores less was learned, or less was kept, by more than the margin (of a score, which has none: by more than "
    "0). Questions that name one score or one loss, and those of the last two tables, can never be a trap.",
    "**trade-off**: more on one side and less on the other, and no trap.",
    "**could not be told apart**: no difference was shown that decides. It does not mean equal; the interval says how large a "
    "difference may be. Where one side is decided and the other is open, or both within the margin, the row says so.",
    "**the same**: bit for bit, on every loss.",
    "**diverged**: a run of the variant or of what it is compared with stopped at a loss that is not finite, or ended with one. "
    "Nothing is tested then, because the seeds that are left would be chosen by their result.",
    "**not tested**: what the question needs was not measured in every run; the row says what.",
    "**yes**, **in part**, **no**: of questions about a measure, which no pair of variants answers. A measure follows a score on a "
    "setting if it puts nine of ten pairs of adapters in the order of the score.",
    "**not recorded**: the experiment is there, and its runs are not recorded yet.",
    '*no interval*: all units of a score differ by the same, mostly by 0, so nothing varies. "All units equal (score at its '
    'limit)": both variants have the same value in every unit, such as right in all pictures, so the score cannot show a '
    "difference.",
)
CARE = (
    "**Multiplicity.** Within an experiment all tests of all pairs are one family (Holm): the chance that even one difference "
    "in it is none is at most 5 %. Across the {experiments} experiments nothing is corrected. There are {tests} tests for "
    "{questions} questions, so with nothing but equal variants one experiment in twenty would still name a difference. The losses "
    "on the whole base are {storage} further tests, corrected among themselves (Bonferroni). Intervals are not corrected, and "
    '"within the margin" is decided by them.',
    "**Selection.** How learning rates and lengths were chosen is said of each experiment. Only kinds and optimizers have "
    "rates that were chosen by a validation loss, of one run each, with a seed that the experiment does not have and on the "
    "same held-out pictures: whatever was chosen so looks a little better than it is. Where the reference is right in nearly "
    "all or in none of its pictures, a score can show little in one direction. Two data sets of the experiments on captions "
    "and masks were given up after pilots ([data.md](examples/data/data.md) says which). Where several measures of a pair are "
    "decided, the number is that of one that says what the answer says, of a score or pictures before losses, and of those "
    "with the smallest p-value, so it is rather too large than too small.",
    "**The reference** is one recipe. That an option is no better than it here does not say what it does on another base, with "
    "another length or with other data.",
    "**Numbers** are the difference from the reference in the unit that is named, with the 95 % interval of that pair alone, "
    "and the p-value after Holm's correction. Of losses less is better, of scores more, unless the score is an error.",
)
STORAGE = (
    "All 24 adapters of the experiment, measured on the base in full with the same images and noise: `python "
    "scripts/evaluate.py sdxl --adapters '[...]'`, [page](examples/base_storage/base_storage.md). Differences from an adapter "
    "trained on the base in full, with 95 % intervals over six seeds, with the images as they are. A label is decided at the "
    "level of six tests (Bonferroni), and a small difference that all seeds share is decided too: the margins are 0.05 and "
    "0.2. The validation loss is not tested.",
)
MEASURES = (
    "`python -m demo.study`, [page](examples/measure/measure.md). 106 adapters of different recipes and lengths on two of the "
    "bases, one seed each; no test between variants. The share of pairs of adapters whose scores are at least 6 of 32 apart "
    "that a measure puts in the right order, for each of four settings. The measures in use were chosen on `star`. Intervals, "
    "over seven or eight recipes, are on the page.",
)
