"""Lets an outside program, ckpt-chaos, kill the training scripts at the file boundaries of their saves, and judge what comes back.

    python -m testing.file_boundaries --points 10           # some of the boundaries, in about 25 minutes on one core
    python -m testing.file_boundaries --points 1000         # all of them, in hours

ckpt-chaos runs `python scripts/train_*_lora.py` once and records every file that it creates, renames or removes in its run folder.
Then it kills a new run at each of these events, or right after the file was cut to half its size, runs the same command again,
and compares the fingerprints (fingerprint.py). Here its verdicts are read, and those that come from its method are explained.
The exit status is 1 if a run did not recover.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sushi_research.errors import UserError
from testing.fingerprint import METRICS, fingerprint

TABLE = "file boundaries"  # the name of the table in its page
# A setup of launches.py, and the process that is killed. Other processes than the first one write only to the cache.
JUDGED = (("sd15-1-plain", 0), ("sdxl-1-plain", 0), ("sd15-2-plain", 0), ("sdxl-2-plain", 1))
# All checkpoints are kept: ckpt-chaos cannot tell one that the run removed from one that was lost.
SETTINGS = {"checkpoint.keep": 3, "evaluation.drift_captions": []}
DRIFT = "other temporary names than planned (they are random)"
HALVED = "metrics.jsonl cut in half, lines included that were synced"
# A temporary file (temporaries.py).
_RANDOM = re.compile(r"(?<=\.)[0-9a-f]{8}(?=\.tmp$)")


@dataclass(frozen=True)
class KillPoint:
    """What became of one kill. `failed`: how the same command ended if not with status 0; `lost`, `different`: results."""

    label: str
    failed: str | None
    lost: tuple[str, ...]
    different: tuple[str, ...]
    flags: tuple[str, ...]

    @property
    def recovered(self) -> bool:
        return not (self.failed or self.lost or self.different)


class Judged(NamedTuple):
    """The kill points of one setup, and the number of file events of an uninterrupted run."""

    setup: str
    killed: int
    events: int
    points: list[KillPoint]


def judge(record: dict[str, Any], verdict: str, names: tuple[str, str], found: dict, expected: dict) -> KillPoint:
    """Reads ckpt-chaos' record of one kill point and its `verdict`.

    `names`: of the file at which the kill was planned, and at which it happened. `found` and `expected`: fingerprints.
    """
    torn = record["point"][1] == "torn"
    lost = [what for what in expected if what not in found or (found[what] == "damaged" != expected[what])]
    different = [what for what in found if what not in lost and found[what] != expected.get(what)]
    flags = []
    if record["drift"]:
        same = _RANDOM.sub("*", names[0]) == _RANDOM.sub("*", names[1])
        flags.append(DRIFT if same else f"killed at {names[1] or 'no file'} in place of {names[0]}")
    if not record["crashed"]:
        flags.append("not killed")
    if verdict == "SILENT_DIVERGENCE" and torn and names[0] == METRICS and [*lost, *different] == [METRICS]:
        flags.append(HALVED)
        different = []
    if verdict == "LOST_WORK":
        newest, used = (record["outcome"][key] for key in ("newest_complete_step", "resumed_from_step"))
        lost.append(f"the checkpoint of step {newest}: resumed from step {used or 0}")
    failed = record["outcome"]["raised"]
    return KillPoint(
        record["label"], failed, () if failed else tuple(lost), () if failed else tuple(different), tuple(flags)
    )


def read_judged(work: Path, setup: str, killed: int) -> Judged:
    """Reads the folder that ckpt-chaos worked in. UserError if it did not end, or its run without a kill was not equal."""
    from ckpt_chaos.runner import rejudge

    records = sorted(
        (json.loads(path.read_text()) for path in work.glob("pt_*/result.json")), key=lambda it: it["order"]
    )
    rows = rejudge(work)
    if not records or records[0]["order"] != 0 or rows[0].verdict != "PASS":
        raise UserError(f"ckpt-chaos found that two runs of {setup} without a kill differ, or failed: see {work}.")
    planned, expected = _events(work / "reference", killed), fingerprint(work / "reference/out/run")
    points = []
    for record, row in zip(records, rows, strict=True):
        if record["order"] == 0:  # the run without a kill
            continue
        number, place = record["point"][0], work / f"pt_{record['order']:03d}"
        names = planned[number], _events(place, killed).get(number, "")
        points.append(judge(record, row.verdict, names, fingerprint(place / "out/run"), expected))
    return Judged(setup, killed, len(planned), points)


def _events(folder: Path, rank: int) -> dict[int, str]:
    """The file events of a run that ckpt-chaos logged: the file's name by the event's number."""
    path = folder / f"events.log.rank{rank}"
    found = (line.split("\t") for line in (path.read_text().splitlines() if path.exists() else []))
    return {int(number): name for number, _, name, _ in found}


def table(judged: Sequence[Judged], note: str) -> str:
    """A Markdown table of all setups, the explanation of the flags, and the note."""
    from testing.result_pages import markdown

    head = "script, processes|killed|file events|kill points|recovered|failed|lost|different|flags of ckpt-chaos".split(
        "|"
    )
    rows, total = [], [0] * 5
    for each in judged:
        architecture, world = each.setup.split("-")[:2]
        points = each.points
        counts = [len(points), *(sum(bool(getattr(it, key)) for it in points) for key in ("recovered", "failed"))]
        counts += [sum(bool(getattr(it, key)) for it in points) for key in ("lost", "different")]
        total = [one + other for one, other in zip(total, counts, strict=True)]
        flags = Counter(flag for point in points for flag in point.flags)
        told = "; ".join(f"{count}: {flag}" for flag, count in flags.items()) or "none"
        rows.append([f"train_{architecture}_lora.py, {world}", f"process {each.killed}", each.events, *counts, told])
    rows.append(["all", "", sum(each.events for each in judged), *total, ""])
    return "\n".join([*markdown(head, rows), "", note])


def tool_command(
    script: str, world: int, killed: int, settings: dict[str, Any], *, work: Path, points: int
) -> list[str]:
    """The command line of ckpt-chaos for `script`."""
    options = {
        "--work": work,
        "--max-points": points,
        "--ranks": world,
        "--crash-rank": killed,
        "--timeout": 300,
        "--result-cmd": shlex.join([sys.executable, "-m", "testing.fingerprint", "{out}/run"]),
        # A file that is open until the end, .lock, is cut when the run has finished.
        "--step-regex": r"(?:continuing the run \S+ from|is finished, at) step (\d+)",
        "--checkpoint-glob": "{out}/run/checkpoints/step-*",
    }
    words = [str(word) for option in options.items() for word in option]
    command = [sys.executable, script]
    for key, value in settings.items():
        command += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return [sys.executable, "-m", "ckpt_chaos", "run", *words, "--", *command]


def run_tool(command: Sequence[str], environment: dict[str, str], work: Path, description: str) -> None:
    """Runs ckpt-chaos with a bar of its kill points. UserError if it ends before it has judged."""
    from sushi_research.progress import progress
    from testing.result_pages import ROOT

    log = work.with_suffix(".log")
    with open(log, "w") as output:
        tool = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            with progress(description=description, unit="kill") as bar:
                while tool.poll() is None:
                    time.sleep(0.5)
                    if bar.total is None and (found := re.search(r"-> (\d+) crash points", log.read_text())):
                        bar.reset(total=int(found[1]) + 1)
                    bar.update(len(list(work.glob("pt_*/result.json"))) - bar.n)
        finally:
            if tool.poll() is None:
                tool.terminate()
                tool.wait()
    if "3/3 judging" not in log.read_text():
        raise UserError(f"ckpt-chaos stopped before it had judged: see {log}.")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m testing.file_boundaries",
        description="Lets ckpt-chaos kill the training scripts at the file boundaries of their saves.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--points",
        type=int,
        default=10,
        help="kill points of a setup with one process, half as many with two; a few more in each setup (default: 10)",
    )
    add("--only", choices=[name for name, _ in JUDGED], help="run only this setup")
    add(
        "--keep",
        metavar="FOLDER",
        help="work in this new folder and keep it (default: a temporary one, kept if a run is lost)",
    )
    add("--write", type=Path, metavar="PAGE", help="write the table between the marks in this page")
    found = parser.parse_args(arguments)
    if found.points < 2:
        parser.error("--points is at least 2")
    if found.write and found.only:
        parser.error("--write needs the results of all setups: leave --only out")
    return found


def main(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    from testing.launches import SETUPS, Launcher, script_of
    from testing.result_pages import around_table, circumstances, write_table

    if options.write:
        around_table(options.write, TABLE)  # a page without marks is refused before the work, not after it
    folder = Path(options.keep or tempfile.mkdtemp(prefix="file-boundaries-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    launcher, judged = Launcher(folder), []
    for number, (name, killed) in enumerate(JUDGED):
        if options.only not in (None, name):
            continue
        setup, work = SETUPS[name], folder / f"{name}-process-{killed}"
        # A cache outside the watched folder is filled by the first run. What process 1 writes is only in a new cache.
        cache = "{out}/cache" if killed else str(folder / f"cache-{name}")
        settings = launcher.settings(setup, "{out}", cache) | SETTINGS
        # ckpt-chaos spreads equal numbers over the same events: another number in each setup hits others.
        points = max(2, options.points // setup.world) + number
        command = tool_command(script_of(setup), setup.world, killed, settings, work=work, points=points)
        run_tool(command, _environment(killed), work, work.name)
        judged.append(read_judged(work, name, killed))
    scripts = dict.fromkeys(script_of(SETUPS[each.setup]) for each in judged)
    text = table(judged, circumstances(("ckpt-chaos", "torch", "diffusers", "peft"), scripts))
    print(text)
    if options.write:
        write_table(options.write, TABLE, text)
    bad = list(_not_recovered(judged))
    for line in bad:
        print(line, file=sys.stderr)
    if bad:
        print(f"{len(bad)} runs did not recover; their files are in {folder}", file=sys.stderr)
    elif not options.keep:
        shutil.rmtree(folder)
    return int(bool(bad))


def _environment(killed: int) -> dict[str, str]:
    import os

    from testing.result_pages import ROOT

    # ckpt-chaos kills process 1 only if this variable says so too.
    ours = {"CKPT_CHAOS_CRASH_RANK": str(killed), "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    return os.environ | ours | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def _not_recovered(judged: Sequence[Judged]) -> Iterator[str]:
    for each in judged:
        for point in each.points:
            if not point.recovered:
                what = point.failed or f"lost: {', '.join(point.lost)}; different: {', '.join(point.different)}"
                yield f"{each.setup}, process {each.killed}, {point.label}: {what}"


if __name__ == "__main__":
    from sushi_research.config.process import run_main

    run_main(main, parse(sys.argv[1:]))
