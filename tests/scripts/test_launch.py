"""As a user launches: `accelerate launch`, the demo's command, and what becomes of a script whose launcher is stopped."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image
from script_runs import ROOT, Trainer

from sushi_research.config.command_line import config_to_yaml

pytestmark = pytest.mark.slow
ONE = pytest.mark.parametrize("architecture", ["sd15"])


def demo_command(architecture: str) -> list[str]:
    """What `make demo` trains with, by the programs of this Python."""
    make = subprocess.run(
        ["make", "--dry-run", "demo", f"ARCH={architecture}"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    [line] = [line for line in make.stdout.splitlines() if " launch " in line]
    variable, program, *words = shlex.split(line)
    assert variable == "OMP_NUM_THREADS=1" and program == ".venv/bin/accelerate"
    return [str(Path(sys.executable).parent / "accelerate"), *words]


def launcher() -> list[str]:
    """The demo's launcher, up to the script."""
    command = demo_command("sd15")
    return command[: command.index("scripts/train_sd15_lora.py")]


def demo_words(architecture: str) -> list[str]:
    """The demo's command; asserts that its script, configs and name are those of the repository."""
    command = demo_command(architecture)
    script = command.index(f"scripts/train_{architecture}_lora.py")
    configs = ["--config", f"configs/demo_{architecture}.yaml", "--config", "configs/demo/star.yaml"]
    assert command[script + 1 :] == [*configs, "--run.name", f"demo_{architecture}_star"]
    return command


def test_the_plan_of_the_other_demo(tmp_path, forked):
    """SD1.5's demo, with the launcher's words but without the launcher, up to its plan."""
    command = demo_words("sd15")
    script = command.index("scripts/train_sd15_lora.py")
    process = forked(
        *command[script:], "--run.folder", tmp_path / "runs", "--cache.folder", tmp_path / "cache", "--dry-run"
    )
    assert process.wait() == 0, process.err
    plan = dict(line.split(maxsplit=1) for line in process.out.splitlines())
    assert plan["base"].startswith("demo/base/sd15: sd15, predicts") and plan["images"].startswith("48 ")
    assert "skipped" not in plan
    assert "captions" not in plan, "none is cut"


def test_the_demo(tmp_path):
    """The demo, two steps long and with its own folders; base, pictures and settings are those of the repository."""
    architecture = "sdxl"
    command = demo_words(architecture)
    changes = {
        "run.folder": tmp_path / "runs",
        "cache.folder": tmp_path / "cache",
        "train.steps": 2,
        "schedule.warmup": 1,
        "sample.steps": 2,
        "tracking.wandb": "offline",
    }
    words = [word for key, value in changes.items() for word in (f"--{key}", str(value))]
    ended = subprocess.run([*command, *words], capture_output=True, text=True, cwd=ROOT)
    out, err = ended.stdout, ended.stderr
    assert ended.returncode == 0, err
    assert "Traceback" not in err

    run = tmp_path / "runs" / f"demo_{architecture}_star"
    for what, name in {
        "adapter": f"{run.name}.safetensors",
        "page": "report.html",
        "curves": "loss.png",
        "samples": "samples/progress.png",
    }.items():
        assert f"{what:<9} {run / name}" in out
        assert (run / name).is_file()
    assert "W&B: offline" in out and f"wandb sync {run}/wandb/offline-run-*" in out
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    with Image.open(run / "samples/progress.png") as progress:
        assert progress.height > 6 * 128 and progress.width > 3 * 128, "six prompts, before and after side by side"
    record = json.loads((run / "run.json").read_text())
    assert record["finished_at"] == 2
    [offline] = (run / "wandb").glob("offline-run-*")
    assert (offline / f"run-{record['wandb_id']}.wandb").stat().st_size > 0
    plan = json.loads((run / "plan.json").read_text())
    assert plan["skipped"] == [] and plan["captions_cut"] == {} and plan["images"] == 48
    assert plan["split"]["processes"] == 1
    seconds = json.loads((run / "stage_timings.json").read_text())
    stages = ["starting", "planning", "caching", "loading", "saving", "sampling", "training"]
    # Saving is so short here that it may be left out.
    assert [stage for stage in stages if stage in seconds or stage == "saving"] == stages and set(seconds) <= {*stages}
    assert all(value >= 0 for value in seconds.values()) and seconds["training"] > 0


@ONE
def test_a_launcher_that_is_stopped(trainer: Trainer, tmp_path, capsys):
    """It dies at once and says nothing to the script, which notices, saves and ends; the same command goes on."""
    endless = {"train.steps": 1_000_000, "checkpoint.every": None}
    config = tmp_path / "config.yaml"
    config.write_text(config_to_yaml(trainer.config("stopped", endless)))
    command = [*launcher(), "scripts/train_sd15_lora.py", "--config", str(config)]
    log = tmp_path / "stderr.txt"
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stderr)
    metrics = trainer.folder("stopped") / "metrics.jsonl"
    while not metrics.exists():
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    [script] = psutil.Process(process.pid).children()
    process.terminate()
    assert process.wait() == -signal.SIGTERM
    _, alive = psutil.wait_procs([script], timeout=300)
    assert not alive, "the script trains on"

    assert "the launcher ended: stopping at the next step boundary, with a checkpoint" in log.read_text()
    assert "Traceback" not in log.read_text()
    step = trainer.checkpoint("stopped").step
    assert [line["step"] for line in trainer.metrics("stopped")] == list(range(1, step + 1))
    assert not (trainer.folder("stopped") / "stopped.safetensors").exists()
    capsys.readouterr()
    assert trainer.train("stopped", {**endless, "train.steps": step + 1}) == 0
    assert f"continuing the run stopped from step {step} of {step + 1}" in capsys.readouterr().out
    assert trainer.metrics("stopped")[-1]["step"] == step + 1


@ONE
def test_a_script_that_is_stopped_itself(trainer: Trainer, tmp_path, forked):
    """Started without a launcher: it saves at the next step boundary, and its exit status tells the signal."""
    for number in (signal.SIGTERM, signal.SIGINT):
        name = f"stopped-{number}"
        config = tmp_path / f"{name}.yaml"
        config.write_text(config_to_yaml(trainer.config(name, {"train.steps": 1_000_000, "checkpoint.every": None})))
        process = forked("scripts/train_sd15_lora.py", "--config", config)
        process.wait_for(trainer.folder(name) / "metrics.jsonl")
        process.send_signal(number)
        assert process.wait() == 128 + number, process.err
        step = trainer.checkpoint(name).step
        assert f"stopped at step {step} of 1000000; the same command again continues from here" in process.out
        assert f"{signal.Signals(number).name}: stopping at the next step boundary" in process.err
        assert "Traceback" not in process.err


@ONE
def test_a_mistake_ends_the_launcher_with_an_error(trainer, tmp_path):
    command = [*launcher(), "scripts/train_sd15_lora.py", "--config", "configs/sd15_lora.yaml", "--lora.rnk", "8"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode != 0
    assert "unknown key lora.rnk on the command line: did you mean --lora.rank?" in ended.stderr
