"""Trains the bases from scratch in about 105 minutes on two cores; running it again resumes.

python -m demo.make_base                   # writes demo/base; checkpoints and images are in build/bases
python -m demo.make_base --folder FOLDER   # works in FOLDER; the finished bases are FOLDER/sdxl, FOLDER/sd15 and FOLDER/sd15_v
python -m demo.make_base --only sd15_v     # the third base alone, from demo/base/sd15
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from demo.make_base.zero_snr import NAME as ZERO_SNR
from demo.painter import BASES

BUILD = Path("build/bases")
ARCHITECTURES = ("sdxl", "sd15")
# accelerate starts two processes on a CPU only with --multi_gpu.
LAUNCH = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision bf16 --dynamo_backend no"


def main(folder: Path, target: Path | None, only_zero_snr: bool = False) -> int:
    """Runs the stages that are not finished, scores the bases and copies them to `target` if it is given.

    `only_zero_snr`: only the stages of the third base, which starts from demo/base/sd15.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if only_zero_snr:
        shutil.copytree(BASES / "sd15", folder / "sd15", dirs_exist_ok=True)
    stages: tuple[list[tuple[str, list[str]]], ...] = (
        [("vae", [*LAUNCH.split(), "-m", "demo.make_base.vae", str(folder)])],
        [("text", ["-m", "demo.make_base.text", str(folder)])],
        [(f"unet_{name}", ["-m", "demo.make_base.unet", name, str(folder)]) for name in ARCHITECTURES],
        [(f"score_{name}", ["-m", "demo.make_base.score", name, str(folder)]) for name in ARCHITECTURES],
        [(f"unet_{ZERO_SNR}", ["-m", "demo.make_base.zero_snr", str(folder)])],
        [(f"score_{ZERO_SNR}", ["-m", "demo.make_base.score", ZERO_SNR, str(folder)])],
    )
    made = (ZERO_SNR,) if only_zero_snr else (*ARCHITECTURES, ZERO_SNR)
    if only_zero_snr:
        stages = stages[-2:]
    for together in stages:
        todo = [(name, words) for name, words in together if not (folder / f"{name}.json").is_file()]
        started = [subprocess.Popen([sys.executable, *words], env=_one_thread()) for _, words in todo]
        failed = [name for (name, _), process in zip(todo, started, strict=True) if process.wait() != 0]
        if failed:
            print(f"error: {', '.join(failed)} did not finish; the same command continues it", file=sys.stderr)
            return 1
    for name in made:
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
    parser.add_argument("--only", choices=[ZERO_SNR], help="train this base alone")
    given = parser.parse_args()
    sys.exit(main(given.folder or BUILD, None if given.folder else BASES, given.only is not None))
