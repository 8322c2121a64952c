"""`run.push_to_hub`: uploads the adapter of a finished run. Its failure is a warning, because the run is complete without it."""

from __future__ import annotations

from sushi_research import stopping
from sushi_research.config.suggestions import word
from sushi_research.errors import UserError
from sushi_research.reports import hub_push
from sushi_research.runs.job import Job
from sushi_research.terminal import say


def describe(repository: str, *, is_average: bool) -> str:
    """What will be uploaded, for the plan: the adapter, or its average; and what would make it fail."""
    from huggingface_hub import get_token

    from sushi_research.models.hub_access import is_offline

    problem = "; HF_HUB_OFFLINE is set, so it would fail" if is_offline() else ""
    if not problem and get_token() is None:
        problem = "; you are not logged in, so it would fail: run `hf auth login`, or set HF_TOKEN"
    what = "the average of the adapter" if is_average else "the adapter"
    return f"at the end, {what} and a model card to {repository} on the Hugging Face hub, private if it is new{problem}"


def push_finished(job: Job) -> None:
    """Uploads the adapter of the finished run, if run.push_to_hub says so, and prints where it is: with ema.evaluate its average,
    which the card's numbers and pictures are of. Only the main process may call this."""
    repository, run = job.config.run.push_to_hub, job.run
    if repository is None:
        return
    assert run is not None
    adapter, which = (run.average, "@ema") if job.config.ema.evaluate else (run.adapter, "")
    again = f"python scripts/push_to_hub.py {word(f'{run.path}{which}')} {word(repository)}"
    with stopping.doing(f"uploading to {repository}", f"the run is complete; to upload it: {again}"):
        try:
            say(*lines(hub_push.push(run, adapter, repository)))
        except UserError as error:
            say(f"warning: {error} The run is complete; to try again: {again}")


def lines(pushed: hub_push.Pushed) -> list[str]:
    """What was uploaded, and what is left to the user."""
    files = ", ".join(["the adapter", *pushed.token_files])
    if pushed.note:
        return [f"uploaded {files} to {pushed.url}; {pushed.note}"]
    pictures = f" with {pushed.pictures} pictures" if pushed.pictures else ""
    return [
        f"uploaded {files} and a model card{pictures} to {pushed.url}",
        "its licence is yours to state: add `license:` to the card there; a later upload keeps it",
    ]
