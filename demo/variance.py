"""Measures how much more precise a comparison on the validation set is than plain validation, with two runs' adapters.

    python -m demo.variance sdxl RUN_A RUN_B

Plain validation uses a new timestep and new noise for each held-out image every time. The validation set stratifies the
timesteps and uses the same noise samples for every model. Both estimate the loss of A, its difference from the base, and the
difference between A and B, with the images fixed. The table shows the standard error that results from the noise samples alone.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from sushi_research import models
from sushi_research.adapters import loading
from sushi_research.caches.caches import open_caches, open_hash_cache, open_remembered
from sushi_research.caches.inputs import Inputs, fill_caches
from sushi_research.config.other_scripts import evaluation_config
from sushi_research.config.yaml12 import read_yaml
from sushi_research.data.training_data import read_data
from sushi_research.errors import UserError, first_line
from sushi_research.evaluation import validation_set
from sushi_research.models.loading import find_base
from sushi_research.progress import progress
from sushi_research.runs.run_folder import RunFolder
from sushi_research.training import identity_facts
from sushi_research.training.run import start_job

# Noise samples per image of a validation set, and the number of such sets. The unstratified samples are as many in total.
NOISE_SAMPLES, SETS = 8, 8


def loss_tables(architecture: str, runs: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """(unstratified, stratified): losses of the base and of each run, each [1 + runs, N, SETS, NOISE_SAMPLES].

    All models get the same noise samples.
    """
    import torch

    from sushi_research import objectives

    model = models.load(architecture)
    try:
        config = evaluation_config(models.ARCHITECTURES[architecture].config_class()).model_validate(
            read_yaml(runs[0] / "config.yaml")
        )
    except ValidationError as error:
        raise UserError(f"{runs[0]} is no {architecture} run of this version ({first_line(error)}).") from None
    job = start_job(config, model, __file__)
    hash_cache = open_hash_cache(config)
    base = find_base(config, model)
    data = read_data(job, open_remembered(config))
    if not data.held_out:
        raise UserError(f"{runs[0]} holds no images out: give runs with evaluation.held_out or evaluation.path.")
    caches = open_caches(job, base, hash_cache)
    inputs = Inputs(config, base, data, caches, hash_cache)
    val_set = identity_facts.validation_set_of(job, inputs, identity_facts.hashes_of(job, inputs)["base_model"]["unet"])
    assert val_set is not None
    fill_caches(job, inputs)
    text = model.load_text(base, job.device)
    pipeline = loading.load_pipeline(base, model, text, job.compute_dtype, job.device)
    loaded = loading.load_adapters(pipeline, [str(RunFolder(run, None).adapter) for run in runs])

    def losses(kind: str, noise_samples: int, repeats: int) -> np.ndarray:
        """Losses [N, repeats, noise_samples].

        Each repeat is a validation set with its own noise samples, because the image's name, which seeds them, contains the
        repeat.
        """
        work = [(index, repeat) for index in range(len(val_set.items)) for repeat in range(repeats)]
        shown = validation_set.predictions(
            [f"{val_set.names[index]} {kind} {repeat}" for index, repeat in work],
            noise_samples,
            lambda place: validation_set.example(val_set, work[place][0], model, caches, caches.text),
            model,
            pipeline.unet,
            base.prediction,
            device=job.device,
            rank=0,
            world=1,
            what=kind,
        )
        found = torch.zeros(len(work), noise_samples)
        for place, part, predicted, goal in shown:
            found[place, part] = objectives.mse_per_sample(predicted, goal).cpu()
        return found.reshape(len(val_set.items), repeats, noise_samples).double().numpy()

    unstratified, stratified = [], []
    for adapter in progress([None, *loaded], description="models", unit="model"):
        if adapter is not None:
            adapter.activate()
        # With one noise sample there is one stratum, so the timestep is sampled from the whole schedule.
        unstratified.append(
            losses("unstratified", 1, SETS * NOISE_SAMPLES).reshape(len(val_set.items), SETS, NOISE_SAMPLES)
        )
        stratified.append(losses("stratified", NOISE_SAMPLES, SETS))
        if adapter is not None:
            adapter.deactivate()
    return np.stack(unstratified), np.stack(stratified)


def variance(values: np.ndarray) -> float:
    """The variance of a mean over fixed images, from independent estimates for each image, [N, estimates]."""
    return float(values.var(axis=1, ddof=1).sum() / len(values) ** 2)


def variance_rows(unstratified: np.ndarray, stratified: np.ndarray) -> list[dict[str, Any]]:
    """A row for each validation method: UNet passes per image, and the variance of each of the three quantities.

    The arguments are the tables of `loss_tables` for the base and two runs.
    """
    base, a, b = 0, 1, 2
    single = unstratified.reshape(*unstratified.shape[:2], -1)
    several, strata = unstratified.mean(-1), stratified.mean(-1)

    def row(way: str, passes: int, table: np.ndarray, shared: bool) -> dict[str, Any]:
        found: dict[str, Any] = {"way": way, "passes": passes, "A": variance(table[a])}
        for name, other in (("A - base", base), ("A - B", b)):
            # If the noise samples are not shared, the errors are independent.
            found[name] = variance(table[a] - table[other]) if shared else variance(table[a]) + variance(table[other])
        return found

    return [
        row("plain: one fresh timestep and noise", 1, single, False),
        row("plain, eight noise samples", NOISE_SAMPLES, several, False),
        row("stratified timesteps, fresh noise", NOISE_SAMPLES, strata, False),
        row("shared noise samples, not stratified", NOISE_SAMPLES, several, True),
        row("the validation set: shared and stratified", NOISE_SAMPLES, strata, True),
    ]


def describe(rows: list[dict[str, Any]]) -> str:
    """A Markdown table: standard errors, and by which factor the variance is smaller than plain validation's at equal cost."""
    plain = rows[1]
    lines = [
        "| Validation | UNet passes per image | A | A - base | A - B |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = []
        for name in ("A", "A - base", "A - B"):
            cells.append(f"{row[name] ** 0.5:.2g} ({plain[name] / row[name]:.3g}x)")
        lines.append(f"| {row['way']} | {row['passes']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Runs the command; returns the exit status."""
    if len(arguments) != 3 or arguments[0] not in models.ARCHITECTURES:
        named = " or ".join(models.ARCHITECTURES)
        print(f"error: say python -m demo.variance ARCHITECTURE RUN_A RUN_B, with {named}.", file=sys.stderr)
        return 2
    runs = [Path(argument) for argument in arguments[1:]]
    for run in runs:
        if not (adapter := RunFolder(run, None).adapter).is_file():
            print(f"error: {run} has no {adapter.name}: give the folders of two finished runs.", file=sys.stderr)
            return 2
    try:
        tables = loss_tables(arguments[0], runs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    difference = (tables[1][1] - tables[1][2]).mean()
    print(
        f"{tables[0].shape[1]} images; A - B is {difference:+.2g}. Standard error from the noise samples alone (variance against"
    )
    print("plain validation at equal cost):\n")
    print(describe(variance_rows(*tables)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
