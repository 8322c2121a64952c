"""What a training command that is stopped leaves behind, for the line that it then prints."""

from __future__ import annotations

from sushi_research.errors import UserError
from sushi_research.runs.checkpoint import newest_step
from sushi_research.runs.job import Job


def what_is_kept(job: Job) -> str:
    """What is kept and how to go on, by what is on the disk. Outside the training loop; the loop itself saves its last step."""
    if job.run is None:
        return "a dry run trains nothing; the same command again starts over"
    try:
        record, step = job.run.record(), newest_step(job.run.checkpoints)
    except UserError as error:
        return str(error)
    if record is not None and record["finished_at"] is not None:
        return f"the run is finished, and its adapter is {job.run.adapter}"
    if record is not None and step == record["steps"] and job.run.adapter.is_file():
        return f"the adapter {job.run.adapter} is written; the same command again adds what is missing"
    if step is not None:
        file = job.run.step_adapter(step)
        kept = f"the checkpoint of step {step} is kept in {job.run.path}"
        kept += f", and its adapter file is {file}" if file.is_file() else ""
        return f"{kept}; the same command again continues from there"
    return f"what is encoded is kept in {job.config.cache.folder}; the same command again continues"
