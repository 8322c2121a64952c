"""What a run's page says of the run besides its results: numbers on top, plan, problems, stage timings, provenance, config.

Each function reads one file of the run folder; UserError if that is damaged.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from sushi_research.files import size_text
from sushi_research.reports import training_log
from sushi_research.reports.page import Block, Card
from sushi_research.runs import provenance, records
from sushi_research.runs.run_folder import RunFolder
from sushi_research.user_files import read_regular

REMEDY = "the page is without that part"
# More than so many problems or notes are folded.
MOST_ITEMS = 12
# Keys of data_report.json -> the config's keys of the folders that they are about.
OTHER_SCANS = {"evaluation": "evaluation.path", "prior_path": "evaluation.prior_path"}
# The column of the text in a plan's lines.
INDENT = 13


def cards(
    run: RunFolder, metrics: Sequence[Mapping[str, Any]], plan: Mapping[str, Any], step: int | None
) -> list[Card]:
    """The numbers on top of the page: progress, images, time, and the adapter file if there is one. `step` is None if not known."""
    found = []
    steps, trained = plan.get("steps"), training_log.trained(metrics)
    if isinstance(steps, int) and step is not None:
        epochs = trained[-1].get("epoch") if trained else (None if step else 0.0)
        detail = f"{epochs:.3g} epochs" if isinstance(epochs, int | float) else ""
        found.append(Card("optimizer steps", f"{step:,} of {steps:,}", detail))
    if isinstance(plan.get("images"), int):
        found.append(Card("images", f"{plan['images']:,}", f"{plan.get('global_batch_size')} samples per step"))
    if trained:
        samples = plan.get("global_batch_size") or 1
        seconds = [samples / line["images_per_second"] for line in trained]
        detail = f"{median(seconds):.3g} s per step"
        if isinstance(steps, int) and step is not None and step < steps:
            detail += f", {_duration((steps - step) * median(seconds))} to go"
        found.append(Card("time in training steps", _duration(sum(seconds)), detail))
        if peaks := [line["peak_memory_gib"] for line in trained if line.get("peak_memory_gib")]:
            found.append(Card("peak memory", f"{max(peaks):.1f} GiB", "of the largest process"))
    if files := _adapter_files(run):
        last, of_step = files[-1]
        found.append(Card("adapter file", "finished" if last == run.adapter else of_step, last.name))
    return found


def _adapter_files(run: RunFolder) -> list[tuple[Path, str]]:
    """(path, of which step) of the run's adapter files, the finished one last."""
    found = [(path, f"step {step}") for step, path in sorted(run.step_adapters().items()) if path.is_file()]
    return found + ([(run.adapter, "the end")] if run.adapter.is_file() else [])


def adapter_files(run: RunFolder) -> list[Block]:
    """The run's adapter files, the last first; that of ema.decay and those of the best step too. [] if there are none."""
    found = sorted(run.best_adapters().items())
    best = [(path, f"step {step}, the best evaluated so far") for step, path in found if path.is_file()]
    average = [(run.average, "the average of the weights (ema.decay)")] if run.average.is_file() else []
    files = [*best, *average, *_adapter_files(run)][::-1]
    if not files:
        return []
    rows = [
        ["file", "of", "size"],
        *([path.name, step, size_text(path.stat().st_size)] for path, step in files[:MOST_ITEMS]),
    ]
    text = "Each is complete: copy one into the LoRA folder of your program, or give it to scripts/sample.py."
    blocks = [Block("lead", text), Block("table", rows=rows)]
    if files[MOST_ITEMS:]:
        blocks.append(
            Block("details", f"{len(files) - MOST_ITEMS} more", items=[path.name for path, _ in files[MOST_ITEMS:]])
        )
    return blocks


