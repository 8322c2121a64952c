"""Compares runs, tests which differences between them are significant, and writes a page with the results.

    python scripts/compare_runs.py runs/A runs/B                     # two runs
    python scripts/compare_runs.py runs/experiments/rank             # all runs in a folder; seeds of a variant are pooled
    python scripts/compare_runs.py runs/A evaluations/other          # a run and an adapter file that scripts/evaluate.py measured
    python scripts/compare_runs.py --wandb-runs TEAM/PROJECT --group rank      # runs in W&B, read with its API

Runs are compared on the same validation images with the same noise. docs/experiments.md describes the method.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sushi_research.config.arguments import Parser
from sushi_research.config.process import begin, run_main


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parses the command line before any heavy import, so that --help and a mistyped option answer at once."""
    parser = Parser(
        description="Compares runs, tests which differences are significant, and writes a page with the results."
    )
    add = parser.add_argument
    add(
        "runs",
        nargs="*",
        metavar="RUN",
        help="the folder of a run or of an evaluated adapter file, or a folder that contains such folders",
    )
    add("--wandb-runs", metavar="ENTITY/PROJECT", help="compare runs of this W&B project too")
    add("--group", help="only the runs of this group of that project")
    add("--sweep", metavar="ID", help="only the runs of this sweep of that project")
    add(
        "--reference",
        metavar="NAME",
        help="compare each variant only with this one; fewer pairs find smaller differences",
    )
    add(
        "--pool-code",
        action="store_true",
        help="pool the seeds of a variant even if they were trained with different code; the page says so",
    )
    add(
        "--searched",
        action="store_true",
        help="the variants are those of a search: the page says what that means for the best of them (--sweep implies it)",
    )
    add(
        "--step",
        type=int,
        metavar="N",
        help="compare at the evaluation of this step, fixed beforehand (default: the last point that both runs reached)",
    )
    add("--output", metavar="FOLDER", help="folder for the page (default: comparisons/ and the first run's name)")
    add("--title", help="the page's title")
    add(
        "--wandb",
        choices=("auto", "online", "offline", "off"),
        default="auto",
        help="whether to log the page to W&B",
    )
    add("--project", default="sushi-research", help="the W&B project to log the page to (default: sushi-research)")
    add("--entity", help="the user or team of that project (default: yours)")
    found = parser.parse_args(arguments)
    if not found.runs and not found.wandb_runs:
        parser.error("give the folders of two runs or more, or --wandb-runs ENTITY/PROJECT")
    if (found.group or found.sweep) and not found.wandb_runs:
        parser.error("--group and --sweep go with --wandb-runs ENTITY/PROJECT")
    if found.step is not None and found.step < 1:
        parser.error(f"--step is {found.step}: give a step of the training, 1 or later")
    return found


if __name__ == "__main__":
    begin()
    ARGUMENTS = parse(sys.argv[1:])

from pathlib import Path

from sushi_research import stopping
from sushi_research.errors import UserError
from sushi_research.experiments import page_content, picture_grids, plots, selection, wandb_runs
from sushi_research.experiments.comparison import Comparison, compare
from sushi_research.experiments.numbers import numbers
from sushi_research.files import CannotWrite, make_folder, remove, system_errors, write_atomic, write_json
from sushi_research.progress import progress
from sushi_research.reports import page
from sushi_research.reports.run_record import find_records, read_record
from sushi_research.terminal import say
from sushi_research.user_files import expand_path


@system_errors()
def main(arguments: argparse.Namespace) -> int:
    """Reads the runs, compares them, writes the page and prints the test results; returns 0."""
    with stopping.doing("comparing", "the page is not complete; the same command again makes it"):
        write_comparison(arguments)
    return 0


