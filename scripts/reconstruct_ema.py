"""Makes the average of a run's weights of any length, after the training (post-hoc EMA), and measures which length is good.

    python scripts/reconstruct_ema.py runs/mycat --length 0.08
    python scripts/reconstruct_ema.py runs/mycat --length 0.03 0.05 0.1 0.15 0.2 --measure

The run was trained with --ema.post_hoc true. A length is relative to the training: 0.08 is the standard deviation of the time of
the weights that count, divided by the time trained (sigma_rel of EDM2). Each is written to NAME_ema-0.08.safetensors in the run's
folder, or in --output. With --measure, scripts/evaluate.py measures all of them and the weights of that step themselves on the
run's validation set, and ema_lengths.png shows the loss against the length. docs/ema.md is about both.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sushi_research.config.arguments import Parser
from sushi_research.config.process import begin, run_main

# What is measured if no length is given.
LENGTHS = "0.03 0.05 0.075 0.1 0.15 0.2"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the folder of a run that was trained with --ema.post_hoc true")
    parser.add_argument(
        "--length", type=float, nargs="+", help=f"lengths, from 0.005 to 0.28; measured without any: {LENGTHS}"
    )
    parser.add_argument("--step", type=int, help="the step of a snapshot, at which the averages end; else the last one")
    parser.add_argument("--output", help="a folder for the files; else the run's")
    parser.add_argument(
        "--measure", action="store_true", help="measure the validation loss of each length, and draw a picture of it"
    )
    parser.add_argument("--picture", help="--measure, with the picture in this .png file")
    parser.add_argument(
        "--held-out", help="--measure on the images of this folder, if the run holds none out (evaluation.path)"
    )
    config = parser.parse_args(arguments)
    config.measure = config.measure or config.picture is not None or config.held_out is not None
    if config.length is None and not config.measure:
        parser.error("no length: give some with --length, or --measure")
    config.length = config.length or [float(length) for length in LENGTHS.split()]
    return config


if __name__ == "__main__":
    begin()
    CONFIG = parse(sys.argv[1:])

import contextlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import torch

from sushi_research import stopping
from sushi_research.adapters import run_files, snapshots
from sushi_research.adapters.snapshots import Snapshot
from sushi_research.config.suggestions import word
from sushi_research.errors import UserError
from sushi_research.evaluation.adapter_files import folder_names
from sushi_research.files import make_folder, system_errors
from sushi_research.reports import average_lengths
from sushi_research.runs import records
from sushi_research.runs.run_folder import RunFolder, open_run_folder
from sushi_research.terminal import say

# A profile that is not reached better than this is worth a warning: 5 % of its norm.
MOST_ERROR = 0.05


@system_errors()
def main(config: argparse.Namespace) -> int:
    """Writes the file of each length, and measures them if that is asked for; returns 0."""
    run = run_files.run_folder_of(config.run)
    if run is None or not os.path.isdir(config.run):
        raise UserError(f"{config.run} is not the folder of a run: give one, such as runs/mycat; --step is for a step.")
    if len({f"{length:g}" for length in config.length}) < len(config.length):  # as in the names of files
        raise UserError("--length has a number twice: give each once.")
    settings = records.read_config(run.config, "restore it")
    if config.measure:
        require_validation_set(run, settings, config.held_out)
    with contextlib.ExitStack() as stack:
        if config.output is None:  # only one process may write to a run's folder at a time
            stack.enter_context(open_run_folder(run.path.parent, run.name))
        kept = snapshots.read(run, config.step)
        if config.step is None:
            note_end(run, kept[-1].step)
        weights = {average_lengths.NO_AVERAGE: weights_of(run, settings, kept[-1].step)} if config.measure else {}
        files = write(run, config, settings, kept)
        if config.measure:
            measure(run, config, weights | files)
    return 0


def note_end(run: RunFolder, step: int) -> None:
    """Prints a note if the run finished after `step`, that of its last snapshot."""
    finished = None
    with contextlib.suppress(UserError):
        finished = (run.record() or {}).get("finished_at")
    if finished is not None and step < finished:
        say(
            f"note: {run.averages} has no snapshot of step {finished}, at which the run finished: the averages end at step {step}"
        )


def weights_of(run: RunFolder, settings: dict[str, Any], step: int) -> Path:
    """The adapter file with the weights of a step themselves. UserError if there is none."""
    path = None
    with contextlib.suppress(UserError):
        path = run_files.resolve(f"{run.path}@{step}")
    is_average = path in run.best_adapters().values() and (settings.get("ema") or {}).get("evaluate")
    if path is None or is_average:
        raise UserError(
            f"{run.path} has no adapter file with the weights of step {step}, with which its averages are compared: give a step "
            "that has one with --step, or leave --measure."
        )
    return path


def write(
    run: RunFolder, config: argparse.Namespace, settings: dict[str, Any], kept: list[Snapshot]
) -> dict[float, Path]:
    """Writes the adapter file of each length from the snapshots `kept`; returns them by length."""
    step, folder = kept[-1].step, Path(config.output or run.path)
    dtype = getattr(torch, settings["lora"]["save_dtype"])
    combinations = {length: snapshots.combine(kept, length) for length in config.length}
    with stopping.doing("averaging", "the same command again starts over"):
        found = snapshots.reconstructed(kept, combinations.values(), dtype)
    make_folder(folder)
    files = {}
    for (length, combination), tensors in zip(combinations.items(), found, strict=True):
        path = folder / f"{run.name}_ema-{length:g}.safetensors"
        entries = {
            snapshots.AVERAGE: f"power function, length {length:g}",
            snapshots.ERROR: f"{combination.error:.2g}",
        }
        snapshots.write(path, tensors, kept[-1].path, entries)
        say(
            f"{path}: length {length:g} at step {step}, from {len(kept)} snapshots; error of the profile {combination.error:.2%}"
        )
        if combination.error > MOST_ERROR:
            say(
                f"warning: {length:g} is not reached well: with more snapshots (ema.every), or nearer to the lengths that are "
                "kept, the error is smaller"
            )
        files[length] = path
    return files


def measure(run: RunFolder, config: argparse.Namespace, adapters: dict[float, Path]) -> None:
    """Measures adapter files, by length, on the validation set; prints a table and writes the picture."""
    output = Path(config.output or run.path) / "ema_lengths"
    paths = [str(path) for path in adapters.values()]
    names = folder_names(paths, [1.0], output)
    options = ["--sample.enabled", "false", "--evaluation.pictures", "0", "--output", str(output)]
    if config.held_out is not None:
        options += ["--evaluation.path", config.held_out, "--evaluation.held_out", "0"]
    architecture = records.read_as(run.plan, records.Plan, "restore it")["architecture"]
    words = [architecture, "--config", str(run.config), "--adapters", json.dumps(paths), *options]
    with stopping.doing("measuring", "the adapter files are written; the same command again measures them"):
        status = evaluate(words)
    if status:
        raise UserError(
            f"scripts/evaluate.py ended with status {status}, see above; the adapter files are written, and this measures them: "
            f"python scripts/evaluate.py {' '.join(map(word, words))}"
        )
    found = average_lengths.measured(output, {length: names[n, 1.0] for n, length in enumerate(adapters)})
    picture = Path(config.picture or output / "ema_lengths.png")
    average_lengths.plot(found, run.name, picture)
    say("", *average_lengths.table(found), f"  picture   {picture}")


def evaluate(words: Sequence[str]) -> int:
    """Runs scripts/evaluate.py; returns its exit status."""
    return subprocess.run([sys.executable, str(Path(__file__).with_name("evaluate.py")), *words]).returncode


def require_validation_set(run: RunFolder, settings: dict[str, Any], held_out: str | None) -> None:
    """UserError if there are no images to measure on."""
    evaluation = settings.get("evaluation") or {}
    if held_out is None and not evaluation.get("held_out") and not evaluation.get("path"):
        raise UserError(f"{run.path} holds out no images: give a folder of others with --held-out, or leave --measure.")


if __name__ == "__main__":
    run_main(main, CONFIG)
