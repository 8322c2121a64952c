"""Draws the pictures of docs/guides: short trainings on the tiny SDXL base, one good and two that went wrong.

python -m demo.guide_pictures build/guides docs/images      # about six minutes of one core; continues where it was interrupted

The subject is the demo's star plate. Each picture has prompts as rows; columns are the base and the steps of the run.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image

from demo.concepts import PHOTOS
from demo.drawing import Scene, draw
from sushi_research.experiments.experiment import written
from sushi_research.files import write_image
from sushi_research.sampling import plots

ROOT = Path(__file__).parents[1]
# Two that no photo shows, with the new word, and two that the base knew.
PROMPTS = (
    "two tuna maki on a star plate",
    "one octopus temaki on a star plate",
    "one tuna nigiri on a blue plate",
    "two shrimp maki on a wooden board",
)
# Of each picture: what differs from the demo's config of the star plate.
RUNS = {
    "guide_learned": {"sample.every": 120},
    # 16 photos again and again, without the prior images, at three times the learning rate.
    "guide_over_trained": {"train.steps": 240, "sample.every": 60, "optimizer.lr": 5e-3, "data.path": "photos only"},
    # A learning rate for another kind of training: that of a full fine-tuning.
    "guide_nothing_learned": {"train.steps": 60, "sample.every": 30, "optimizer.lr": 1e-6},
}


def photos_only(folder: Path) -> Path:
    """A copy of the star's photos and captions without the folder of prior images."""
    target = folder / "photos"
    target.mkdir(parents=True, exist_ok=True)
    for path in (PHOTOS / "star").iterdir():
        if path.is_file():
            shutil.copy(path, target)
    return target


def train(name: str, changes: dict[str, object], folder: Path) -> Path:
    """Trains the run `name`, or continues it. Returns its folder of samples."""
    settings = {
        "sample.prompts": list(PROMPTS),
        "checkpoint.every": None,
        "tracking.wandb": "off",
        "cache.folder": str(folder / "cache"),
        "run.folder": str(folder / "runs"),
        "run.name": name,
        **changes,
    }
    if settings.get("data.path") == "photos only":
        settings["data.path"] = str(photos_only(folder))
    configs = ["--config", "configs/demo_sdxl.yaml", "--config", "configs/demo/star.yaml"]
    words = [*configs, *(f"--{key}={written(value)}" for key, value in settings.items())]
    subprocess.run([sys.executable, "scripts/train_sdxl_lora.py", *words], cwd=ROOT, check=True)
    return folder / "runs" / name / "samples"


def picture(samples: Path) -> Image.Image:
    """The samples of a run: prompts as rows; the base, each step and the right picture as columns."""
    steps = sorted(path for path in samples.iterdir() if path.is_dir())
    rows = []
    for number, prompt in enumerate(PROMPTS):
        images = [Image.open(next(step.glob(f"{number:02d}-seed*.png"))).convert("RGB") for step in steps]
        scene = Scene.from_caption(prompt)
        assert scene is not None
        rows.append([*images, draw(scene)])
    labels = ["base", *(f"step {int(step.name.rpartition('-')[2])}" for step in steps[1:]), "as it should be"]
    return plots.grid(rows, PROMPTS, labels)


def main(folder: Path, images: Path) -> None:
    """Trains what is missing in `folder` and writes the pictures into `images`."""
    for name, changes in RUNS.items():
        samples = train(name, changes, folder.resolve())
        drawn = picture(samples)
        # The cells are twice the size of the base's pictures. JPEG has a fifth of a PNG's size.
        smaller = drawn.resize((drawn.width * 3 // 5, drawn.height * 3 // 5), Image.Resampling.LANCZOS)
        write_image(images / f"{name}.jpg", smaller, quality=88)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m demo.guide_pictures WORK_FOLDER PICTURES_FOLDER")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
