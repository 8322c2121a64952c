"""The words of the study's page."""

LEAD = [
    "A run records numbers at each evaluation. This page shows how far they may be trusted: for adapters of "
    "different recipes and lengths, each number is held against what the adapter's pictures show. `python -m "
    "demo.study` trains the adapters, scores and measures them, and writes this page; it can be interrupted and "
    "continued.",
    "**The score.** On the two embedded bases (docs/demo.md) a checker reads pictures without a model. `concept` "
    "is how many of 32 pictures of new scenes show the new thing right, `kept` how many of 32 pictures of the "
    "base's own world are still right. For `night` the colours are never exact enough for the checker's limits, "
    "so a picture counts as the concept if the nearest of all scenes is the one that was asked for; this was "
    "decided when the first of its adapters was scored, before any of its measures were seen.",
    "**The adapters.** Four settings: a thing (`star`), a topping (`unagi`) and a style (`night`) on SDXL, and "
    "`star` on SD1.5. Eight recipes (seven for the last two), at four lengths (three for the last two): the "
    "demo's settings, a low rank, a lower and a higher learning rate, other layers, another loss, no prior "
    "images, and four photos in place of sixteen. One seed each; constant learning rate. `night` is trained with "
    "a noise offset of 0.3, without which it is not learned.",
    "**The measures** were named before any result was seen (demo/study/candidates.py). They are measured on "
    "images, prompts and noise that the scores do not use: 32 held-out images, 16 images that the base draws, 16 "
    "prior images, 8 noise samples each, and 16 pictures of held-out captions and 16 of neutral prompts (12 "
    "steps, the demo's guidance). Which of them the product uses was chosen on `star`; the other settings confirm"
    " it or do not.",
    "**Reading the tables.** A rank correlation of -1 means that a lower value always goes with a higher score. "
    "Pairs are pairs of adapters of one setting whose scores are at least 6 of 32 apart; the share is of those "
    "that the measure puts in the right order. Intervals are 95 % percentiles of a bootstrap over recipes, of "
    "which there are seven or eight: they are rough.",
]
MEASURES = {
    "learned": "`mse` is the mean squared error on held-out images, which other trainers call validation loss. `log` is the "
    "mean of log(loss / the base's loss). Distances of pictures are mean squared differences of latents, as log "
    "of the distance over that of the base's picture.",
    "kept": "A high `held-out mse` says nothing about what was kept. Distances of pictures from the base's own, of the "
    "same prompt and seed, are not logarithms, because the base's is 0.",
    "memorised": "The share of (trained photo, held-out image) pairs in which the photo has the lower log loss, without the "
    "recipe on four photos. It grows with the length of a run while the score may still rise: it says that the "
    "adapter recognises its photos, not that its pictures got worse.",
    "pairs": "Pairs of recipes at equal numbers of steps. The results are those that `compare_runs.py` gives: from losses "
    "on held-out images (t >= 750), on the base's images and on prior images; and with pictures, which then "
    "decide alone. All pairs of a setting are one family of tests, with which few of so many pairs are decided by"
    " 16 pictures. The score is the share of concept pictures that are right times the share of kept ones. `mean "
    "MSE alone` calls the lower one better, as this project did before. The second pair of numbers counts only "
    "scores at least 0.1 apart.",
    "choosing": "For each recipe one of its lengths is chosen by a rule. The table shows how much score the chosen "
    "length lacks against the best one, as the mean over recipes. `evaluation.keep_best` goes by log loss at t >= 750 "
    "plus what the log loss on the base's images exceeds 0.4 by, and takes a later step only if it is lower by more "
    "than one standard error. Its preference for the earlier of two close steps costs score on every setting against "
    "the plain minimum; and where no recipe is trained too long (`night`, `star-sd15`) the last length is as good or better. What "
    "it avoids is a run that was trained far too long (`unagi`).",
}
UNAGI = [
    "On `unagi` the losses order fewer pairs rightly than on `star`. Two reasons explain it together (`python -m "
    "demo.study.topping`):",
    "*The area.* A topping is a small part of the image, and the mean over the image is mostly about the rest. "
    "The third row is the same log loss in the area of the topping alone: the latents that change when another "
    "topping is drawn in the same scene.",
    "*Guidance.* A loss is of single predictions. A picture is drawn with classifier-free guidance (2.5 here), "
    "which extrapolates from the prediction without a caption to the one with it; an adapter changes both, and "
    "none of these recipes trains without captions. So the scores were taken again without guidance. The loss in "
    "the area orders nearly all pairs of those. Guidance then moves recipes differently: adapted resnets "
    "(other-layers) show 3 to 13 right pictures with it and 17 to 24 without, the fast recipe at 80 steps 23 with"
    " it and 10 without.",
    "So a loss over the whole image, without guidance, cannot rank the pictures of a small thing drawn with "
    "guidance. Pictures that a run draws with its own guidance can. The checker's limits are not the reason: "
    "counting the nearest scene gives nearly the same numbers for most adapters. Nor is the new word left unread:"
    " with another topping in the noisy image and unagi in the caption, adapters with 5 and with 23 right "
    "pictures follow the caption alike (0.61 and 0.67 of the way at t = 937).",
]
LIMITS = [
    "Two bases of 3 million weights, one drawn world with one composition, pictures of 128 x 128: distances "
    "between pictures and held-out images of the same caption are meaningful here because the caption fixes the "
    "picture. With photos, where a caption fits many pictures, the distance of pictures from held-out images is "
    "weaker, how much is not known.",
    "One training seed for each recipe and length. The lengths of a recipe are one run, so they are not independent.",
    "Margins and the limit of `evaluation.keep_best` were set on `star` alone.",
    "Some adapters of `unagi` at their last lengths have collapsed (kept 0 or 1): such pairs are easy for every "
    "measure.",
]
SCATTER = (
    "One point for each adapter, joined in the order of training; a colour is a recipe. Lower values (to the left) "
    "should go with higher scores. Adapters that have collapsed (losses above the base's, at most 1 of 32 kept) are "
    "left out: they are far to the right."
)
