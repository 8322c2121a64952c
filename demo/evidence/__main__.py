"""The pages about what the options do, from the runs of the experiments.

make experiment EXP=configs/experiments/objectives.yaml     # or night, optimizers, ema
python -m demo.evidence objectives          # keeps the records of the runs that are here, and writes the page
python -m demo.evidence objectives page     # the page alone, from what is recorded
python -m demo.evidence rates               # records the learning rates of optimizers_rates.yaml, and prints the best
python -m demo.evidence findings            # docs/findings.md, from all records
"""

from __future__ import annotations

import shutil
import subprocess
import sys

from demo.evidence import findings, page, rates
from demo.evidence.study import Study
from demo.evidence.texts import TEXTS
from demo.records import ROOT
from sushi_research.config.process import begin, run_main
from sushi_research.errors import UserError

# Of the averages that are made afterwards.
LENGTHS = ("0.03", "0.05", "0.08", "0.12", "0.16", "0.2", "0.25")


def main(arguments: list[str]) -> int:
    """Writes what the arguments name; returns the exit status."""
    match arguments:
        case ["findings"]:
            findings.write()
        case ["rates"]:
            for name, rate in rates.write().items():
                print(f"{name}: {rate:g}")
        case [name] | [name, "page"] if name in TEXTS:
            study = Study.of(name)
            if name == "optimizers":
                rates.read()  # its page needs them
            if len(arguments) == 1 and study.is_trained():
                study.keep()
                if name == "ema" and not study.diverged(study.reference):
                    _draw_lengths(study)
            if not study.is_recorded():
                raise UserError(
                    f"not all runs of {name} are recorded in {study.folder}: make experiment EXP=configs/experiments/{name}.yaml "
                    f"trains them, and python -m demo.evidence {name} records them."
                )
            page.write(name)
        case _:
            print(f"error: say python -m demo.evidence NAME: {', '.join(TEXTS)}, rates or findings.", file=sys.stderr)
            return 2
    return 0


def _draw_lengths(study: Study) -> None:
    """The picture of validation loss by length, of the reference's first run."""
    run = study.trained / study.names(study.reference)[0]
    words = [sys.executable, "scripts/reconstruct_ema.py", str(run), "--measure", "--length", *LENGTHS]
    subprocess.run(words, cwd=ROOT, check=True)
    shutil.copyfile(run / "ema_lengths" / "ema_lengths.png", study.folder / "lengths.png")


if __name__ == "__main__":
    begin()
    run_main(main, sys.argv[1:])
