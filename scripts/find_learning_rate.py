"""A learning-rate range test: trains some steps with a rate that rises exponentially, and draws how the loss changes with it.

    python scripts/find_learning_rate.py sdxl --config configs/sdxl_lora.yaml --data.path photos
    python scripts/find_learning_rate.py my_script.py --config my.yaml --lowest 1e-5 --highest 1 --steps 200

The first word is an architecture or a training script; the options of that script follow. Its own training step is used, with your
optimizer, loss, batch size and data. Two short trainings with the same samples and noise are compared: one with the rising rate,
and one that learns nothing. Each is one process, with a temporary run folder; what is kept is the picture (--output), and the
caches that every run fills. docs/learning_rate.md says what the result means.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sushi_research.config import TrainingConfig
from sushi_research.config.arguments import Parser
from sushi_research.config.process import begin, read_command_line, run_main

INTRO = """\
This tests a range of learning rates. To begin:
  for SDXL:          python scripts/find_learning_rate.py sdxl --config configs/sdxl_lora.yaml --data.path photos
  for SD1.5:         python scripts/find_learning_rate.py sd15 --config configs/sd15_lora.yaml --data.path photos
  its own options:   --lowest 1e-6 --highest 0.1 --steps 100 --output learning_rate.png (these are the defaults)
  every option:      python scripts/find_learning_rate.py sdxl --help"""

# As optimizer.lr in config/learning.py. The first is also the rate of the run that learns nothing: so small that no weight of the
# UNet's working copy changes.
NOTHING, MOST = 1e-12, 1000.0


class RangeTest(NamedTuple):
    """What is tested: the training script with its config, the rates, the number of steps, and the picture to write."""

    script: Path
    config: TrainingConfig
    lowest: float
    highest: float
    steps: int
    output: Path


def read(words: Sequence[str]) -> RangeTest:
    """Reads the command line. Ends the process with a sentence if it is wrong."""
    begin()
    from sushi_research import models
    from sushi_research.errors import UserError
    from sushi_research.experiments.script import config_class_of, find_script

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False)
    parser.add_argument("--lowest", type=float, default=1e-6)
    parser.add_argument("--highest", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path("learning_rate.png"))
    # By hand: to argparse the value of --config, which it does not know, would be the script.
    given, words = (words[0], words[1:]) if words and words[0] not in ("-h", "--help") else ("sdxl", words)
    if given.startswith("-"):
        names = ", ".join(models.ARCHITECTURES)
        parser.error(f"{given} comes before the training script: begin with {names} or my_script.py, then the options")
    own, rest = parser.parse_known_args(words)
    for name, rate in (("--lowest", own.lowest), ("--highest", own.highest)):
        if not NOTHING <= rate <= MOST:
            parser.error(f"{name} is {rate:g}: give a learning rate from {NOTHING:g} to {MOST:g}")
    if not own.lowest < own.highest <= 1e12 * own.lowest:
        parser.error(
            f"--lowest {own.lowest:g} --highest {own.highest:g} is no range of learning rates: the second must be above the first, "
            "at most 1e+12 times"
        )
    if not 10 <= own.steps <= 10_000:
        parser.error(f"--steps is {own.steps}: give 10 to 10000")
    if own.output.is_dir():
        parser.error(
            f"--output {own.output} is a folder: give the file of the picture, such as {own.output / 'rates.png'}"
        )
    known = models.ARCHITECTURES.get(given)
    try:
        script = find_script(known.script if known else given)
        config_class = config_class_of(script)
    except UserError as error:
        parser.error(f"{error}")
    config = read_command_line(config_class, script=f"scripts/find_learning_rate.py {given}", intro=INTRO, argv=rest)
    if config.dry_run:
        parser.error("--dry-run has no effect on a range test: leave it, or give it to the training script")
    for key, rates in rates_up_to(own.highest, config).items():
        rate = max(rates) if isinstance(rates, list) else rates
        if rate > MOST:
            parser.error(
                f"{key} would rise to {rate:g} with --highest {own.highest:g}, as it keeps its ratio to optimizer.lr, and "
                f"{MOST:g} is the largest rate: lower --highest or {key}"
            )
    return RangeTest(script, config, own.lowest, own.highest, own.steps, own.output)


def rates_up_to(highest: float, config: TrainingConfig) -> dict[str, Any]:
    """The settings of all learning rates for this optimizer.lr. Rates of text encoders and new tokens keep their ratio to it; 0,
    for an encoder that is not trained, stays."""
    encoders = config.text_encoders
    given: dict[str, Any] = {"lr": getattr(encoders, "lr", None), "new_tokens_lr": encoders.new_tokens_lr}

    def scaled(rate: float) -> float:
        # In this order: a rate that is equal to optimizer.lr stays equal to it.
        return max(highest * (rate / config.optimizer.lr), NOTHING) if rate else 0.0

    own = {
        f"text_encoders.{key}": list(map(scaled, rate)) if isinstance(rate, list) else scaled(rate)
        for key, rate in given.items()
        if rate is not None
    }
    return {"optimizer.lr": highest} | own


if __name__ == "__main__":
    TEST = read(sys.argv[1:])

import signal
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

from sushi_research import stopping
from sushi_research.config.command_line import config_to_yaml, load_config
from sushi_research.errors import UserError
from sushi_research.experiments import rate_range
from sushi_research.experiments.experiment import written
from sushi_research.experiments.rate_range import by_step
from sushi_research.experiments.run_command import RunCommand
from sushi_research.files import make_folder, write_atomic
from sushi_research.runs.metrics_file import MetricsFile
from sushi_research.runs.run_folder import RunFolder
from sushi_research.terminal import say


def main(test: RangeTest) -> int:
    """Runs both trainings, prints what the curve says and writes the picture; returns 0. UserError if a training fails."""
    with (
        stopping.doing("testing learning rates", "nothing is kept; the same command again starts over"),
        tempfile.TemporaryDirectory(prefix="learning_rate_") as name,
    ):
        folder = Path(name)
        make_folder(test.output.parent)  # before the trainings, as it may fail
        (folder / "config.yaml").write_text(config_to_yaml(test.config))
        nothing = {"schedule.span": 2.0} | rates_up_to(NOTHING, test.config)
        rising = {"schedule.span": test.highest / test.lowest} | rates_up_to(test.highest, test.config)
        for name, settings in (("base", nothing), ("rising", rising)):  # before the first, which takes its time
            words = command_of(test, folder, name, settings)[2:]
            load_config(type(test.config), words, script="scripts/find_learning_rate.py", intro=INTRO)
        say(f"--- {test.steps} steps that learn nothing ---")
        base = losses_of(train(test, folder, "base", nothing))
        say("", f"--- the same steps, with a rate from {test.lowest:g} to {test.highest:g} ---")
        records = train(test, folder, "rising", rising, base)
    losses = losses_of(records)
    # As `schedules.make_schedule` has it. The logged rate of Prodigy is another one: with its estimate.
    rates = {step: test.lowest * (test.highest / test.lowest) ** ((step - 1) / (test.steps - 1)) for step in losses}
    curve = rate_range.curve_of(rates, losses, base, has_ended=max(losses) < test.steps)
    found = rate_range.suggestion_of(curve)
    optimizer = test.config.optimizer.name
    title = f"{optimizer}, {len(curve.rates)} steps of {test.config.train.batch_size * test.config.train.accumulation} samples"
    write_atomic(test.output, rate_range.picture(curve, found, title))
    say("", *rate_range.describe(curve, found), f"written: {test.output}")
    return 0


def train(
    test: RangeTest, folder: Path, name: str, settings: dict[str, Any], base: dict[int, float] | None = None
) -> list[dict[str, Any]]:
    """Runs the training script; returns its metrics. With the `base`'s losses it is stopped when it has diverged.

    UserError if it fails for another reason than a loss or gradient that is not finite, which ends the curve.
    """
    command, run = RunCommand(None), RunFolder(folder / name, None)
    metrics = MetricsFile(run.metrics)
    has_diverged = False
    with ThreadPoolExecutor(1, "training") as pool:
        running = pool.submit(command.train, command_of(test, folder, name, settings), {}, has_launcher=False)
        try:
            while not running.done():
                time.sleep(0.2)
                if base and not has_diverged and rate_range.has_diverged(losses_of(records_of(metrics)), base):
                    has_diverged = True
                    command.stop(signal.SIGTERM)
        finally:
            command.stop(signal.SIGTERM)
    status, records = running.result()[0], records_of(metrics)
    if status and not has_diverged:
        if base is None or not records or not run.not_finite.exists():
            raise UserError("the training failed, and says above why: correct that, then run the same command again.")
        say("the training ended early, at a loss or gradient that is not finite: the curve ends there")
    return records


def command_of(test: RangeTest, folder: Path, name: str, settings: dict[str, Any]) -> list[str]:
    """The command of a training: the user's config without what a test does not need."""
    settings = {
        "train.epochs": None,
        "train.steps": test.steps,
        "schedule.name": "range_test",
        "schedule.warmup": 0,
        "text_encoders.until": None,
        "evaluation.held_out": 0.0,
        "evaluation.path": None,
        "sample.enabled": False,
        "checkpoint.every": None,
        "checkpoint.command": None,
        "tracking.wandb": "off",
        "tracking.tensorboard": False,
        "run.folder": str(folder),
        "run.name": name,
        "run.push_to_hub": None,
    } | settings
    words = [f"--{key}={written(value)}" for key, value in settings.items()]
    return [sys.executable, str(test.script), "--config", str(folder / "config.yaml"), *words]


def records_of(metrics: MetricsFile) -> list[dict[str, Any]]:
    """The lines that the run has written so far."""
    return metrics.read() if metrics.path.exists() else []


def losses_of(records: Sequence[dict[str, Any]]) -> dict[int, float]:
    """The losses by step."""
    return by_step(records, "loss")


if __name__ == "__main__":
    run_main(main, TEST)
