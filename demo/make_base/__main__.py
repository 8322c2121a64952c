"""Trains both bases from scratch in about 90 minutes on two cores; running it again resumes.

python -m demo.make_base                   # writes demo/base; checkpoints and images are in build/bases
python -m demo.make_base --folder FOLDER   # works in FOLDER; the finished bases are FOLDER/sdxl and FOLDER/sd15
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from demo.painter import BASES

BUILD = Path("build/bases")
ARCHITECTURES = ("sdxl", "sd15")
# accelerate starts two processes on a CPU only with --multi_gpu.
LAUNCH = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision bf16 --dynamo_backend no"


def main(folder: Path, target: Path | None) -> int:
    """Runs the stages that are not finished, scores the bases and copies them to `target` if it is given."""
    folder.mkdir(parents=True, exist_ok=True)
    stages = (
        [("vae", [*LAUNCH.split(), "-m", "demo.make_base.vae", str(folder)])],
        [("text", ["-m", "demo.make_base.text", str(folder)])],
        [(f"unet_{name}", ["-m", "demo.make_base.unet", name, str(folder)]) for name in ARCHITECTURES],
        [(f"score_{name}", ["-m", "demo.make_base.score", name, str(folder)]) for name in ARCHITECTURES],
    )
    for together in stages:
        todo = [(name, words) for name, words in together if not (folder / f"{name}.json").is_file()]
        started = [subprocess.Popen([sys.executable, *words], env=_one_thread()) for _, words in todo]
        failed = [name for (name, _), process in zip(todo, started, strict=True) if process.wait() != 0]
        if failed:
            print(f"error: {', '.join(failed)} did not finish; the same command continues it", file=sys.stderr)
            return 1
    for name in ARCHITECTURES:
        if target is not None:
            copy = target / f"{name}.new"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(folder / name, copy)
            shutil.rmtree(target / name, ignore_errors=True)
            copy.rename(target / name)
            print(f"written: {target / name}")
    return 0


def _one_thread() -> dict[str, str]:
    """Two processes of one thread are faster than one of two, and give the same numbers on all machines of the same kind."""
    return os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to work, and to leave the bases")
    given = parser.parse_args()
    sys.exit(main(given.folder or BUILD, None if given.folder else BASES))