def write_comparison(arguments: argparse.Namespace) -> None:
    """Reads the runs, compares them, writes the page and prints the test results."""
    arguments.runs = [expand_path(name, key="RUN") for name in arguments.runs]
    folders, problems = folders_of(arguments)
    default = f"comparisons/{Path(arguments.runs[0]).resolve().name if arguments.runs else 'wandb'}"
    output = Path(default if arguments.output is None else expand_path(arguments.output, key="--output"))
    make_folder(output)
    if arguments.wandb_runs:
        try:
            folder = output / "wandb"
            downloaded = wandb_runs.download(arguments.wandb_runs, arguments.group, arguments.sweep, folder)
            folders, problems = folders + downloaded[0], problems + downloaded[1]
        except UserError as error:
            problems.append(str(error))
    bar = progress(folders, description="reading runs", unit="run", disable=len(folders) < 10)
    records = [read_record(folder) for folder in bar]
    for problem in [*problems, *(problem for record in records for problem in record.problems)]:
        say(f"warning: {problem}", file=sys.stderr)
    if not records:
        raise UserError("no run is left to compare: see the warnings above.")
    comparison = compare(records, arguments.reference, arguments.pool_code, arguments.step)
    comparison.problems[:0] = problems
    if arguments.searched or arguments.sweep:
        comparison.warnings[:0] = selection.notes(len(comparison.variants), comparison.learned)
    say_results(comparison)  # before anything is written: a full disk loses no result
    title = arguments.title or f"Comparison of {len(records)} run{'s' if len(records) > 1 else ''}"
    known = len(comparison.problems)
    plot_files = write_plots(comparison, output)
    for problem in comparison.problems[known:]:
        say(f"warning: {problem}", file=sys.stderr)
    blocks = page_content.blocks(comparison, title, plot_files, output)
    write_atomic(output / "comparison.md", page.to_markdown(blocks).encode())
    write_atomic(output / "comparison.html", page.to_html(blocks).encode())
    write_json(output / "comparison.json", numbers(comparison))
    say(f"  page      {output / 'comparison.html'} (open it in a browser)", f"  markdown  {output / 'comparison.md'}")
    with stopping.doing("sending the page to W&B", f"the page is written, in {output}"):
        if note := wandb_runs.log_page(arguments, comparison, title, output):
            say(note)


def folders_of(arguments: argparse.Namespace) -> tuple[list[Path], list[str]]:
    """The run folders that the command line names, without duplicates, and an error message for each name that is none."""
    found: dict[Path, Path] = {}
    problems = []
    for name in arguments.runs:
        try:
            found |= {folder.resolve(): folder for folder in find_records(Path(name))}
        except UserError as error:
            problems.append(str(error))
    return list(found.values()), problems


def write_plots(comparison: Comparison, output: Path) -> dict[str, Path]:
    """Draws those plots for which there is data; returns their paths by name. A plot that cannot be written becomes a problem."""
    draw = {
        "trade_off": lambda path: plots.trade_off(comparison, path),
        "curves": lambda path: plots.validation_curves(comparison, path),
        "differences": lambda path: plots.differences(comparison, path),
        "matrix": lambda path: len(comparison.variants) > 3 and plots.matrix(comparison, path),
        "timestep_bins": lambda path: plots.timestep_bins(comparison, path),
        "pictures": lambda path: picture_grids.pictures(comparison, path),
        "samples": lambda path: picture_grids.samples(comparison, path),
    }
    drawn = {}
    for name, function in draw.items():
        path = output / f"{name}.png"
        remove(path)
        try:
            if function(path):
                drawn[name] = path
        except CannotWrite as error:
            comparison.problems.append(f"{error.reason}: the page is without it")
    return drawn


def say_results(comparison: Comparison) -> None:
    """Prints the result of each pair in words."""
    sentences = page_content.sentences(comparison)
    for sentence in sentences[:10]:
        say(sentence)
    if len(sentences) > 10:
        say(f"... and {len(sentences) - 10} more pairs, on the page")
    if not sentences:
        say(f"no test result: {page_content.why_none(comparison)}")
    for warning in comparison.warnings:
        say(f"warning: {warning}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main, ARGUMENTS)
