"""Fills the caches of a training config without training, for instance before several variants share them.

    accelerate launch scripts/cache_dataset.py sdxl --config configs/sdxl_lora.yaml --data.path photos
    accelerate launch scripts/cache_dataset.py sd15 --config configs/sd15_lora.yaml --data.path photos --dry-run

It takes the options of that architecture's training script and encodes what that script would find missing. Running it again
encodes what is new. With several processes, each encodes its share.
"""

from __future__ import annotations

import sys

from sushi_research import models, stopping
from sushi_research.config import TrainingConfig
from sushi_research.config.process import read_architecture, run_main

INTRO = """\
This fills the caches of a training config without training. To begin:
  the plan:       accelerate launch scripts/cache_dataset.py sdxl --config configs/sdxl_lora.yaml --data.path photos --dry-run
  the work:       accelerate launch scripts/cache_dataset.py sdxl --config configs/sdxl_lora.yaml --data.path photos
  for SD1.5:      accelerate launch scripts/cache_dataset.py sd15 --config configs/sd15_lora.yaml --data.path photos
  every option:   python scripts/cache_dataset.py sdxl --help"""


def read(arguments: list[str]) -> TrainingConfig:
    """Reads the config from the command line, whose first word is the architecture."""
    classes = models.config_classes()
    return read_architecture(classes, arguments, script="scripts/cache_dataset.py", intro=INTRO, example="sdxl")


if __name__ == "__main__":
    CONFIG = read(sys.argv[1:])

from sushi_research.caches.caches import open_caches, open_hash_cache, open_remembered
from sushi_research.caches.inputs import Inputs, fill_caches
from sushi_research.data import findings
from sushi_research.data.training_data import read_data
from sushi_research.files import system_errors
from sushi_research.models.loading import find_base
from sushi_research.runs.job import Job
from sushi_research.runs.launch import one_report
from sushi_research.training import run
from sushi_research.training.disk_plan import require_room_for_cache


@one_report()
@system_errors()
def main(config: TrainingConfig) -> int:
    """Encodes what is missing for `config`; returns 0."""
    job = run.start_job(config, models.load(models.name_of(config)), __file__, trains=False)
    with stopping.doing("planning", "nothing is encoded yet; the same command again starts over"):
        fill(job)
    return 0


def fill(job: Job) -> None:
    """Prints what is missing, and encodes it if this is no dry run."""
    config = job.config
    hash_cache = open_hash_cache(config)
    base = find_base(config, job.model)
    data = read_data(job, open_remembered(config))
    caches = open_caches(job, base, hash_cache)
    inputs = Inputs(config, base, data, caches, hash_cache)
    images_missing, captions_missing = len(inputs.missing_latents()), len(inputs.missing_text_chunks())
    job.say(f"{images_missing} image entries and {captions_missing} captions to encode")
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


if __name__ == "__main__":
    run_main(main, CONFIG)
