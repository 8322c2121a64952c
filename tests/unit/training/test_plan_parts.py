"""The parts of a plan in words: device, repeats, samples, checkpoints and durations."""

from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

from sushi_research.data.buckets import BucketRule
from sushi_research.data.items import make_items
from sushi_research.data.samples import Sample
from sushi_research.runs import machine
from sushi_research.runs.measured import Measured
from sushi_research.training import plan_parts
from sushi_research.training.length import Interval
from sushi_research.training.plan_parts import CheckpointPlan, Repeats, SamplePlan


@pytest.mark.parametrize(
    ("every", "steps", "expected"),
    [
        (250, 250, "every 250 steps"),
        (1, 1, "every step"),
        ("1 epoch", Fraction(7, 2), "every 1 epoch (3.5 steps)"),
        (0.1, 1200, "every 0.1 of the run (1,200 steps)"),
        ("1 epoch", 1, "every 1 epoch (1 step)"),
    ],
)
def test_how_often(every, steps, expected):
    assert plan_parts.how_often(every, Interval(Fraction(steps))) == expected


def test_the_repeats_of_each_folder():
    names = {"10_cats/a.png": 10, "10_cats/b.png": 10, "2_reg/c.png": 2, "d.png": 1}
    samples = [Sample(name, name, "x", 64, 64, repeats, bytes) for name, repeats in names.items()]
    rule = BucketRule(resolution=64, step=32, min_side=32, max_side=128)
    found = plan_parts.repeats_by_folder(make_items(samples, rule)[0])
    assert found == (Repeats("", 1, 1), Repeats("10_cats", 2, 10), Repeats("2_reg", 1, 2))
    [line] = plan_parts.describe_repeats(found)
    assert line.startswith("repeats      the others: 1 image x 1, 10_cats: 2 images x 10, 2_reg: 1 image x 2 (")
    assert plan_parts.repeats_by_folder(make_items(samples[3:], rule)[0]) == ()
    assert plan_parts.describe_repeats(()) == []


def test_the_lines_of_samples_and_checkpoints():
    lines = SamplePlan(tuple(f"prompt {number}" for number in range(12)), 24, 3, "before and after").describe()
    assert lines[0] == "samples      24 images of 12 prompts, 3 times: before and after"
    assert lines[1] == "             prompt 0" and lines[-1].endswith("and 2 more (a run's plan.json lists all)")
    assert len(lines) == 12
    [_, _, long] = SamplePlan(("a",), 1, 2, "often", 2).describe()
    assert long.endswith(
        "2 prompts longer than 77 tokens are read in chunks of 75, as ComfyUI and A1111 do: nothing is cut"
    )
    [_, line] = SamplePlan(("x" * 60_000,), 1, 3, "before and after").describe()
    assert line == f"{' ' * 13}{'x' * 197}...", "a long prompt does not fill the terminal"
    assert CheckpointPlan(3, 2, "every 5 steps", None, "full: what").describe() == [
        "checkpoints  3: every 5 steps; the latest 2 are kept",
        "adapters     NAME.safetensors, and NAME-STEP.safetensors for 2 checkpoints before it",
        "metadata     full: what",
    ]
    for times, kept_adapters in ((1, None), (5, 0)):
        lines = CheckpointPlan(times, 9, "often", kept_adapters, "").describe()
        assert lines[:2] == [f"checkpoints  {times}: often", "adapters     NAME.safetensors"]
    for kept_adapters, end in (
        (3, ", of which the latest 3 are kept"),
        (1, ", of which the latest 1 is kept"),
        (4, ""),
    ):
        assert CheckpointPlan(5, 9, "often", kept_adapters, "").describe()[1].endswith(f"4 checkpoints before it{end}")


def test_why_there_is_no_gpu(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is a build for CPUs" in machine.why_no_gpu()
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    assert "finds no GPU" in machine.why_no_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "hides every GPU" in machine.why_no_gpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    job = SimpleNamespace(device=torch.device("cpu"), precision="fp32", precision_reason="auto", world=1)
    assert plan_parts.device_of(job).describe().endswith(": the launcher's --cpu asks for the CPU")


def test_the_speed_and_the_duration():
    found = Measured("runs/mycat", 200, 0.5, 9.75)
    line = plan_parts.describe_speed(found, None, 1800, 4, "runs")
    assert line.startswith("speed        about 2 s per step, 1 h 00 min of training in all")
    assert line.endswith("9.8 GiB at the peak: as runs/mycat took")
    assert "not known: no run in runs " in plan_parts.describe_speed(None, None, 1800, 4, "runs")
    durations = [plan_parts.duration_text(seconds) for seconds in (0.1, 89, 91, 3599, 7500, 200_000)]
    assert durations == ["1 s", "89 s", "2 min", "1 h 00 min", "2 h 05 min", "2 d 7 h"]
