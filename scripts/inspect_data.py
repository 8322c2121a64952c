"""Writes one page about a data set: what a training would do with each image and caption. Nothing is encoded for it or trained.

    python scripts/inspect_data.py sdxl --config configs/sdxl_lora.yaml --data.path photos
    make inspect DATA=photos

It takes the options of that architecture's training script. The page, runs/NAME_data.html (run.folder and run.name; NAME is the
first data folder's name by default), shows each image with its uses, bucket, crop and tokens, what cannot be used and why, copies,
and tag frequencies. If the base is on this machine, it also shows what the VAE makes of some images; a base is never
downloaded for it. Files that cannot be used are listed on the page, whatever data.on_bad_file is.
"""

from __future__ import annotations

import sys

from sushi_research import models, stopping
from sushi_research.config import TrainingConfig
from sushi_research.config.process import read_architecture, run_main

INTRO = """\
This writes one page about a data set, as a training would use it. To begin:
  for SDXL:        python scripts/inspect_data.py sdxl --config configs/sdxl_lora.yaml --data.path photos
  for SD1.5:       python scripts/inspect_data.py sd15 --config configs/sd15_lora.yaml --data.path photos
  as a run has it: python scripts/inspect_data.py sdxl --config runs/NAME/config.yaml
  every option:    python scripts/inspect_data.py sdxl --help"""


def read(arguments: list[str]) -> TrainingConfig:
    """Reads the config from the command line, whose first word is the architecture."""
    classes = models.config_classes()
    return read_architecture(classes, arguments, script="scripts/inspect_data.py", intro=INTRO, example="sdxl")


if __name__ == "__main__":
    CONFIG = read(sys.argv[1:])

import os
from pathlib import Path
from typing import Any

from sushi_research.caches.caches import free_memory, open_remembered
from sushi_research.config.sets import sets_of
from sushi_research.data.training_data import read_data
from sushi_research.errors import UserError
from sushi_research.files import make_folder, system_errors, write_atomic
from sushi_research.models import hub, loading
from sushi_research.progress import progress
from sushi_research.reports.data_page import decoded, page
from sushi_research.reports.data_page.shown import Shown
from sushi_research.reports.data_page.uses import spread, uses_of
from sushi_research.runs.job import Job
from sushi_research.runs.launch import one_report
from sushi_research.training import run

# How many images are encoded and decoded, which takes half a minute each for SDXL on a CPU.
MOST_DECODED = 4


@one_report()
@system_errors()
def main(config: TrainingConfig) -> int:
    """Writes the page about the data of `config`; returns 0."""
    shown = config.model_copy(update={"data": config.data.model_copy(update={"on_bad_file": "skip"})})
    job = run.start_job(shown, models.load(models.name_of(config)), __file__, trains=False)
    with stopping.doing("inspecting", "no page is written; the same command again starts over"):
        inspect(job)
    return 0


def inspect(job: Job) -> None:
    """Writes the page, and prints where it is."""
    config = job.config
    data = read_data(job, open_remembered(config))
    if not job.is_main:
        return
    base, tokenizers, without = at_hand(job)
    images: list[decoded.DecodedImage] = []
    if base is not None:
        uses = uses_of(data.items)
        vae = loading.load_vae(base, loading.vae_dtype(base, job.device), job.device)
        chosen = [uses[place] for place in spread(len(uses), MOST_DECODED)]
        found = decoded.decode_uses(chosen, vae)
        images = list(progress(found, total=len(chosen), description="encoding and decoding", unit="image"))
        del vae
        free_memory()
    sets = sets_of(config)
    shown = Shown(sets, data, config.captions.chunks, tokenizers, images, without, show_progress=True)
    name = config.run.name or os.path.basename(os.path.abspath(sets[0].path))
    path = Path(config.run.folder, f"{name or 'data'}_data.html")
    make_folder(path.parent)
    write_atomic(path, page.html(shown).encode())
    job.say(*without, f"written: {path}")


def at_hand(job: Job) -> tuple[loading.Base | None, list[Any], list[str]]:
    """(base, its tokenizers, sentences about what is missing). Without a base on this machine, those of any CLIP copy in the
    hub's cache. UserError if a base that is on this machine cannot be used."""
    config, model = job.config, job.model
    sources = (config.model.base, config.model.vae, config.model.text_encoders, config.model.tokenizers)
    with hub.only_local():
        try:
            base = loading.find_base(config, model)
            return base, [base.load_tokenizer(name) for name in model.TEXT_ENCODERS], []
        except UserError as error:
            if not any(asked and hub.hub_id(asked, "model") for asked in sources):
                raise
            without = [f"the page is without what the network sees, because no base is at hand: {error}"]
        try:
            found = loading.find_tokenizers(model.NAME, config.model.tokenizers, None, None)
            return None, [found[name].load() for name in model.TEXT_ENCODERS], without
        except UserError:
            return None, [], [*without, "the page is without tokens of captions, because no CLIP vocabulary is at hand"]


if __name__ == "__main__":
    run_main(main, CONFIG)
