"""The study of measures: do the numbers that a run records follow the pictures that its adapter makes?

    python -m demo.study        # everything that is missing, then the page (docs/examples/measure); can be interrupted at any time
    python -m demo.study page   # the page alone, from the recorded results

A setting whose recorded results are complete is not trained again, so the study can be continued on another machine. To repeat one,
remove its file in docs/examples/measure.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from demo.study import page, results, topping
from demo.study.recipes import SETTINGS, Setting, recipes
from sushi_research.progress import progress

# One thread each: two settings at a time on two cores.
WORKERS = 2


def main(arguments: list[str]) -> int:
    """Runs the study; returns the exit status."""
    if arguments not in ([], ["page"]):
        print("error: say python -m demo.study, or python -m demo.study page.", file=sys.stderr)
        return 2
    if arguments == ["page"]:
        page.write()
        return 0
    todo = [setting for setting in SETTINGS if not results.is_complete(setting)]
    stages = sum(len(stages_of(setting)) for setting in todo)
    with ThreadPoolExecutor(WORKERS) as pool, progress(total=stages, description="the study", unit="stage") as bar:
        failed = [name for name in pool.map(lambda setting: complete(setting, bar), todo) if name]
    if failed:
        print(f"error: {', '.join(failed)} failed; the logs next to their results say why.", file=sys.stderr)
        return 1
    topping.main()
    results.write_inputs()
    page.write()
    return 0


def stages_of(setting: Setting) -> list[list[str]]:
    """The modules that a setting runs one after the other, with their arguments."""
    stages = [["demo.study.train", setting.name, recipe] for recipe in recipes(setting)]
    return [*stages, ["demo.study.collect", setting.name]]


def complete(setting: Setting, bar: Any) -> str:
    """Trains, scores and measures what a setting lacks, and records it; returns what failed, "" if nothing."""
    setting.folder.mkdir(parents=True, exist_ok=True)
    for stage in stages_of(setting):
        log = setting.folder / f"{'-'.join(stage[1:])}.log"
        with Path(log).open("ab") as output:
            command = [sys.executable, "-m", *stage]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            if subprocess.run(command, stdout=output, stderr=output, env=environment).returncode:
                return f"{' '.join(stage)} (log: {log})"
        bar.update()
    results.record(setting)
    return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
