"""Shared fixtures: tiny bases, made once per test run, and a folder of image files."""

import functools
import gc
import os
import signal

# Before torch is imported: two threads on a busy two-core machine make a tiny step twenty times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test may reach a model hub or W&B, whatever the machine is logged in to.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
# The launcher's precision must not leak from the shell into tests of the config's precision.
os.environ.pop("ACCELERATE_MIXED_PRECISION", None)

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# The libraries leave a million objects, and walking them took a seventh of the tests' time. So the collector runs less often, and
# what is there after a process's first test is left out (`signal_handlers`).
gc.set_threshold(20_000, 20, 20)

# The same examples in every run and no deadline, so a test fails only if the code changed. HYPOTHESIS_PROFILE=default
# searches for new examples.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

from sushi_research import stopping  # noqa: E402
from sushi_research.models import ARCHITECTURES  # noqa: E402

# Shared code is tested with these architectures. models/test_conformance.py tests every architecture.
EXAMPLES = ("sd15", "sdxl")

# About how many CPU seconds the longest part of a file takes that one worker must run: a group, or a single test.
# The longest parts run first, so that none of them is left for one worker at the end. Unlisted files take a few seconds.
SECONDS = {
    "embedded/test_learning.py": 150,
    "faults/test_fault_injection.py": 60,
    "scripts/test_equivalence.py": 60,
    "scripts/test_any_base.py": 45,
    "scripts/test_launch.py": 35,
    "scripts/test_run_experiment.py": 30,
    "scripts/test_basic_lora.py": 25,
    "models/test_single_file.py": 25,
    "faults/test_hostile_bases.py": 15,
    "fuzz/test_fuzz.py": 15,
    "embedded": 15,
    "scripts": 10,
    "models": 5,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts the longest tests first; the order within a file does not change."""
    tests = Path(__file__).parent

    def seconds(item: pytest.Item) -> float:
        path = item.path.relative_to(tests).as_posix()
        return SECONDS.get(path, SECONDS.get(path.partition("/")[0], 1))

    items.sort(key=seconds, reverse=True)


@functools.cache
def _leave_out_what_is_there() -> None:
    """Once in a process. Asking gc.get_freeze_count() each time walks all that is left out: 0.15 s after each test."""
    gc.freeze()


@pytest.fixture(autouse=True)
def signal_handlers():
    """A script sets its signal handlers, and stops the garbage collector until it runs (`process.begin`); a test must not.

    Nor may the signal of one test count as the first of two that belong together in the next.
    """
    stopping._Request.at = None
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    gc.enable()
    _leave_out_what_is_there()


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> dict[str, Path]:
    """Tiny bases in diffusers format, by architecture. Tests must not write into them; use `copy_base` for that."""
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
