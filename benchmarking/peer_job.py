"""Runs one training script, ours or another program's, and records its steps: a process of its own, with either one's Python.

`benchmarking.peer` starts it. Nothing of this repository is imported here: the peer's Python need not have it. The script runs
as it is; what is added costs nothing that matters: the time of each optimizer step, and a reference to each loss.
"""

import importlib.machinery
import importlib.util
import json
import os
import runpy
import sys
import time
from pathlib import Path


def main(report: Path, script: str, words: list) -> None:
    """Runs `script` with the command line `words`; `report` gets its steps, losses and peak of GPU memory."""
    steps, losses = [], []

    def watch(accelerator) -> None:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        backward = accelerator.Accelerator.backward

        def recorded(self, loss, **options):
            losses.append(loss.detach())
            return backward(self, loss, **options)

        register_optimizer_step_post_hook(lambda *_: steps.append((time.perf_counter(), time.process_time())))
        accelerator.Accelerator.backward = recorded
        accelerator.Accelerator.init_trackers = lambda *_, **__: None  # neither side writes for TensorBoard or W&B

    sys.meta_path.insert(0, _AfterImport("accelerate.accelerator", watch))
    if folder := os.environ.get("STAND_INS"):
        # transformers asks for torchvision when it likes; once the script has the stand-in, it would take that for the real one.
        asks = "transformers.utils.import_utils"
        sys.meta_path.insert(0, _AfterImport(asks, lambda module: module.is_torchvision_available()))
        sys.meta_path.insert(0, _ForTheScript(folder, Path(script).resolve().parent))
    sys.argv, sys.path[0] = [script, *words], str(Path(script).parent)
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        import torch

        cuda = torch.cuda.is_available()
        found = {
            "steps": steps,
            "losses": [float(loss) for loss in losses],
            "allocated": torch.cuda.max_memory_allocated() if cuda else None,
            "reserved": torch.cuda.max_memory_reserved() if cuda else None,
        }
        report.write_text(json.dumps(found))


class _AfterImport:
    """Calls a function with a module after the script has imported it: importing it here would change what is measured."""

    def __init__(self, name: str, then) -> None:
        self.name, self.then = name, then

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module) -> None:
            run(module)
            self.then(module)

        spec.loader.exec_module = exec_module
        return spec


class _ForTheScript:
    """Finds torchvision for the script and the modules beside it, not for libraries that look whether it is installed."""

    def __init__(self, folder: str, beside: Path) -> None:
        self.folder, self.beside = folder, beside

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] != "torchvision":
            return None
        frame = sys._getframe(1)
        while "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        file = Path(frame.f_code.co_filename).resolve()
        # A virtual environment may lie beside the script.
        of_the_script = file.is_relative_to(self.beside) and "site-packages" not in file.parts
        if not (of_the_script or frame.f_globals["__name__"].startswith("torchvision")):
            return None
        return importlib.machinery.PathFinder.find_spec(name, path or [self.folder])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
