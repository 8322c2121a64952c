"""Counts the Python functions that a step calls: most of the time of a step that waits for its launches.

The number is exact for given versions of Python and of the libraries, and for those only.
"""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Functions that only observing and fake tensors call: those of the modes, their hooks, and fake tensors and what follows them.
_TORCH = Path(torch.__file__).parent
_NOT_THE_STEP = tuple(
    str(path)
    for path in (
        Path(__file__),
        Path(__file__).with_name("fake_step.py"),
        Path(__file__).parents[1] / "sushi_research/planning",
        Path(weakref.__file__),
        _TORCH / "_library",
        _TORCH / "_subclasses",
        _TORCH / "utils/weak.py",
    )
)


class PythonCalls(TorchDispatchMode):
    """Counts calls of Python functions in this thread while it is active: `calls`. It must be the innermost dispatch mode.

    What runs below the dispatcher is left out, so fake tensors, which are written in Python, give the count of real ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self._counts: dict[CodeType, bool] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise torch wraps __torch_dispatch__ in functions that would count

    def __enter__(self) -> Self:
        super().__enter__()
        # A collection calls finalizers of whatever there was before, whenever it happens to begin.
        gc.collect()
        gc.disable()
        sys.setprofile(self._note)
        return self

    def __exit__(self, *error: Any) -> None:
        sys.setprofile(None)
        gc.enable()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        sys.setprofile(None)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            sys.setprofile(self._note)

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            code = frame.f_code
            counts = self._counts.get(code)
            if counts is None:
                counts = self._counts[code] = not code.co_filename.startswith(_NOT_THE_STEP)
            self.calls += counts
