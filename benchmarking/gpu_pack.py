"""Packs the wheels that a GPU machine without a package registry lacks, and installs them there.

    python -m benchmarking.gpu_pack .gpu                   # here, where pip reaches its registry
    make bench-gpu PY=python3                              # there: installs .gpu/wheels to .gpu/site-packages, and measures

The GPU machine has a Python with torch for CUDA, transformers, accelerate, numpy, pillow, pyarrow and psutil. The versions of the
rest are those of constraints.txt. Of bitsandbytes, which brings a library for every CUDA, only that of --cuda is kept: 15 MB in
all. Where it runs there is nothing else yet, so this module imports nothing that is not in the standard library.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from sushi_research.errors import UserError

ROOT = Path(__file__).parents[1]
# What a training imports beside what the GPU machine has, with what these packages need in turn.
PACKAGES = (
    *("diffusers", "peft", "bitsandbytes", "datasets", "dill", "multiprocess", "xxhash"),
    *("pydantic", "pydantic_core", "annotated-types", "typing-inspection", "typing_extensions"),
    *("importlib_metadata", "zipp", "lazy-importer"),
)
# Wheels of any of these run on a current Linux.
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014", "manylinux1")


def main(arguments: argparse.Namespace) -> None:
    """Packs or installs, as the command line says."""
    folder = Path(arguments.folder)
    if arguments.install:
        install(folder)
    else:
        pack(folder, arguments.python, arguments.cuda)


def pack(folder: Path, python: str, cuda: str) -> None:
    """Downloads the wheels for that version of Python to `folder/wheels`."""
    wheels = folder / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python, "--dest", str(wheels)]
    command += [word for name in PLATFORMS for word in ("--platform", f"{name}_x86_64")]
    if subprocess.run([*command, *versions(ROOT / "constraints.txt")]).returncode:
        raise UserError("pip could not download the wheels: see its message above.")
    for wheel in wheels.glob("bitsandbytes-*.whl"):
        slim(wheel, keep=(f"cuda{cuda}.so", "cpu.so"))
    size = sum(path.stat().st_size for path in wheels.iterdir())
    print(f"{wheels}: {len(list(wheels.iterdir()))} wheels, {size / 2**20:.0f} MiB; carry it beside the tracked files")


def versions(constraints: Path) -> list[str]:
    """The packages with the versions that constraints.txt states. UserError if one has none."""
    stated = {}
    for line in constraints.read_text().splitlines():
        name, equals, _ = line.partition("==")
        if equals:
            stated[_plain(name)] = line.strip()
    if missing := [name for name in PACKAGES if _plain(name) not in stated]:
        raise UserError(f"{constraints} has no version of {', '.join(missing)}: add it, or leave it out of PACKAGES.")
    return [stated[_plain(name)] for name in PACKAGES]


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_")


def slim(wheel: Path, keep: tuple[str, ...]) -> None:
    """Removes the libraries for other devices from a wheel of bitsandbytes, and from its list of files."""

    def is_kept(name: str) -> bool:
        return not (Path(name).name.startswith("libbitsandbytes_") and name.endswith(".so") and not name.endswith(keep))

    slimmed = wheel.with_suffix(".new")
    with (
        zipfile.ZipFile(wheel) as old,
        zipfile.ZipFile(slimmed, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new,
    ):
        if not any(name.endswith(f"_{keep[0]}") for name in old.namelist()):
            slimmed.unlink()
            raise UserError(f"{wheel.name} has no library *_{keep[0]}: give --cuda a version that it has.")
        for item in filter(lambda item: is_kept(item.filename), old.infolist()):
            data = old.read(item)
            if item.filename.endswith(".dist-info/RECORD"):
                data = b"".join(line for line in data.splitlines(True) if is_kept(line.decode().partition(",")[0]))
            new.writestr(item, data, zipfile.ZIP_DEFLATED)
    os.replace(slimmed, wheel)


def install(folder: Path) -> None:
    """Installs the wheels of `folder` to `folder/site-packages`, once, without a registry."""
    # The name matters: dill pickles modules from elsewhere by value, which datasets cannot.
    target = folder / "site-packages"
    wheels = sorted((folder / "wheels").glob("*.whl"))
    if not wheels or target.exists():
        return
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--disable-pip-version-check",
    ]
    if subprocess.run([*command, "--target", str(target), *map(str, wheels)]).returncode:
        raise UserError(f"pip could not install the wheels of {folder}: see its message above.")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Packs wheels for a GPU machine without a registry.", allow_abbrev=False
    )
    parser.add_argument("folder", nargs="?", default=".gpu", help="the folder to make (default: .gpu)")
    parser.add_argument("--python", default="3.12", help="version of the GPU machine's Python (default: 3.12)")
    parser.add_argument("--cuda", default="130", help="version of its torch's CUDA, without the dot (default: 130)")
    parser.add_argument("--install", action="store_true", help="there: install the wheels of the folder")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        main(parse())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
