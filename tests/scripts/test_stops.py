"""A signal outside the training steps: one line says what is kept, and it is kept."""

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file
from script_runs import Trainer, assert_equal, script

from sushi_research.caches import encoding
from sushi_research.config.process import run_main
from sushi_research.evaluation import validation_set
from sushi_research.sampling import sample_grids

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="POSIX signals"),
    pytest.mark.parametrize("architecture", ["sd15"]),  # the scripts share every word
]


@pytest.fixture(autouse=True)
def in_the_foreground():
    """In a job of a shell's background SIGINT is ignored, and under nohup SIGHUP, and so they would stay."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def stopped(capfd) -> Callable[..., tuple[Any, str]]:
    """Runs a main function; gives its exit status and its last line on stderr."""

    def run(main: Callable[[Any], int], config: Any) -> tuple[Any, str]:
        capfd.readouterr()
        status = 0
        try:
            run_main(main, config)
        except SystemExit as ended:
            status = ended.code
        printed = capfd.readouterr().err
        assert "Traceback" not in printed
        return status, printed.replace("\r", "\n").rstrip("\n").rpartition("\n")[2]

    return run


@pytest.fixture
def signal_at(monkeypatch) -> Callable[..., list[int]]:
    """Replaces a function by one that sends a signal to this process in its n-th call; gives the list of its calls."""

    def replace(module: Any, name: str, call: int, number: int, instead: Callable[..., Any] | None = None) -> list[int]:
        real, calls = instead or getattr(module, name), []

        def watched(*arguments: Any, **options: Any) -> Any:
            calls.append(len(calls) + 1)
            if len(calls) == call:
                os.kill(os.getpid(), number)
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, watched)
        return calls

    return replace


def test_what_was_encoded_is_kept(trainer: Trainer, stopped, signal_at, tmp_path):
    main, config = script("cache_dataset").main, trainer.config("x", {"cache.folder": str(tmp_path / "own")})
    calls = signal_at(encoding, "encode_images", 4, signal.SIGHUP)
    line = f"SIGHUP while caching: what is encoded is kept in {tmp_path / 'own'}; the same command again continues"
    assert stopped(main, config) == (129, line)
    assert stopped(main, config)[0] == 0
    assert len(calls) == 4 + 4, "three of seven were kept"


@pytest.mark.slow
def test_an_evaluation_that_is_stopped_costs_no_step(trainer: Trainer, stopped, signal_at):
    changes = {
        "evaluation.held_out": 0.3,
        "evaluation.every": 2,
        "checkpoint.every": 100,
        "evaluation.noise_samples": 4,
    }
    config = trainer.config("middle", changes)
    # At step 0 the base and the adapter, on held-out and on training images; then the adapter at step 2.
    signal_at(validation_set, "losses", 5, signal.SIGINT)
    folder = trainer.folder("middle")
    line = f"the checkpoint of step 2 is kept in {folder}; the same command again continues from there"
    assert stopped(trainer.script.main, config) == (130, f"SIGINT while evaluating: {line}")
    assert trainer.checkpoint("middle").step == 2
    assert "Stopped while evaluating at step 2 of 3." in (folder / "report.html").read_text()
    assert stopped(trainer.script.main, config)[0] == 0
    assert [record["step"] for record in trainer.metrics("middle") if "evaluation/loss" in record] == [0, 2, 3]


def test_before_the_first_and_after_the_last_step(trainer: Trainer, stopped, signal_at, caches):
    config = trainer.config("ends", {"train.steps": 1, "sample.enabled": True, "sample.prompts": ["a cat"]})
    image = [Image.new("RGB", (64, 64))]
    signal_at(sample_grids, "generate_images", 1, signal.SIGTERM, lambda *_: image)
    line = f"SIGTERM while sampling: what is encoded is kept in {caches}; the same command again continues"
    assert stopped(trainer.script.main, config) == (143, line)
    page = trainer.folder("ends") / "report.html"
    assert "Stopped while sampling at step 0 of 1." in page.read_text()
    signal_at(sample_grids, "generate_images", 2, signal.SIGTERM, lambda *_: image)
    adapter = trainer.folder("ends") / "ends.safetensors"
    line = f"SIGTERM while sampling: the adapter {adapter} is written; the same command again adds what is missing"
    assert stopped(trainer.script.main, config) == (143, line)
    assert "Stopped while sampling at step 1 of 1." in page.read_text()
    written = load_file(adapter)
    assert stopped(trainer.script.main, config)[0] == 0
    assert len(list((trainer.folder("ends") / "samples").glob("step-*.png"))) == 2
    assert_equal(load_file(adapter), written)