def _duration(seconds: float) -> str:
    """Seconds in words of two units: "45 s", "3 min 20 s", "2 h 5 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def plan_facts(plan: Mapping[str, Any]) -> list[Block]:
    """The plan as it was printed, without the problems of the data; of a file of an older version, its numbers."""
    rows: list[list[str]] = []
    for line in plan.get("text") or []:
        name, text = line[:INDENT].strip(), line[INDENT:].strip()
        if name or not rows:
            rows.append([name, text])
        else:
            rows[-1][1] += f"\n{text}"
    if not rows:
        rows = [[key, str(value)] for key, value in plan.items() if isinstance(value, str | int | float)]
    return [Block("facts", rows=[row for row in rows if row[0] not in ("skipped", "notes")])]


def data_problems(run: RunFolder) -> list[Block]:
    """The files that are not used, with the reason, those that lose much to the crop, and other notes; [] if there are none."""
    if not os.path.lexists(run.data_report):
        return []
    report = records.read_as(run.data_report, records.DataReport, REMEDY)
    scans = [("", report), *((key, report.get(name)) for name, key in OTHER_SCANS.items())]
    problems, cropped, notes = [], [], []
    for key, scan in scans:
        if scan:
            where = f"{key}: " if key else ""
            problems += [f"{where}{each['name']}: {each['reason']}" for each in scan["problems"]]
            cropped += [f"{where}{each['name']}: {each['lost']:.0%}" for each in scan.get("cropped") or []]
            notes += [f"{where}{note}" for note in scan.get("notes") or []]
    found = []
    for items, what, kind in (
        (problems, "file{s} not used", "warning"),
        (cropped, "image{s} with a large part cut away to fit a bucket", "list"),
        (notes, "note{s} on files that are used", "list"),
    ):
        if items:
            what = what.format(s="" if len(items) == 1 else "s")
            found += [Block("text", f"{len(items)} {what}:"), *_folded(items, kind)]
    return found


def _folded(items: list[str], kind: Any) -> list[Block]:
    """The items as a list; those after the first MOST_ITEMS are folded."""
    found = [Block(kind, items=items[:MOST_ITEMS])]
    if items[MOST_ITEMS:]:
        found.append(Block("details", f"{len(items) - MOST_ITEMS} more", items=items[MOST_ITEMS:]))
    return found


def launches(run: RunFolder) -> list[Block]:
    """Each launch with its device and code, the versions of the libraries, and the hashes of what went in."""
    entries = provenance.entries(run.provenance, REMEDY)
    if not entries:
        return []
    rows = [["started", "from step", "device", "processes", "precision", "step path", "code"]]
    for entry in entries:
        code = entry.get("code") or {}
        commit = str(code.get("commit") or code.get("version") or "-")[:10] + (
            " + changes" if code.get("dirty") else ""
        )
        values = (entry.get("step"), entry.get("device"), entry.get("world"), entry.get("precision"))
        shown = ["-" if value is None else str(value) for value in values]
        rows.append([_date(entry.get("date")), *shown, provenance.step_path(entry), commit])
    last = entries[-1]
    machine = last.get("machine") or {}
    facts = [["platform", str(last.get("platform") or "-")], ["python", str(last.get("python") or "-")]]
    if isinstance(machine, dict) and machine.get("cpus"):
        gpu = f", GPU memory {machine['gpu_memory_gib']} GiB" if machine.get("gpu_memory_gib") else ""
        threads = (
            f"{machine.get('cpus')} cores, {machine.get('threads')} threads, memory {machine.get('memory_gib')} GiB"
        )
        facts.append(["machine", f"{threads}{gpu}"])
    libraries = last.get("libraries") or {}
    facts.append(["libraries", ", ".join(f"{name} {version}" for name, version in libraries.items() if version)])
    hashes = {
        "data": last.get("dataset"),
        **{f"base, {name}": value for name, value in (last.get("base") or {}).items()},
    }
    facts += [[f"hash of {name}", str(value)] for name, value in hashes.items() if value]
    return [Block("table", rows=rows), Block("facts", rows=[row for row in facts if row[1]])]


def _date(text: Any) -> str:
    try:
        return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M %Z")
    except (TypeError, ValueError):
        return "-"


def stage_timings(run: RunFolder) -> list[Block]:
    """The seconds of each stage of the last launch; [] if they are not known."""
    if not os.path.lexists(run.stage_timings):
        return []
    return [
        Block("lead", "Of the last launch."),
        Block("times", seconds=records.read_as(run.stage_timings, records.TIMINGS, REMEDY)),
    ]


def config(run: RunFolder) -> list[Block]:
    """config.yaml, folded."""
    if not os.path.lexists(run.config):
        return []
    text = read_regular(run.config, records.MOST_BYTES).decode(errors="replace")
    return [Block("details", run.config.name, items=text.splitlines())]
