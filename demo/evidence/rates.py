"""The learning rates of the optimizers: the validation losses of optimizers_rates.yaml, and the best rate of each."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from demo.evidence.endings import DIVERGED, LOSS, is_finite, launch_of, lines_of, require_ended
from demo.evidence.study import Study
from sushi_research.errors import UserError
from sushi_research.files import make_folder, write_json

EXPERIMENT, RATES = "optimizers_rates", "learning_rates.json"


def write() -> dict[str, float]:
    """Records the validation losses of optimizers_rates.yaml; returns the best rate of each optimizer.

    UserError, before anything is written, if a run is missing or has not ended.
    """
    study, losses = Study.of(EXPERIMENT), {}
    [seed] = study.content["seeds"]
    for variant, settings in study.content["variants"].items():
        last = last_loss(study.trained / f"{variant}-seed{seed}")
        losses.setdefault(settings["optimizer"]["name"], {})[f"{settings['optimizer']['lr']:g}"] = last
    found = best(losses)
    folder = Study.of("optimizers").folder
    make_folder(folder)  # its other files come later, from the runs with these rates
    write_json(folder / RATES, {"seed": seed, "loss": losses})
    return found


def last_loss(run: Path) -> float | None:
    """The validation loss of a run at its end; None of one that diverged. UserError for one that has not ended."""
    if require_ended(run, launch_of(run.parent, run.name), EXPERIMENT) == DIVERGED:
        return None
    losses = [line[LOSS] for line in lines_of(run) if LOSS in line]
    if not losses:
        raise UserError(f"{run} has no validation loss: evaluation.path must be set, as in {EXPERIMENT}.yaml.")
    return losses[-1]


def read() -> dict[str, Any]:
    """The recorded losses by optimizer and rate, and the seed of the runs. UserError if they are not recorded."""
    path = Study.of("optimizers").folder / RATES
    if not path.is_file():
        raise UserError(f"{path} is missing: `python -m demo.evidence rates` records the learning rates first.")
    return json.loads(path.read_text(encoding="utf-8"))


def best(losses: dict[str, dict[str, float | None]]) -> dict[str, float]:
    """The rate with the lowest validation loss, by optimizer. UserError if all runs of one diverged."""
    found = {}
    for name, of_it in losses.items():
        known = {rate: loss for rate, loss in of_it.items() if is_finite(loss)}
        if not known:
            raise UserError(f"no run of {name} in {EXPERIMENT}.yaml has a finite loss: give it lower rates there.")
        found[name] = float(min(known, key=known.__getitem__))
    return found


def table() -> list[list[str]]:
    """The recorded validation losses: a row for each optimizer, the lowest marked."""
    losses = read()["loss"]
    chosen, most = best(losses), max(map(len, losses.values()))
    rows = [[""] * (most + 1)]
    for name, of_it in losses.items():
        cells = [(rate, f"{rate}: {f'{loss:.5f}' if is_finite(loss) else 'diverged'}") for rate, loss in of_it.items()]
        shown = [f"**{cell}**" if math.isclose(float(rate), chosen[name]) else cell for rate, cell in cells]
        rows.append([name, *shown, *[""] * (most - len(shown))])
    return rows


def reading() -> str:
    """What the table of learning rates is."""
    return (
        f"Validation loss at each learning rate, of one run each with seed {read()['seed']}, which no run of the experiment has "
        f"(`make experiment EXP=configs/experiments/{EXPERIMENT}.yaml`); the lowest, in bold, is that of the experiment. The "
        "ranges lie around the best rate of AdamW, which had been found before with the same seed and held-out pictures: that "
        "favours the reference. Those of CAME, Lion and Prodigy were moved once, because the best of the first three was at an end "
        "of the range, or none of them trained."
    )
