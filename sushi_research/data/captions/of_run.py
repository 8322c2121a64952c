"""The captions of a run, from its config: the rules of each data set, and the number of variants."""

from __future__ import annotations

import numpy as np

from sushi_research.config import TrainingConfig
from sushi_research.config.captions import CaptionRules
from sushi_research.config.sets import sets_of
from sushi_research.config.text_encoders import is_in_step
from sushi_research.data.captions.rules import Rules, rules_of
from sushi_research.data.captions.run_captions import RunCaptions, chosen_variants, require_effect
from sushi_research.data.epoch_order import epoch_order
from sushi_research.data.items import Items
from sushi_research.errors import UserError
from sushi_research.remembered import Remembered
from sushi_research.runs.job import Job
from sushi_research.runs.run_folder import RunFolder


def rules_of_sets(config: TrainingConfig) -> tuple[Rules, ...]:
    """The rules of each data set, ready for use.

    Raises UserError if a file of tags cannot be read, if a set has a setting of its own that all must share, or if a key has no
    effect.
    """
    rules = []
    for each in sets_of(config):
        for name in type(each.captions).model_fields.keys() - CaptionRules.model_fields.keys():
            if getattr(each.captions, name) != getattr(config.captions, name):
                raise UserError(
                    f"{each.key('captions')}.{name} is not for a single set: set captions.{name} for all of them."
                )
        own = each.captions.tag_categories != config.captions.tag_categories
        rules.append(rules_of(each.captions, each.key("captions") if own else "captions"))
    require_effect(rules, config.captions.variants)
    return tuple(rules)


def run_captions_of(
    job: Job, items: Items, rules: tuple[Rules, ...], remembered: Remembered | None = None
) -> RunCaptions:
    """The captions of the run's items, with the number of variants that the config gives, that the run has, or that is chosen."""
    config, batch = job.config, job.global_batch_size
    steps = config.train.steps or -(-config.train.epochs * len(items) // batch)
    epochs, more = divmod(steps * batch, max(1, len(items)))
    captions = RunCaptions(
        items,
        rules,
        seed=config.train.seed,
        epochs=epochs,
        rest=epoch_order(items.bucket_ids, batch, config.train.seed, epochs)[:more] if more else np.zeros(0, np.int64),
        in_step=config.captions.encode == "while_training" or is_in_step(config.text_encoders),
        remembered=remembered,
    )
    if captions.in_step or not captions.is_random:
        return captions
    return captions.with_variants(
        chosen_variants(captions, config.captions.variants, config.captions.chunks, _recorded_variants(job))
    )


def _recorded_variants(job: Job) -> int | str | None:
    """The number of variants that the run in the run folder has (a value of `RunCaptions.facts`); None without such a run."""
    try:
        record = (job.run or RunFolder(job.run_path, None)).record()
    except UserError:  # whoever opens the run tells it
        return None
    return record["identity"].get("facts.captions.variants") if record else None
