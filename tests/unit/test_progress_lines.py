"""Progress is told in plain lines where there is no terminal, and as bars where there is one."""

import io
import pty
import re
import struct
import sys
from fcntl import ioctl
from termios import TIOCSWINSZ
from types import SimpleNamespace

import pytest
import tqdm.std
from tqdm import tqdm as library_bar

from sushi_research.progress import SECONDS, Lines, bars_of_libraries, on_terminal, progress
from sushi_research.training.length import Due, Interval
from sushi_research.training.training_bar import SMOOTHING, TrainingBar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """The time that bars see: `clock[0]`, in seconds."""
    now = [1000.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    return now


@pytest.fixture
def lines(capsys):
    """The lines on stderr up to now, without their time stamps."""

    def read():
        printed = capsys.readouterr().err
        assert not re.search(r"[^\n\x20-\x7e]", printed), "a control code"
        return [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", "", line) for line in printed.splitlines()]

    return read


def test_a_line_every_thirty_seconds_and_one_at_the_end(clock, lines):
    for number in progress(range(100), description="encoding images", unit="image"):
        clock[0] += 1.0
        if number == 20:
            library_bar.write("between", file=sys.stderr)  # has nothing to clear, and adds no line
    first, *others = lines()
    assert first == "between"
    assert others == [
        "encoding images: 30 of 100 (30%), 1 image/s, 01:10 left",
        "encoding images: 60 of 100 (60%), 1 image/s, 00:40 left",
        "encoding images: 90 of 100 (90%), 1 image/s, 00:10 left",
        "encoding images: 100 of 100 (100%), 1 image/s, in 01:40",
    ]


def test_short_work_and_hidden_work_print_nothing(clock, lines):
    for _ in progress(range(29), description="short", unit="image"):
        clock[0] += 1.0
    for _ in progress(range(100), description="hidden", unit="image", disable=True):
        clock[0] += 1.0
    assert lines() == []


def test_bytes_slow_work_and_work_that_is_stopped(clock, lines):
    with progress(total=4 * 2**30, description="hashing", unit="B", scale=True) as bar:
        clock[0] += SECONDS
        bar.update(2**30)
    with progress(total=10, initial=2, description="training", unit="step") as bar:
        clock[0] += 2 * SECONDS
        bar.set_postfix_str("epoch 1.0 of 2.0", refresh=False)
        bar.update()
    assert lines() == [
        "hashing: 1.00G of 4.00G (25%), 34.1MB/s, 01:30 left",
        "hashing: 1.00G of 4.00G (25%), 34.1MB/s, in 00:30",
        "training: 3 of 10 (30%), 60 s/step, 07:00 left, epoch 1.0 of 2.0",
        "training: 3 of 10 (30%), 60 s/step, in 01:00, epoch 1.0 of 2.0",
    ]


def test_a_bar_of_the_hub_is_told_in_lines_too(clock, lines):
    with bars_of_libraries()(
        desc="x.safetensors", total=10, unit="B", unit_scale=True, disable=None, name="hub"
    ) as bar:
        clock[0] += SECONDS
        bar.update(5)
    assert len(lines()) == 2


def test_a_terminal_has_bars(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    bar = progress(range(3), description="encoding images", unit="image")
    assert not isinstance(bar, Lines) and bars_of_libraries() is None
    assert len(list(bar)) == 3 and "\r" in sys.stderr.getvalue()


def test_a_terminal_without_a_width_has_lines(monkeypatch):
    controller, terminal = pty.openpty()
    with open(terminal, "w") as stream, open(controller):
        monkeypatch.setattr(sys, "stderr", stream)
        for columns in (0, 80):
            ioctl(stream, TIOCSWINSZ, struct.pack("HHHH", 0, columns, 0, 0))
            assert on_terminal() == (columns > 0)


def test_the_training_bar_tells_epoch_smoothed_loss_and_samples(tmp_path, monkeypatch, capsys):
    due = Due(checkpoint=Interval(None), sample=Interval(4), evaluation=Interval(None))
    plan = SimpleNamespace(steps=20, items_per_epoch=8, global_batch_size=2, epochs=5.0, due=due)
    config = SimpleNamespace(sample=SimpleNamespace(enabled=True))
    job = SimpleNamespace(run=SimpleNamespace(samples=tmp_path), config=config, is_main=True)
    monkeypatch.setattr(sys, "stderr", Terminal())
    bar, losses, shown = TrainingBar(job, plan, 0), [0.5, 0.3, 0.7, 0.1, 0.9, 0.2], []
    (tmp_path / "step-00000000.png").touch()
    for step, loss in enumerate(losses, 1):
        if step == 5:
            (tmp_path / "step-00000004.png").touch()
        bar.update(step, loss)
        shown.append(bar._bar.postfix)
    bar.close()
    weights = [SMOOTHING**age for age in range(6)][::-1]
    mean = sum(weight * loss for weight, loss in zip(weights, losses, strict=True)) / sum(weights)
    assert shown[0] == "loss 0.5000, epoch 0.2/5.0, samples of step 0"
    assert shown[3].endswith("samples of step 0")
    assert shown[5] == f"loss {mean:.4f}, epoch 1.5/5.0, samples of step 4"
    # A path would not fit into the bar, so each is told once.
    told = [f"samples of step {step}: {tmp_path}/step-0000000{step}.png" for step in (0, 4)]
    assert capsys.readouterr().out.splitlines() == told
