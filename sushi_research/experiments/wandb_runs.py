"""Runs in W&B: downloads their records for comparisons, and logs the comparison page.

A finished training logs an artifact of type "record": the files of its run folder that describe its course and results
(`RunFolder.record_files`). W&B's offline folders cannot be read back; use the run folder itself instead.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sushi_research.errors import UserError, first_line
from sushi_research.experiments.numbers import families_of
from sushi_research.progress import progress
from sushi_research.runs.tracking import resolve_trackers
from sushi_research.runs.wandb_run import start_run

if TYPE_CHECKING:
    import argparse

    from sushi_research.experiments.comparison import Comparison

RECORD = "record"


def download(
    path: str, group: str | None, sweep: str | None, folder: Path, api: Any = None
) -> tuple[list[Path], list[str]]:
    """Downloads the records of a project's runs to `folder/<run id>/<run name>`; returns (their folders, warnings).

    `path` is ENTITY/PROJECT; `group` and `sweep` restrict the runs. A run without a readable record becomes a warning. UserError if
    W&B cannot be reached, the project does not exist, or there is no record. `api` is a `wandb.Api`; None creates one.
    """
    if path.count("/") != 1 or not all(path.split("/")):
        raise UserError(f"--wandb-runs is {path}: give ENTITY/PROJECT, as in the address of the project's page.")
    filters = {key: value for key, value in {"group": group, "sweep": sweep}.items() if value is not None}
    found, without, problems = [], [], []
    try:
        if api is None:
            import wandb

            api = wandb.Api()
        runs = list(api.runs(path, filters=filters))
    except Exception as error:
        # W&B raises its own errors, those of the network library, and ValueError for a missing project.
        raise UserError(
            f"W&B's {path} cannot be read ({first_line(error)}): check its name, `wandb login`, and the network."
        ) from None
    for run in progress(runs, description="downloading records", unit="run"):
        try:
            # The order of versions is not specified.
            records = [artifact for artifact in run.logged_artifacts() if artifact.type == RECORD]
            if not records:
                without.append(run.name)
                continue
            newest = max(records, key=lambda artifact: int(artifact.version.removeprefix("v")))
            # A run's name is free text, so it must not escape from the folder.
            place = folder / run.id / (re.sub(r"[^\w.-]+", "-", run.name).strip(".") or run.id)
            newest.download(root=str(place))
            found.append(place)
        except Exception as error:
            problems.append(f"W&B's run {run.name} of {path} cannot be read ({first_line(error)}): it is skipped")
    if not found:
        where = f"{path}{f', group {group}' if group else ''}{f', sweep {sweep}' if sweep else ''}"
        if problems:
            raise UserError(f"nothing of W&B's {where} could be downloaded: {problems[0]}.")
        content = f"{len(without)} runs and none has a record" if without else "no run"
        raise UserError(f"W&B's {where} holds {content}: there is nothing to compare.")
    if without:
        names = ", ".join(without[:5])
        problems.append(f"{len(without)} runs of {path} have no record and are skipped: {names}")
    return found, problems


def log_page(arguments: argparse.Namespace, comparison: Comparison, title: str, output: Path) -> str:
    """Logs the page to W&B as a run of job type "comparison": tables, images and the HTML. Returns a message, "" when off.

    An error while logging only gives a warning in the message. UserError if `--wandb online` is not possible.
    """
    trackers = resolve_trackers(arguments.wandb, False)
    if trackers.wandb_mode is None:
        return trackers.notice if arguments.wandb != "off" else ""
    options = {
        "entity": arguments.entity,
        "job_type": "comparison",
        "name": title,
        "dir": output,
        "config": {"runs": [run.name for variant in comparison.variants for run in variant.runs]},
    }
    try:
        run = start_run(trackers.wandb_mode, trackers.may_fall_back, arguments.project, options)
        if run is None:
            return f"W&B: off; the page is in {output}"
        run.log(_values(comparison, output))
        run.finish()
    except UserError:
        raise
    except Exception as error:
        return f"warning: the page could not be logged to W&B ({first_line(error)}); it is in {output}"
    return trackers.notice


def _values(comparison: Comparison, output: Path) -> dict[str, Any]:
    import wandb

    values: dict[str, Any] = {name: wandb.Table(**table) for name, table in tables(comparison).items()}
    values |= {path.stem: wandb.Image(str(path)) for path in sorted(output.glob("*.png"))}
    return values | {"page": wandb.Html(str(output / "comparison.html"))}


def tables(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """`columns` and `data` of the tables: the results in words, the tests of each outcome, and the settings that differ."""
    columns = [
        "candidate",
        "reference",
        "test result",
        "difference",
        "low",
        "high",
        "p",
        "adjusted p",
        "detectable from",
        "at",
    ]
    found = {}
    results = [
        [pair.candidate.label, pair.reference.label, result.word, result.sentence, result.disagreement]
        for pair, result in comparison.decided
    ]
    if results:
        head = ["candidate", "reference", "result", "sentence", "disagreement"]
        found["results"] = {"columns": head, "data": results}
    for name, pairs in families_of(comparison).items():
        data = []
        for pair in pairs:
            row = [pair.candidate.label, pair.reference.label]
            if pair.outcome is None:
                data.append([*row, pair.note, *[None] * 7])
                continue
            d = pair.difference
            numbers = [d.value, d.low, d.high, d.p_value, pair.outcome.adjusted_p, d.smallest_detectable, pair.at]
            data.append([*row, pair.word, *numbers])
        if data:
            found[f"test_results/{name}"] = {"columns": columns, "data": data}
    if comparison.differing:
        labels = [variant.label for variant in comparison.variants]
        data = [[key, *map(str, values)] for key, values in comparison.differing.items()]
        found["what differs"] = {"columns": ["setting", *labels], "data": data}
    return found
