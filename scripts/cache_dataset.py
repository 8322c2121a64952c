"""Fills the caches of a training config without training, for instance before several variants share them.

    accelerate launch scripts/cache_dataset.py sdxl --config configs/sdxl_lora.yaml --data.path photos
    accelerate launch scripts/cache_dataset.py sd15 --config configs/sd15_lora.yaml --data.path photos --dry-run

It takes the options of that architecture's training script and encodes what that script would find missing. Running it again
encodes what is new. With several processes, each encodes its share.

    python scripts/cache_dataset.py sdxl --config configs/sdxl_lora.yaml --data.path photos --prune --dry-run
    python scripts/cache_dataset.py sdxl --config configs/sdxl_lora.yaml --data.path photos --prune

With --prune it encodes nothing. It removes the entries of the caches that this config does not need, also those of
other data sets in the same folder, and damaged files.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from sushi_research import models, stopping
from sushi_research.config import TrainingConfig
from sushi_research.config.process import read_architecture, run_main

INTRO = """\
This fills the caches of a training config without training (sd15 in place of sdxl for SD1.5). To begin:
  the plan:       accelerate launch scripts/cache_dataset.py sdxl --config configs/sdxl_lora.yaml --data.path photos --dry-run
  the work:       accelerate launch scripts/cache_dataset.py sdxl --config configs/sdxl_lora.yaml --data.path photos
  to remove what this config does not need, also entries of other data sets:   add --prune (first with --dry-run)
  every option:   python scripts/cache_dataset.py sdxl --help"""


def read(arguments: list[str]) -> TrainingConfig:
    """Reads the config from the command line, whose first word is the architecture.

    `--prune` is no setting, which could stand in a config file: `main` takes it.
    """
    classes = models.config_classes()
    arguments = [argument for argument in arguments if argument != "--prune"]
    return read_architecture(classes, arguments, script="scripts/cache_dataset.py", intro=INTRO, example="sdxl")


if __name__ == "__main__":
    CONFIG = read(sys.argv[1:])

from sushi_research.caches import pruning
from sushi_research.caches.caches import open_caches, open_hash_cache, open_remembered
from sushi_research.caches.inputs import Inputs, fill_caches
from sushi_research.data import findings
from sushi_research.data.training_data import read_data
from sushi_research.errors import UserError
from sushi_research.files import remove, size_text, system_errors
from sushi_research.models.loading import find_base
from sushi_research.runs.job import Job
from sushi_research.runs.launch import one_report
from sushi_research.training import run
from sushi_research.training.disk_plan import require_room_for_cache


@one_report()
@system_errors()
def main(config: TrainingConfig, *, prune: bool = False) -> int:
    """Encodes what is missing for `config`, or with `prune` removes what it does not need; returns 0."""
    job = run.start_job(config, models.load(models.name_of(config)), __file__, trains=False)
    with stopping.doing("planning", "nothing is encoded yet; the same command again starts over"):
        inputs = open_inputs(job)
        if prune:
            remove_unneeded(job, inputs)
        else:
            fill(job, inputs)
    return 0


def open_inputs(job: Job) -> Inputs:
    hash_cache = open_hash_cache(job.config)
    base = find_base(job.config, job.model)
    data = read_data(job, open_remembered(job.config))
    return Inputs(job.config, base, data, open_caches(job, base, hash_cache), hash_cache)


def fill(job: Job, inputs: Inputs) -> None:
    """Prints what is missing, and encodes it if this is no dry run."""
    config, data, caches = job.config, inputs.data, inputs.caches
    images_missing, captions_missing = len(inputs.missing_latents()), len(inputs.missing_text_chunks())
    masks = f", {len(inputs.missing_masks())} masks to prepare" if len(inputs.mask_entries) else ""
    job.say(f"{images_missing} image entries and {captions_missing} captions to encode{masks}")
    for line in findings.lines(data.problems, data.notes):
        job.say(line)
    require_room_for_cache(job, inputs)
    if config.dry_run:
        return
    fill_caches(job, inputs)
    total = (caches.latents.size_bytes + caches.texts.size_bytes) / 2**20
    job.say(
        f"done: {config.cache.folder} holds {len(caches.latents)} image entries and {len(caches.texts)} captions, {total:.1f} MiB"
    )


def remove_unneeded(job: Job, inputs: Inputs) -> None:
    """Prints what is not needed, with sizes, and removes it if this is no dry run.

    Raises UserError if there are several processes, or another command uses the caches.
    """
    if job.world > 1:
        raise UserError("--prune works in one process: run it with python instead of accelerate launch.")
    found = [*pruning.waste_of(inputs)]
    files = [file for folder in pruning.stores(Path(job.config.cache.folder)) for file in pruning.leftovers(folder)]
    for waste in found:
        job.say(f"not needed: {waste.describe()}")
    job.say(f"not needed: {len(files)} damaged or left files ({size_text(sum(size for _, size in files))})")
    for path, _ in files[:10]:
        job.say(f"            {path}")
    if job.config.dry_run:
        return
    with stopping.doing("pruning", "what is needed is still there; the same command again continues"):
        pruning.remove_waste(found)
        for path, _ in files:
            remove(path)
    job.say("done: that was removed")


if __name__ == "__main__":
    run_main(partial(main, prune="--prune" in sys.argv), CONFIG)
