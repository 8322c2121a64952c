"""What SLURM says of the jobs that an experiment has submitted. submitit is not needed to ask."""

from __future__ import annotations

import subprocess
from collections.abc import Collection
from pathlib import Path

# The folder of submitit's files, in that of the logs.
JOBS = "jobs"
# States of sacct in which a job will still do its work.
ALIVE = ("PENDING", "RUNNING", "REQUEUED", "SUSPENDED", "COMPLETING", "CONFIGURING", "PREEMPTED", "RESIZING")
_SECONDS = 30.0


def is_submitted(logs: Path, job: str) -> bool:
    """Whether this experiment has submitted the job. The allocation that a user runs the experiment in is no such job."""
    return (logs / JOBS / f"{job}_submitted.pkl").exists()


def states_of(jobs: Collection[str]) -> dict[str, str]:
    """The state of each job by sacct, such as RUNNING, but for those that it does not know, which are all where it is missing."""
    if not jobs:
        return {}
    command = ["sacct", "-o", "JobID,State", "--parsable2", *(word for job in jobs for word in ("-j", job))]
    try:
        said = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    names, *rows = [line.split("|") for line in said.stdout.splitlines()] or [[]]
    if not {"JobID", "State"} <= set(names):
        return {}
    found = [dict(zip(names, row, strict=False)) for row in rows]
    # "CANCELLED by 1000" names the user.
    return {row["JobID"]: row["State"].partition(" ")[0].rstrip("+") for row in found if row.get("State")}
