"""The part of a run's plan about evaluation: on which images, how often, and which of them resemble training images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sushi_research.caches.inputs import Inputs
from sushi_research.config import TrainingConfig
from sushi_research.config.sets import sets_of
from sushi_research.data import near_search
from sushi_research.data.run_texts import drift_captions
from sushi_research.data.training_data import Data
from sushi_research.evaluation.results import MIN_IMAGES
from sushi_research.training.length import Interval

# How many of them are printed; plan.json has all.
SHOWN_NEAR_DUPLICATES = 5


@dataclass(frozen=True)
class EvaluationPlan:
    """What the run is evaluated on, and how often."""

    images: int
    source: str
    noise_samples: int
    evaluations: int
    drift_captions: int
    near_duplicates: tuple[str, ...]
    prior_images: int = 0
    prior_held_out: bool = False
    training_images: int = 0
    pictures: Mapping[str, int] = field(default_factory=dict)
    keep_best: bool = False

    def describe(self) -> list[str]:
        images = "1 image" if self.images == 1 else f"{self.images} images"
        drift = f", and the drift on {self.drift_captions} captions" if self.drift_captions else ""
        kept = ["the base's own images of these captions"] if self.drift_captions else []
        held_out = ", held out of training" if self.prior_held_out else ""
        kept += [f"{self.prior_images} prior images{held_out}"] if self.prior_images else []
        memorised = (
            f"{self.training_images} training images" if self.training_images else "nothing: no training image is left"
        )
        lines = [
            f"evaluation   {images} x {self.noise_samples} noise samples{drift}, {self.evaluations} times",
            f"             images: {self.source}",
            f"             what is kept is measured on {' and '.join(kept) or 'nothing: there is nothing to measure it on'}",
            f"             what is memorised is measured on {memorised}",
        ]
        if self.pictures:
            compared = {
                "learned": "held-out captions (compared with the images)",
                "kept": "drift captions (compared with the base's pictures)",
            }
            parts = [f"{count} {compared[kind]}" for kind, count in self.pictures.items()]
            lines.append(f"             pictures of {' and '.join(parts)}, {self.evaluations} times")
        if self.keep_best:
            count = self.evaluations - 1  # step 0 is the base
            lines.append(
                f"             the adapter of the best of {count} evaluations is kept, as NAME-best-STEP.safetensors"
                if count > 1
                else "             evaluation.keep_best has no choice: the only evaluation after step 0 is that of the end "
                "(evaluation.every gives more)"
            )
        if self.images < MIN_IMAGES:
            lines.append(f"             a test result between runs needs {MIN_IMAGES} images or more")
        lines += [f"             warning: {sentence}" for sentence in self.near_duplicates[:SHOWN_NEAR_DUPLICATES]]
        if len(self.near_duplicates) > SHOWN_NEAR_DUPLICATES:
            lines.append(
                f"             and {len(self.near_duplicates) - SHOWN_NEAR_DUPLICATES} more (a run's plan.json lists all)"
            )
        return lines


def plan_evaluation(config: TrainingConfig, inputs: Inputs, steps: int, due: Interval) -> EvaluationPlan | None:
    """What the run is evaluated on and how often: before and after training, and when it is `due`. None without held-out images."""
    data = inputs.data
    if not data.held_out:
        return None
    return EvaluationPlan(
        images=len({(item.sample.image_hash, item.sample.caption) for item in data.held_out}),
        source=config.evaluation.path or _held_out_of(config, data),
        noise_samples=config.evaluation.noise_samples,
        evaluations=2 + due.count(0, steps - 1),
        drift_captions=len(drift_captions(config, data)),
        near_duplicates=tuple(data.near_duplicates),
        prior_images=len(data.prior),
        prior_held_out=bool(data.prior) and data.prior_scan is None,
        training_images=len(data.trained),
        pictures=_pictures(config, data),
        keep_best=config.evaluation.keep_best,
    )


def _pictures(config: TrainingConfig, data: Data) -> dict[str, int]:
    """How many pictures of each kind are generated at an evaluation; fewer than asked for if there are fewer captions."""
    found = {
        "learned": len({item.sample.caption for item in data.held_out}),
        "kept": len(drift_captions(config, data)),
    }
    counts = {kind: min(count, config.evaluation.pictures) for kind, count in found.items()}
    return {kind: count for kind, count in counts.items() if count}


def _held_out_of(config: TrainingConfig, data: Data) -> str:
    """What was asked for, and what was held out: images that resemble each other stay together."""
    got, trained = len({item.sample.name for item in data.held_out}), data.learned.used
    total = got + int((~near_search.is_one_of(trained.images, data.prior_trained)).sum())
    compared = got + len(data.items.used)  # regularisation images too
    share, but = config.evaluation.held_out, " without the prior ones" if data.prior_trained else ""
    asked = f"asked for {share:g} of {total} images{but}, which is {round(share * total)}"
    limit = (
        f", because {near_search.LIMIT}" if compared > near_search.MOST_GROUPED and got < round(share * total) else ""
    )
    paths = ", ".join(dict.fromkeys(each.path for each in sets_of(config) if not each.is_regularisation))
    return f"held out of {paths} ({asked}; got {got}{limit})"
