"""Shared fixtures: tiny bases made once per test run, and a folder of real image files."""

import os

# Before torch is imported: two threads on a busy two-core machine make a tiny step twenty times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test may reach a model hub or W&B, whatever the machine is logged in to.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
# The launcher's choice must not leak from the shell into tests of the config's choice.
os.environ.pop("ACCELERATE_MIXED_PRECISION", None)

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# The same examples in every run, and no clock: a red test is a change of the code. HYPOTHESIS_PROFILE=default searches again.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

from sushi_research.models import ARCHITECTURES  # noqa: E402

# What shared code is tested on. What every architecture must fulfil is in models/test_conformance.py.
EXAMPLES = ("sd15", "sdxl")

# About how many CPU seconds the longest piece of a file takes that one worker runs alone: a group, or a single test.
# The longest go first, so that no worker is left with one at the end. Files that are not listed take a few seconds.
SECONDS = {
    "embedded/test_learning.py": 150,
    "faults/test_fault_injection.py": 60,
    "scripts/test_equivalence.py": 60,
    "scripts/test_any_base.py": 45,
    "scripts/test_launch.py": 35,
    "scripts/test_run_experiment.py": 30,
    "models/test_single_file.py": 25,
    "faults/test_hostile_bases.py": 15,
    "embedded": 15,
    "scripts": 10,
    "models": 5,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest first; the order within a file stays as it is."""
    tests = Path(__file__).parent

    def seconds(item: pytest.Item) -> float:
        path = item.path.relative_to(tests).as_posix()
        return SECONDS.get(path, SECONDS.get(path.partition("/")[0], 1))

    items.sort(key=seconds, reverse=True)


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> dict[str, Path]:
    """Tiny bases in diffusers format, by architecture. Tests must not write into them; `copy_base` is for that."""
    from testing.tiny_base import save_tiny_base

    folder = tmp_path_factory.mktemp("bases")
    return {name: save_tiny_base(folder / name, name) for name in ARCHITECTURES}


@pytest.fixture(params=EXAMPLES)
def architecture(request) -> str:
    return request.param


@pytest.fixture
def base_folder(bases, architecture) -> Path:
    return bases[architecture]


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Seven captioned image files of five shapes and three formats."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    shapes = [(64, 64), (96, 64), (64, 96), (130, 70), (64, 64), (100, 100), (96, 64)]
    for number, (width, height) in enumerate(shapes):
        rng = np.random.default_rng(number)
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        suffix = (".png", ".jpg", ".webp")[number % 3]
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{number}{suffix}")
        (folder / f"{number}.txt").write_text(f"picture {number} of {('a', 'b')[number % 2]}\n")
    return folder
