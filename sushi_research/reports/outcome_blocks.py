"""What the evaluations of a run say, for its page: which checkpoint to take, and what it learned, kept and memorised at each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from sushi_research.errors import some
from sushi_research.evaluation.memorisation import Memorised, memorised
from sushi_research.evaluation.outcomes import BINS, KEPT_LIMIT, LEARNED_BINS
from sushi_research.evaluation.result_arrays import NUM_TIMESTEPS
from sushi_research.reports import best_step, sample_series, thumbnails
from sushi_research.reports.best_step import BestStep, StepDifference
from sushi_research.reports.page import Block, Picture
from sushi_research.reports.run_outcomes import RunOutcomes
from sushi_research.reports.run_plots import StepMeans, means_of, outcome_panels
from sushi_research.runs.run_folder import RunFolder
from sushi_research.sampling import plots, sample_grids

# Prompts of each kind (held-out and neutral captions) whose pictures are shown.
MOST_ROWS = 6

WORDS = """\
Learned, kept and prior are means of log(loss / the base's loss) on the same image, timestep and noise: 0 is as the base, -0.1 is a
loss about 10 % lower, +0.1 one about 10 % higher. +- is a standard error over images (or captions).
Learned: on the held-out images, at timesteps (t) {learned}; lower is more. Each timestep bin is a column too.
Kept: on images that the base generated for neutral captions; above 0 something of what the base knew is lost. Prior: the same on
images of evaluation.prior_path. Drift: the mean squared distance of the predictions from the base's on the neutral captions.
Memorised: the AUC is how well the losses tell training images from held-out ones (0.5 not at all, 1 every one); the gap is the
held-out images' mean minus the training images'. It says that the adapter recognises its training images, not that it copies them.
Well below 0.5, the training images are of another kind than the held-out ones, such as prior images that are trained on: then it
says nothing, unless evaluation.prior_path is their folder.
Pictures: the distance of generated pictures from the held-out image of their caption (learned), and from the base's own picture of
the same caption and seed (kept).
MSE: the plain mean loss on the held-out images. Most of it is from the timesteps with the least noise, so it decides nothing.
"""
NOT_MEASURED = {
    "base_images": "kept is not measured: without evaluation.drift_captions, or in evaluations of an older version, there are no "
    "images of the base",
    "prior": "prior is not measured: evaluation.prior_path names images of what the base knows",
    "drift": "drift is not measured: evaluation.drift_captions is an empty list",
    "trained": "memorised is not measured: the evaluations are of an older version, or their results are gone",
    "pictures_learned": "pictures are not measured: evaluation.pictures says how many are drawn at each evaluation",
}


def blocks(
    run: RunFolder, state: str, outcomes: RunOutcomes, attempt: Callable[[Callable[[], Any], Any], Any]
) -> tuple[BestStep | None, list[Block]]:
    """The best step, and the blocks about the evaluations. `attempt(what, otherwise)` gives `otherwise` where `what` fails."""
    of_steps = attempt(outcomes.of_steps, None)
    best = attempt(lambda: best_step.best_step(of_steps) if of_steps else None, None)
    memorises = attempt(lambda: best_step.memorises_from(of_steps) if of_steps else None, None)
    of_memory = attempt(lambda: _memorised(outcomes), {})
    table = attempt(lambda: _table(outcomes, of_memory, best), [])
    drawn = attempt(lambda: _plots(outcomes, of_memory, best), {})
    panels = [Picture(data, f"{title} (95 % intervals)") for title, data in drawn.items()]
    words = WORDS.format(learned=" and ".join(map(_timesteps, LEARNED_BINS)))
    not_measured = [sentence for kind, sentence in NOT_MEASURED.items() if kind not in outcomes.arrays]
    found = [
        Block("heading", "Which checkpoint to take"),
        Block("lead", _measured_on(outcomes)),
        *_choice(run, state, outcomes, best, memorises),
        Block("heading", "Outcomes by step"),
        *([Block("panels", pictures=panels)] if panels else []),
        *([Block("table", rows=table)] if table else []),
        *([Block("list", items=not_measured)] if not_measured else []),
        Block("details", "What the words mean", items=[words]),
        *attempt(lambda: _drawn(run, outcomes, best), []),
    ]
    return best, [block for block in found if block.kind != "list" or block.items]


def _measured_on(outcomes: RunOutcomes) -> str:
    found = outcomes.arrays.get("validation")
    if found is None:
        return "There are no evaluations that can be read."
    images = "1 held-out image" if len(found.names) == 1 else f"{len(found.names)} held-out images"
    steps = "step 0 only" if found.steps == (0,) else f"{len(found.steps)} steps"
    return f"Evaluated at {steps} on {images} with {found.base.shape[1]} noise samples each."


def _choice(
    run: RunFolder, state: str, outcomes: RunOutcomes, best: BestStep | None, memorises: int | None
) -> list[Block]:
    """Which step is best, how sure that is, and from when on the run only memorises."""
    if best is None:
        return [Block("text", "There is no evaluation after step 0 with finite values, so no step is best.")]
    by = "learned"
    if "base_images" in outcomes.arrays:
        by += f", to which kept is added only as far as it is above {KEPT_LIMIT:g}"
    count = len(best.steps)
    among = "the only one evaluated" if count == 1 else f"the best of {count} evaluated steps"
    sure = "No other evaluated step is within one standard error of it." if count > 1 else ""
    if best.unclear:
        are = "are" if len(best.unclear) > 1 else "is"
        sure = f"This is not sure: {_steps(best.unclear)} {are} within one standard error of it."
    words = [f"Step {best.step} is {among}: by {by} (lower is better).", sure, _where(run, state, best.step)]
    items = [f"{'none' if best.unclear else 'better'}|{' '.join(filter(None, words))}"]
    if memorises is not None:
        items.append(
            f"worse|From step {memorises} on it only memorises: no later step has learned more by more than one standard error, "
            "and the gap between held-out and training images has grown by more than one."
        )
    elif "trained" in outcomes.arrays:
        items.append(
            "none|At no step did it begin only to memorise: it went on learning, or the gap between held-out and training images "
            "did not grow."
        )
    compared: dict[StepDifference, str] = {}
    for what, each in (
        ("the first evaluated step", best.against_first),
        ("the last", best.against_last),
        ("the next best", best.against_runner_up),
    ):
        if each is not None:
            compared[each] = f"{compared[each]} and {what}" if each in compared else what
    lines = [
        f"Step {best.step} minus step {each.other}, {what}: {_difference(each)}" for each, what in compared.items()
    ]
    if best.skipped:
        lines.append(
            f"{_steps(best.skipped).capitalize()} cannot be chosen: a value that decides is missing or not finite there."
        )
    if count > 1:
        lines.append(
            f"The best of {count} evaluations on one validation set looks better than it is, and the intervals do not allow for "
            "the choice: compare runs at the last step or at a step fixed beforehand, or evaluate on other images."
        )
    return [Block("result", items=items), Block("list", items=lines)]


def _where(run: RunFolder, state: str, step: int) -> str:
    """The adapter file of the best step."""
    for path in (run.best_adapter(step), run.step_adapter(step)):
        if path.is_file():
            return f"Its adapter file is {path.name}."
    if state == f"finished at step {step}":
        return f"Its adapter file is {run.adapter.name}."
    return "Its adapter file was not kept: that needs evaluation.keep_best, or a checkpoint at that step."


def _steps(steps: Iterable[int]) -> str:
    found = [str(step) for step in steps]
    return f"step{'s' if len(found) > 1 else ''} {some(found, 8)}"


def _difference(each: StepDifference) -> str:
    text = f"{each.value:+.3f}"
    if np.isfinite(each.standard_error):
        return f"{text} +- {each.standard_error:.2g} (95 % interval {each.low:+.3f} to {each.high:+.3f})."
    return f"{text}, without a standard error, which needs two held-out images and two neutral captions or more."


def _memorised(outcomes: RunOutcomes) -> dict[int, Memorised]:
    """The memorised outcome by step."""
    held_out, trained = outcomes.ratios("validation"), outcomes.ratios("trained")
    if held_out is None or trained is None:
        return {}
    found = {step: memorised(*each) for step, *each in zip(outcomes.steps, trained, held_out, strict=True)}
    return {step: each for step, each in found.items() if each is not None}


def _columns(outcomes: RunOutcomes) -> dict[str, StepMeans]:
    """The outcomes that were measured, by key, except memorised."""
    values = {"learned": outcomes.ratios("validation", LEARNED_BINS)}
    values |= {"kept": outcomes.ratios("base_images"), "prior": outcomes.ratios("prior")}
    values |= {"drift": outcomes.distances("drift")}
    values |= {"pictures learned": outcomes.ratios("pictures_learned")}
    values |= {"pictures kept": outcomes.distances("pictures_kept")}
    for timestep_bin in reversed(range(BINS)):
        values[f"t {_timesteps(timestep_bin)}"] = outcomes.ratios("validation", (timestep_bin,))
    values["MSE"] = outcomes.distances("validation")
    return {name: means_of(name, each) for name, each in values.items() if each is not None}


def _timesteps(timestep_bin: int) -> str:
    """The first and the last timestep of a bin."""
    return "-".join(str(NUM_TIMESTEPS * (timestep_bin + end) // BINS - end) for end in (0, 1))


def outcome_table(outcomes: RunOutcomes) -> list[list[str]]:
    """The outcomes of each evaluated step as text, a row for each, after a header; [] if there are none."""
    return _table(outcomes, _memorised(outcomes), None)


def _table(outcomes: RunOutcomes, of_memory: dict[int, Memorised], best: BestStep | None) -> list[list[str]]:
    columns = _columns(outcomes)
    forms = {"drift": ".3g", "pictures kept": ".3g", "MSE": ".5f"}
    rows = []
    for place, step in enumerate(outcomes.steps):
        row = {"step": f"{step} (best)" if best and step == best.step else str(step)}
        for name, means in columns.items():
            row[name] = _number(means.mean[place], means.error[place], forms.get(name, "+.3f"))
        if of_memory:
            found = of_memory.get(step)
            gap = found and _number(found.gap, found.gap_se, "+.3f")
            memory = {"memorised: AUC": found and f"{found.auc:.2f} ({found.low:.2f} to {found.high:.2f})", "gap": gap}
            names = [*row]
            at = next((names.index(name) for name in names if name.startswith(("pictures", "t "))), len(names))
            row = dict(
                [*[*row.items()][:at], *((key, value or "") for key, value in memory.items()), *[*row.items()][at:]]
            )
        rows.append(row)
    return [[*rows[0]], *([*row.values()] for row in rows)] if rows else []


def _number(value: float, error: float | None, form: str) -> str:
    if not np.isfinite(value):
        return ""
    return f"{value:{form}}" + (f" +- {error:.2g}" if error is not None and np.isfinite(error) else "")


def _plots(outcomes: RunOutcomes, of_memory: dict[int, Memorised], best: BestStep | None) -> dict[str, bytes]:
    columns = _columns(outcomes)
    pick = lambda names: [columns[name] for name in names if name in columns]  # noqa: E731
    groups = {
        "learned, by timestep bin": [each for name, each in columns.items() if name.startswith("t ")],
        "kept": pick(("kept", "prior")),
        "drift": pick(("drift",)),
        **_memory_means(outcomes, of_memory),
        "pictures: log distance from held-out images, over the base's": pick(("pictures learned",)),
        "pictures: distance from the base's pictures": pick(("pictures kept",)),
    }
    pair = (columns["kept"], columns["learned"]) if {"kept", "learned"} <= columns.keys() else None
    return outcome_panels(outcomes.steps, best and best.step, pair, groups)


def _memory_means(outcomes: RunOutcomes, of_memory: dict[int, Memorised]) -> dict[str, list[StepMeans]]:
    if not of_memory:
        return {}
    nothing = Memorised(*[np.nan] * 6)
    found = [of_memory.get(step, nothing) for step in outcomes.steps]
    auc, low, high, gap = (np.array([getattr(each, name) for each in found]) for name in ("auc", "low", "high", "gap"))
    error = np.array([np.nan if each.gap_se is None else each.gap_se for each in found])
    return {
        "memorised: AUC (0.5: not told apart)": [StepMeans("AUC", auc, np.full(len(auc), np.nan), low, high)],
        "memorised: gap, +- 2 standard errors": [StepMeans("gap", gap, error, gap - 2 * error, gap + 2 * error)],
    }


def _drawn(run: RunFolder, outcomes: RunOutcomes, best: BestStep | None) -> list[Block]:
    """The pictures of the evaluations: of the first prompts of each kind, those of the base (or of what the run starts from), the
    best and the last step."""
    steps = sorted({0, *outcomes.steps[-1:], *([best.step] if best else [])})
    folders = {step: sample_grids.step_folder(run.pictures, step) for step in steps}
    folders = {step: folder for step, folder in folders.items() if folder.is_dir()}
    first = "step 0" if run.starts_from_file() else "base"
    last = folders[max(folders)] if folders else None
    found = []
    for kind, what in (("learned", "held-out"), ("kept", "neutral")):
        names = sorted(path.name for path in last.glob(f"*-{kind}-*.png")) if last else []
        for name in names[:MOST_ROWS]:
            if any(plots.picture_problem(folder / name) for folder in folders.values()):
                continue
            shown = [
                Picture(thumbnails.of_picture(folder / name, sample_series.SIDES[0]), f"step {step}" if step else first)
                for step, folder in folders.items()
            ]
            found.append(Block("series", f"{sample_series.label_of(last / name)} ({what} caption)", pictures=shown))
    text = "Drawn at the evaluations, with the same prompt and seed in a row."
    return [Block("heading", "Pictures"), Block("lead", text), *found] if found else []
