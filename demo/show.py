"""The last part of the demo: shows what the adapter learned in an image, a small table and a report.

python -m demo.show runs/demo_sdxl_star
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from demo.checker import Score
from demo.concepts import Concept
from demo.drawing import Scene, draw
from demo.measure import Measured, checker_of, measure
from demo.report import additions
from demo.scoring import concept_of, config_of
from sushi_research.errors import UserError
from sushi_research.files import write_image, write_json
from sushi_research.reports import run_page
from sushi_research.runs.run_folder import RunFolder
from sushi_research.sampling import plots
from sushi_research.training.run import quiet_libraries


def main(run: Path) -> None:
    """Scores the finished run in `run`, writes demo.png and demo.json into it, and its page again with the scores on top."""
    quiet_libraries()
    config = read_config(run)
    concept, base = concept_of(run, config), Path(config["model"]["base"])
    checker = checker_of(concept)
    before = measure(base, None, concept, checker)
    after = measure(base, RunFolder(run, None).adapter, concept, checker)
    write_image(run / "demo.png", progress_picture(run, config["sample"]["prompts"]))
    facts = summary(run, concept, before, after)
    folder = RunFolder(run, None)
    added = additions(concept, config, before, after, facts)
    run_page.write(folder, f"finished at step {folder.record()['finished_at']}", added)
    write_json(run / "demo.json", facts)
    print(table(facts))
    print(f"\n  picture  {run / 'demo.png'}\n  report   {run / 'report.html'} (open it in a browser)")
    architecture = json.loads(folder.plan.read_text())["architecture"]
    print(
        "\nnow your own photos: a folder of pictures with captions (docs/guides/character_lora.md), and on a machine with a GPU\n"
        f"  accelerate launch scripts/train_{architecture}_lora.py --config configs/{architecture}_lora.yaml --data.path FOLDER"
    )


def read_config(run: Path) -> dict[str, Any]:
    """Reads the resolved config of a finished demo run; UserError for anything else."""
    config = config_of(run)
    concept_of(run, config)
    if not config["sample"]["prompts"] or not config["sample"]["enabled"]:
        raise UserError(f"{run} is no run of the demo: it needs sample prompts and samples.")
    return config


def progress_picture(run: Path, prompts: list[str]) -> Image.Image:
    """The run's own samples with prompts as rows and steps as columns. The last column is a correct image of each prompt."""
    steps = sorted(path for path in (run / "samples").iterdir() if path.is_dir())
    rows = []
    for number, prompt in enumerate(prompts):
        images = [Image.open(next(step.glob(f"{number:02d}-seed*.png"))).convert("RGB") for step in steps]
        scene = Scene.from_caption(prompt)
        real = draw(scene) if scene else Image.new("RGB", images[0].size, "white")
        rows.append([*images, real])
    counts = [int(re.search(r"\d+$", step.name)[0]) for step in steps]
    labels = ["base", *[f"step {count}" for count in counts[1:-1]], f"final ({counts[-1]})", "real"]
    return plots.grid(rows, prompts, labels)


def summary(run: Path, concept: Concept, before: Measured, after: Measured) -> dict[str, Any]:
    """The numbers of the table: shares in 0..1, losses, seconds by stage, bytes of each file that training wrote."""
    fall, error = after.loss.fall_from(before.loss)
    return {
        "concept": concept.name,
        "title": concept.title,
        "loss": {"before": before.loss.mean, "after": after.loss.mean, "fall": fall, "standard_error_of_fall": error},
        "concept_right": [_shares(before.concept), _shares(after.concept)],
        "known_right": [_shares(before.known), _shares(after.known)],
        "seconds": json.loads((run / "stage_timings.json").read_text()),
        "files": {path.name: path.stat().st_size for path in sorted(run.glob("[!.]*")) if path.is_file()},
    }


def _shares(of_it: Score) -> dict[str, float]:
    words = {word: right / of_it.total for word, right in of_it.words.items()}
    return {"all": of_it.share, **words, "none": of_it.none / of_it.total}


def table(facts: dict[str, Any]) -> str:
    """The table for the terminal."""
    loss, concept, known = facts["loss"], facts["concept_right"], facts["known_right"]
    rows = (
        ("", "base", "with the adapter"),
        ("loss on unseen pictures", f"{loss['before']:.4f}", f"{loss['after']:.4f}"),
        ("the concept, drawn right", f"{concept[0]['all']:.0%}", f"{concept[1]['all']:.0%}"),
        ("the rest, drawn right", f"{known[0]['all']:.0%}", f"{known[1]['all']:.0%}"),
    )
    lines = [f"\n{facts['title']}"] + [f"  {name:<28}{before:>10}{after:>20}" for name, before, after in rows]
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in facts["seconds"].items())
    files = ", ".join(f"{name} {size / 1024:.0f} KB" for name, size in facts["files"].items())
    return "\n".join([*lines, "", f"  time     {seconds}", f"  files    {files}"])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("error: give the folder of a finished run of the demo, for example runs/demo_sdxl_star.")
    try:
        main(Path(sys.argv[1]))
    except UserError as error:
        sys.exit(f"error: {error}")
