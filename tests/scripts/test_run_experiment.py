"""An experiment as a user runs it: what is done is skipped, what was cut goes on, and a failure stops nothing else."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from script_runs import ROOT, TARGETS, load_script, script
from test_evaluating import make_pictures

from sushi_research.config.command_line import load_config
from sushi_research.config.sets import sets_of
from sushi_research.errors import UserError
from sushi_research.experiments.experiment import Experiment, plan
from sushi_research.experiments.run_command import RunCommand

SCRIPT = script("run_experiment")


@pytest.fixture
def file(bases, photos, caches, tmp_path) -> Path:
    """An experiment of two variants and two seeds on the tiny base."""
    held = make_pictures(tmp_path / "held", 8, 21)
    content = {
        "title": "Two ranks",
        "script": "scripts/train_sd15_lora.py",
        "configs": [str(tmp_path / "base.yaml")],
        "variants": {"small": {"lora": {"rank": 2}}, "large": {"lora": {"rank": 4}}},
        "seeds": [0, 1],
        "folder": str(tmp_path / "runs"),
    }
    base = {
        "model": {"base": str(bases["sd15"])},
        "data": {"path": str(photos), "resolution": 64, "bucket_step": 32},
        "cache": {"folder": str(caches)},
        "lora": {"alpha": 2.0, "targets": TARGETS},
        "train": {"steps": 2, "batch_size": 4, "precision": "fp32"},
        "optimizer": {"name": "adamw", "lr": 0.01},
        "evaluation": {"path": str(held), "every": None, "noise_samples": 4, "drift_captions": []},
        "sample": {"enabled": False},
        "tracking": {"wandb": "off"},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def read(file: Path, *words: str) -> Experiment:
    return load_config(Experiment, ["--config", str(file), *words], script="s", intro="1\n2\n3\n4\n5")


@pytest.mark.slow
def test_stopped_in_the_middle_and_run_again(file, tmp_path, forked, monkeypatch, capfd):
    """A real launch, through accelerate: SIGINT in the first run. Then all of it in this process, and the page."""
    endless = ["--settings.train", "{steps: 1000000}"]
    process = forked("scripts/run_experiment.py", "--config", file, *endless)
    process.wait_for(tmp_path / "runs/small-seed0/metrics.jsonl", '"step": 2,')
    process.send_signal(signal.SIGINT)
    assert process.wait() == 128 + signal.SIGINT, process.err
    printed = process.out + process.err
    assert "stopped in small-seed0; the same command again continues from here" in printed
    assert "SIGTERM: stopping at the next step boundary" in printed and "run 2 of" not in printed
    stopped = max(path.name for path in (tmp_path / "runs/small-seed0/checkpoints").iterdir())
    step = int(stopped.removeprefix("step-"))
    assert step >= 2 and sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["logs", "small-seed0"]

    InProcess(load_script("sd15")).install(monkeypatch)
    assert SCRIPT.main(read(file, "--settings.train", f"{{steps: {step + 1}}}", "--seeds", "[0]")) == 0
    out, err = capfd.readouterr()
    assert "run 1 of 2: small-seed0 (to continue)" in out
    assert f"continuing the run small-seed0 from step {step} of {step + 1}" in out
    assert "run 2 of 2: large-seed0 (to do), about" in out
    page = (tmp_path / "runs/comparison/comparison.md").read_text()
    assert page.startswith("# Two ranks") and "| lora.rank | 2 | 4 |" in page
    assert "Traceback" not in err


class InProcess:
    """Stands for the processes of an experiment: calls the training script's `main` here; fails where it is told to."""

    def __init__(self, trainer_script, failing=()):
        self.script, self.failing, self.ran = trainer_script, failing, []

    def install(self, monkeypatch):
        test = self

        def run(processes, words, environment):
            arguments = words[words.index(str(ROOT / "scripts/train_sd15_lora.py")) + 1 :]
            name = next(word.partition("=")[2] for word in arguments if word.startswith("--run.name="))
            test.ran.append((name, environment))
            if name in test.failing:
                return 2, "error: a mistake"
            from sushi_research.config import SD15Training

            return test.script.main(load_config(SD15Training, arguments, script="s", intro="1\n2\n3\n4\n5")), ""

        monkeypatch.setattr(RunCommand, "train", run)


@pytest.mark.slow
def test_a_failure_is_named_and_the_others_go_on_then_only_it_is_run_again(file, tmp_path, monkeypatch, capfd):
    first = InProcess(load_script("sd15"), failing=["large-seed0"])
    first.install(monkeypatch)
    assert SCRIPT.main(read(file)) == 1
    assert [name for name, _ in first.ran] == ["small-seed0", "large-seed0", "small-seed1", "large-seed1"]
    assert {environment["WANDB_RUN_GROUP"] for _, environment in first.ran} == {"runs"}
    printed = capfd.readouterr()
    assert "error: 1 of 4 runs failed: large-seed0; the reasons are above" in printed.err
    variants = json.loads((tmp_path / "runs/comparison/comparison.json").read_text())["variants"]
    assert [variant["seeds"] for variant in variants] == [[0, 1], [1]]

    assert SCRIPT.main(read(file, "--dry-run")) == 0
    states = dict(line.split(maxsplit=1) for line in capfd.readouterr().out.splitlines()[1:])
    assert states == {"small-seed0": "done", "large-seed0": "to do", "small-seed1": "done", "large-seed1": "done"}

    before = (tmp_path / "runs/small-seed0/metrics.jsonl").stat().st_mtime_ns
    second = InProcess(load_script("sd15"))
    second.install(monkeypatch)
    assert SCRIPT.main(read(file)) == 0
    assert [name for name, _ in second.ran] == ["large-seed0"]
    assert (tmp_path / "runs/small-seed0/metrics.jsonl").stat().st_mtime_ns == before
    [pair] = json.loads((tmp_path / "runs/comparison/comparison.json").read_text())["families"]["learned"]
    assert pair["same_seeds"] is True and pair["difference"]["seeds"] == [2, 2]

    third = InProcess(load_script("sd15"))
    third.install(monkeypatch)
    assert SCRIPT.main(read(file)) == 0 and third.ran == []


