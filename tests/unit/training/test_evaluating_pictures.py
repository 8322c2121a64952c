"""Out of memory while generating the pictures of a step is one sentence, raised where all processes hear of it."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from sushi_research.errors import UserError
from sushi_research.training import evaluating_pictures


def test_out_of_memory_has_advice_of_its_own(monkeypatch):
    heard = []

    @contextlib.contextmanager
    def main_process_writes():
        try:
            yield
        except UserError as error:
            heard.append(error)

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(evaluating_pictures, "_evaluate", out_of_memory)
    job = SimpleNamespace(is_main=True, main_process_writes=main_process_writes)
    evaluating_pictures.evaluate(job, None, None, 250)
    [said] = map(str, heard)
    assert said.startswith(
        "out of memory while generating the pictures of step 250: make them smaller with --sample.width"
    )
    assert said.endswith("or turn them off with --evaluation.pictures 0.")
    with pytest.raises(UserError, match="out of memory while generating the base's pictures: "):
        with evaluating_pictures.advice("generating the base's pictures"):
            out_of_memory()
