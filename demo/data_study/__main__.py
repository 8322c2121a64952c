"""The data study: its page, from the runs of configs/experiments/tags.yaml and stamp.yaml.

make experiment EXP=configs/experiments/tags.yaml
make experiment EXP=configs/experiments/stamp.yaml
python -m demo.data_study         # keeps the records of the runs that are here, draws pictures with them, and writes the page
python -m demo.data_study page    # the page alone, from what is recorded
"""

from __future__ import annotations

import sys

from demo.data_study import page, results
from sushi_research.config.process import begin, run_main
from sushi_research.training.run import quiet_libraries


def main(arguments: list[str]) -> int:
    """Writes docs/examples/data; returns the exit status."""
    if arguments not in ([], ["page"]):
        print("error: say python -m demo.data_study, or python -m demo.data_study page.", file=sys.stderr)
        return 2
    if not arguments:
        quiet_libraries()
        for study in results.studies().values():
            if study.is_trained():
                study.keep()
                page.draw(study)
        results.write_inputs()
    page.write()
    return 0


if __name__ == "__main__":
    begin()
    run_main(main, sys.argv[1:])
