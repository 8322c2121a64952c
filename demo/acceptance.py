"""The record of a full demo training in demo/learned.json: what an adapter learned, from which base, photos and configs.

python -m demo.acceptance RUN    # a finished run of the demo's star, after demo.show (`make acceptance` does it all)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from demo.painter import BASES
from demo.records import ROOT, dependencies, write_record
from demo.show import read_config
from sushi_research.errors import UserError

RECORD = ROOT / "demo/learned.json"
# Every run of the test suite trains the other architecture's demo in full.
ARCHITECTURE, CONCEPT = "sd15", "star"
CODE = ("checker.py", "concepts.py", "drawing.py", "measure.py", "painter.py")


def inputs() -> list[Path]:
    """The base, the photos, the configs, and the code that measures. The trainer's own code is not among them: it changes
    daily, and the full training of the other architecture and a short one of this watch over it."""
    base = [path for path in (BASES / ARCHITECTURE).rglob("*") if path.suffix in (".json", ".safetensors", ".txt")]
    photos = [path for path in (ROOT / "demo/photos" / CONCEPT).rglob("*") if path.is_file()]
    configs = [ROOT / f"configs/demo_{ARCHITECTURE}.yaml", ROOT / f"configs/demo/{CONCEPT}.yaml"]
    return [*base, *photos, *configs, *(ROOT / "demo" / name for name in CODE)]


def main(run: Path) -> None:
    """Records the numbers in the run's demo.json. Raises UserError for what is no finished run of that demo."""
    config = read_config(run)
    if Path(config["model"]["base"]).name != ARCHITECTURE or Path(config["data"]["path"]).name != CONCEPT:
        raise UserError(
            f"{run} is not a run of the demo {CONCEPT} on demo/base/{ARCHITECTURE}, which is what is recorded."
        )
    if not (run / "demo.json").is_file():
        raise UserError(f"{run} holds no demo.json: `python -m demo.show {run}` writes it.")
    facts = json.loads((run / "demo.json").read_text())
    results = {name: facts[name] for name in ("loss", "concept_right", "known_right")}
    write_record(RECORD, dependencies(inputs()), results)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("error: give the folder of a finished run of the demo, for example runs/demo_sd15_star.")
    try:
        main(Path(sys.argv[1]))
    except UserError as error:
        sys.exit(f"error: {error}")