def test_the_comparison_is_told_to_pool_code(file, tmp_path, monkeypatch):
    words = []
    monkeypatch.setattr(
        SCRIPT.subprocess, "run", lambda command: words.append(command) or SimpleNamespace(returncode=0)
    )
    for arguments in ([], ["--pool_code", "true"]):
        experiment = read(file, *arguments)
        assert SCRIPT.write_comparison(experiment, plan(experiment)) == 0
    assert ["--pool-code" in command for command in words] == [False, True]


def test_without_a_run_of_the_reference_nothing_is_compared(file, capsys):
    """compare_runs.py would say that no variant has this name."""
    experiment = read(file, "--reference", "large")
    assert SCRIPT.write_comparison(experiment, [run for run in plan(experiment) if run.variant == "small"]) == 1
    assert capsys.readouterr().err == "no run of the reference, large, has finished: nothing is compared\n"


def test_a_searched_page_says_so_and_a_sweep_is_written(file, tmp_path, monkeypatch, capsys):
    words = []
    monkeypatch.setattr(
        SCRIPT.subprocess, "run", lambda command: words.append(command) or SimpleNamespace(returncode=0)
    )
    content = yaml.safe_load(file.read_text())
    for name, space in (("grid", [2, 4]), ("search", {"min": 2, "max": 64})):
        found = {
            **content,
            "variants": {},
            name: {"lora": {"rank": space}},
            **({"samples": 2} if name == "search" else {}),
        }
        file.write_text(yaml.safe_dump(found))
        experiment = read(file)
        SCRIPT.write_comparison(experiment, plan(experiment))
        assert "--searched" in words.pop()
        written = tmp_path / f"{name}_sweep.yaml"
        assert SCRIPT.main(read(file, "--write_sweep", str(written))) == 0
        assert not (tmp_path / "runs").exists()
        sweep = yaml.safe_load(written.read_text())
        assert sweep["method"] == {"grid": "grid", "search": "random"}[name] and "lora.rank" in sweep["parameters"]
    for grid, words in (
        ({"lora": {"rank": 8}}, "grid: lora.rank is 8: give a list of the values to try"),
        ({"lora": {"targets": "kohya"}}, "grid: lora.targets is 'kohya': give a list"),
        ({"lora": {"rnk": [1, 2]}}, "lora.rnk"),
    ):
        other = tmp_path / "other.yaml"
        other.write_text(yaml.safe_dump({**content, "variants": {}, "grid": grid}))
        with pytest.raises(UserError, match=words):
            SCRIPT.main(read(other, "--write_sweep", str(tmp_path / "other_sweep.yaml")))
    assert not (tmp_path / "other_sweep.yaml").exists()
    with pytest.raises(UserError, match="write_sweep: .* exists already"):  # such as the experiment itself
        SCRIPT.main(read(file, "--write_sweep", str(file)))
    assert SCRIPT.main(read(file, "--status")) == 0
    assert capsys.readouterr().out.splitlines()[-5] == "4 runs: 4 waiting"


def test_jobs_that_were_submitted_before_a_refusal_are_named(monkeypatch, capsys):
    class Refusing:
        left = staticmethod(lambda: ["7", "8"])
        __enter__, __exit__ = lambda self: self, lambda *_: None

        def __init__(self, *_):
            pass

        def run(self):
            raise UserError("the job of c cannot be submitted")

    monkeypatch.setattr(SCRIPT, "ClusterJobs", Refusing)
    monkeypatch.setattr(SCRIPT, "Scheduler", Refusing)
    with pytest.raises(UserError, match="cannot be submitted"):
        SCRIPT.work(SimpleNamespace(cluster="slurm"), [])
    assert "to end them: scancel 7 8" in capsys.readouterr().out


def test_the_worked_examples_are_right(monkeypatch):
    """Every file in configs/experiments expands into runs whose configs are valid."""
    monkeypatch.chdir(ROOT)
    files = sorted((ROOT / "configs/experiments").glob("*.yaml"))
    assert files
    for path in files:
        runs = plan(read(path))
        assert len(runs) == len({run.name for run in runs}) >= 4
        assert all(run.config.evaluation.path.startswith("demo/held_out/") for run in runs)
        assert all((ROOT / each.path).is_dir() for run in runs for each in sets_of(run.config))
