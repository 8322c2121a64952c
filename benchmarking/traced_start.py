"""One start of a training script, or the libraries and weights alone, with the CPU seconds of each stage: a process of its own.

`benchmarking.first_step` starts it. Nothing heavy is imported here, so that the script's own imports are measured.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import sys
import time
from pathlib import Path
from typing import Any


def cpu_seconds() -> float:
    """CPU seconds of this process and of its children that ended, since its start."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def of_script(report: Path, script: str, words: list[str]) -> None:
    """Runs the script as a command and ends the process after its first step. `report` gets [stage, wall, CPU seconds], in order.

    A stage is counted from where the script enters it.
    """
    from sushi_research import progress

    enter, stages = progress.StageTimings.enter, []
    began = [time.time() - progress.seconds_of_process(), 0.0]

    def ended(name: str) -> None:
        now = [time.time(), cpu_seconds()]
        stages.append([name, *(after - before for before, after in zip(began, now, strict=True))])
        began[:] = now

    def traced(self: progress.StageTimings, name: str) -> None:
        ended(self.current)
        enter(self, name)
        if name == "training" and stages[-1][0] == "training":  # the second step begins
            _report(report, stages)

    progress.StageTimings.enter = traced
    sys.argv = [script, *words]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


def bare(report: Path, unet: Path, dtype: str, optimizer: str) -> None:
    """Imports the libraries that a training uses and reads the UNet's weights, and nothing else."""
    from sushi_research import progress

    began, stages = [time.time() - progress.seconds_of_process(), 0.0], []
    import accelerate  # noqa: F401
    import diffusers
    import numpy  # noqa: F401
    import peft  # noqa: F401
    import PIL.Image  # noqa: F401
    import torch
    import transformers

    if optimizer == "adamw8bit":
        import bitsandbytes  # noqa: F401
    diffusers.UNet2DConditionModel, transformers.CLIPTokenizer  # noqa: B018  lazily imported
    now = [time.time(), cpu_seconds()]
    stages.append(["libraries", now[0] - began[0], now[1]])
    from safetensors.torch import load_file

    weights = {name: value.to(getattr(torch, dtype), copy=True) for name, value in load_file(unet).items()}
    stages.append(["weights", time.time() - now[0], cpu_seconds() - now[1]])
    assert weights
    _report(report, stages)


def _report(path: Path, stages: list[Any]) -> None:
    path.write_text(json.dumps({"stages": stages, "modules": sorted(sys.modules)}))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    kind, path, *rest = sys.argv[1:]
    if kind == "bare":
        bare(Path(path), Path(rest[0]), *rest[1:])
    of_script(Path(path), rest[0], rest[1:])
