"""The small picture in an adapter file's metadata, which programs show in their lists: the first picture of the newest samples."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from sushi_research.adapters import kohya_format
from sushi_research.adapters.metadata import THUMBNAIL
from sushi_research.runs.job import Job
from sushi_research.sampling import plots, sample_grids

# Pixels of the longer side, as modelspec recommends (256x256); at this quality about 10 kB.
SIDE, QUALITY = 256, 80


def newest(job: Job, step: int) -> dict[str, str]:
    """The metadata entry of the newest samples before `step`; {} without any, or if the metadata are to have none.

    Before a step of its own the samples are the base's, unless the run starts from a file. Those of `step` itself come after its
    file (`add`); so a run that was stopped in between has the same file in the end.
    """
    assert job.run is not None
    first = 0 if job.start else 1
    steps = sample_grids.steps_of(job.run.samples)
    return next((found for each in reversed(steps) if first <= each < step and (found := _entry(job, each))), {})


def add(job: Job, path: Path, step: int) -> None:
    """Puts the samples of `step`, which were just drawn, into its adapter file; nothing if there are none."""
    if path.is_file() and (entry := _entry(job, step)):
        kohya_format.add_metadata(path, entry)


def _entry(job: Job, step: int) -> dict[str, str]:
    assert job.run is not None
    if job.config.lora.metadata != "full":
        return {}
    pictures = sorted(sample_grids.step_folder(job.run.samples, step).glob("*.png"))
    if not pictures or plots.picture_problem(pictures[0]):
        return {}
    data = io.BytesIO()
    with Image.open(pictures[0]) as image:
        small = image.convert("RGB")
        small.thumbnail((SIDE, SIDE))
        small.save(data, "JPEG", quality=QUALITY)
    return {THUMBNAIL: f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode('ascii')}"}
