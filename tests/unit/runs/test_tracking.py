"""metrics.jsonl is strict and can be cut back; trackers get the same numbers, never ask, and never stop a run."""

import errno
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from sushi_research.errors import UserError
from sushi_research.runs import tracking
from sushi_research.runs.metrics_file import MetricsFile
from sushi_research.runs.tracking import Trackers, resolve_trackers

# --- metrics.jsonl ---


@pytest.fixture
def metrics(tmp_path):
    return MetricsFile(tmp_path / "metrics.jsonl")


def test_one_line_per_step(metrics):
    assert metrics.read() == []
    metrics.append({"step": 1, "loss": 0.1})
    metrics.append({"step": 2, "loss": 1e-8, "loss/quarter_1": None})
    metrics.sync()
    assert metrics.path.read_text() == '{"step": 1, "loss": 0.1}\n{"step": 2, "loss": 1e-08, "loss/quarter_1": null}\n'
    assert metrics.read() == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 1e-8, "loss/quarter_1": None}]


def test_what_is_not_a_number_is_never_written(metrics):
    metrics.append({"step": 1})
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError):
            metrics.append({"step": 2, "loss": value})
    assert metrics.read() == [{"step": 1}]


@pytest.mark.parametrize(
    "torn", ["", '{"step": 4, "lo', '{"step": 4}', "\0\0\0"], ids=["whole", "cut", "without a newline", "zeros"]
)
def test_cutting_back(metrics, torn):
    for step in (0, 1, 2, 3):
        metrics.append({"step": step, "loss": 0.1 + step})
    with open(metrics.path, "a") as file:
        file.write(torn)
    assert [record["step"] for record in metrics.read()] == [0, 1, 2, 3]
    metrics.cut_back(2)
    metrics.append({"step": 3, "loss": 9.0})
    assert metrics.read() == [{"step": step, "loss": 0.1 + step} for step in (0, 1, 2)] + [{"step": 3, "loss": 9.0}]
    metrics.cut_back(-1)
    assert metrics.path.read_bytes() == b""


def test_cutting_back_keeps_the_evaluations_of_the_given_steps_alone(metrics):
    for line in (
        {"step": 0, "a/loss": 1, "a/drift": 2},
        {"step": 1, "loss": 3},
        {"step": 1, "a/loss": 4, "a/drift": 5},
    ):
        metrics.append(line)
    metrics.cut_back(1, evaluated={"a/loss": [1], "a/drift": []})
    assert metrics.read() == [{"step": 1, "loss": 3}, {"step": 1, "a/loss": 4}]


def test_cutting_back_a_file_that_is_not_there(metrics):
    metrics.cut_back(3)
    assert not metrics.path.exists()


def test_damage_before_the_end_is_reported(metrics):
    metrics.path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match="metrics.jsonl, line 2 is not valid JSON"):
        metrics.cut_back(1)
    assert metrics.path.read_text() == '{"step": 1}\n{"st\n{"step": 3}\n'


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_reported():
    with pytest.raises(UserError, match="cannot write /dev/full: No space left on device"):
        MetricsFile(Path("/dev/full")).append({"step": 1})


# --- which trackers ---


@pytest.fixture
def machine(monkeypatch):
    """A machine with W&B in the given state, as W&B itself reports it; `login` is its answer, or a message of refusal."""
    import wandb

    def prepare(mode="online", login=False):
        def answer(prompt, verify):
            assert (prompt, verify) == (False, False)
            if isinstance(login, str):
                raise wandb.errors.AuthenticationError(login)
            return login

        monkeypatch.setattr(wandb, "setup", lambda: SimpleNamespace(settings=SimpleNamespace(mode=mode)))
        monkeypatch.setattr(wandb, "login", answer)

    return prepare


BAD_KEY = "API key must have 40+ characters"


WANDB_MODES = [
    ("auto", "online", True, "online"),
    ("auto", "online", False, "offline"),
    ("auto", "online", BAD_KEY, "offline"),
    ("auto", "offline", True, "offline"),
    ("auto", "dryrun", True, "offline"),
    ("auto", "disabled", True, None),
    ("online", "online", True, "online"),
    ("offline", "online", True, "offline"),
    ("offline", "disabled", True, "offline"),
    ("off", "online", True, None),
]


def test_how_wandb_runs(machine):
    for setting, mode, login, expected in WANDB_MODES:
        case = (setting, mode, login)
        machine(mode, login)
        trackers = resolve_trackers(setting, tensorboard=True)
        assert trackers.wandb_mode == expected, case
        assert trackers.names == (["wandb", "tensorboard"] if expected else ["tensorboard"]), case
        assert trackers.may_fall_back is (setting == "auto"), case
        assert trackers.notice.startswith(f"W&B: {expected or 'off'}") and "\n" not in trackers.notice, case
        assert resolve_trackers(setting, tensorboard=False).names == (["wandb"] if expected else []), case


def test_the_notice_says_why_it_is_offline(machine):
    machine(login=BAD_KEY)
    assert "API key must have 40+ characters" in resolve_trackers("auto", False).notice
    machine(login=False)
    assert "not logged in" in resolve_trackers("auto", False).notice
    machine(mode="offline")
    assert "WANDB_MODE" in resolve_trackers("auto", False).notice


def test_online_that_cannot_be_had_is_refused(machine):
    for mode, login, message in (
        ("online", False, "not logged in"),
        ("online", BAD_KEY, "credentials cannot be used: API key must"),
        ("offline", True, "WANDB_MODE is offline"),
        ("disabled", True, "WANDB_MODE is disabled"),
    ):
        machine(mode, login)
        with pytest.raises(UserError, match=message):
            resolve_trackers("online", False)


@pytest.mark.parametrize("stdin", ["terminal", "closed"])
def test_nothing_is_asked(tmp_path, stdin):
    """The real W&B without credentials: it asks wherever it sees a terminal, unless it is told not to."""
    script = (
        "from sushi_research.runs.tracking import resolve_trackers; print(resolve_trackers('auto', False).wandb_mode)"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "NETRC"))}
    command = [sys.executable, "-c", script]
    if stdin == "closed":
        command = ["sh", "-c", 'exec "$0" "$@" <&-', *command]
        terminal = None
    else:
        terminal = pytest.importorskip("pty").openpty()
    done = subprocess.run(
        command,
        stdin=terminal and terminal[1],
        stdout=subprocess.PIPE,
        stderr=terminal[1] if terminal else subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=environment | {"HOME": str(tmp_path), "PYTHONPATH": str(Path(tracking.__file__).parents[2])},
        timeout=120,  # a question would wait for ever
    )
    for descriptor in terminal or ():
        os.close(descriptor)
    assert (done.returncode, done.stdout) == (0, "offline\n"), done.stderr


# --- what they get ---


class Recorder:
    """A tracker of accelerate's shape that notes what it is given, or fails."""

    def __init__(self, name, error=None):
        self.name, self.error, self.calls = name, error, []

    def log(self, values, step=None):
        if self.error is not None:
            raise self.error
        self.calls.append((values, step))

    def give_up(self):
        return ""

    def finish(self):
        if self.error is not None:
            raise self.error
        self.calls.append("finish")


def accelerator(*trackers, main=True):
    return SimpleNamespace(is_main_process=main, trackers=list(trackers))


def test_the_same_numbers_go_everywhere(metrics):
    trackers = Recorder("wandb"), Recorder("tensorboard")
    values = {"loss": 0.5, "loss/quarter_1": None, "epoch": 2, "evaluation/loss": 0.25, "cpu_seconds": 3}
    tracking.log(accelerator(*trackers), metrics, values, 7)
    assert metrics.read() == [{"step": 7, **values}]
    shown = {"training/loss": 0.5, "training/epoch": 2, "evaluation/loss": 0.25, "speed/cpu_seconds": 3}
    assert trackers[0].calls == [({"step": 7, **shown}, None)]
    assert trackers[1].calls == [(shown, 7)]


def test_a_tracker_that_fails_is_named_and_dropped(metrics, caplog):
    bad, good = Recorder("wandb", OSError(errno.ENOSPC, "full")), Recorder("tensorboard")
    run = accelerator(bad, good)
    for step in (1, 2):
        tracking.log(run, metrics, {"loss": 0.5}, step)
    assert [record["step"] for record in metrics.read()] == [1, 2]
    assert run.trackers == [good] and len(good.calls) == 2
    (record,) = caplog.records
    assert record.getMessage().startswith("wandb failed and is skipped from here on")


def test_a_tracker_that_cannot_finish_is_no_error(caplog):
    good = Recorder("tensorboard")
    run = accelerator(Recorder("wandb", RuntimeError("connection lost")), good)
    tracking.end_trackers(run)
    assert good.calls == ["finish"] and run.trackers == [] and "connection lost" in caplog.text


def test_only_the_main_process_logs(tmp_path, metrics):
    tracker = Recorder("wandb")
    run = accelerator(tracker, main=False)
    tracking.log(run, metrics, {"loss": 0.5}, 1)
    tracking.log_images(run, "samples", [tmp_path / "none.png"], ["a cat"], 1)
    tracking.log_artifact(run, "adapter", [tmp_path / "none"])
    start(run, tmp_path, Trackers(["wandb", "tensorboard"], "online", True, ""), step=0)
    assert tracker.calls == [] and run.trackers == [tracker] and list(tmp_path.iterdir()) == []


def start(run, folder, trackers, step, config=None):
    tracking.start_trackers(
        run,
        trackers,
        folder=folder,
        run_id="0123abcd",
        name="trial",
        config=config or {"lora": {"rank": 4, "targets": ["to_q", "to_k"]}, "train": {"epochs": None}},
        project="tests",
        entity=None,
        tags=["tiny"],
        step=step,
    )


def test_a_run_and_its_continuation_in_the_real_trackers(tmp_path, monkeypatch):
    """Offline W&B and TensorBoard: a run logs three steps, dies, and is continued from step 2."""
    import wandb
    from accelerate import Accelerator
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("SOME_TOKEN", "hunter2hunter2")
    grid, adapter = tmp_path / "grid.png", tmp_path / "adapter.safetensors"
    Image.new("RGB", (6, 4), (255, 0, 0)).save(grid)
    adapter.write_bytes(b"weights")
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    metrics = MetricsFile(run_folder / "metrics.jsonl")
    run = Accelerator(cpu=True)
    offline = Trackers(["wandb", "tensorboard"], "offline", True, "")

    start(run, run_folder, offline, step=0)
    tracking.log_images(run, "samples", [grid], ["a red cat"], 0)
    for step in (1, 2, 3):
        tracking.log(run, metrics, {"loss/mean": 1.0 / step, "epoch": 0}, step)
    assert [tracker.name for tracker in run.trackers] == ["wandb", "tensorboard"]  # none was dropped
    tracking.end_trackers(run)

    metrics.cut_back(2)
    time.sleep(1.1)  # W&B names its folder by the second; no real run dies and is continued within one
    start(run, run_folder, offline, step=2)
    tracking.log(run, metrics, {"loss/mean": 5.0, "epoch": 0}, 3)
    tracking.log_artifact(run, "adapter", [adapter])
    wandb_run = run.trackers[0].run
    assert (wandb_run.id, wandb_run.name, wandb_run.tags) == ("0123abcd", "trial", ("tiny",))
    assert wandb_run.settings.resume == "allow"
    assert wandb_run.config["lora"] == {"rank": 4, "targets": ["to_q", "to_k"]}
    assert len(run.trackers) == 2
    tracking.end_trackers(run)

    events = EventAccumulator(str(run_folder / "tensorboard"), size_guidance={"images": 0}).Reload()
    # TensorBoard keeps single precision.
    values = [(event.step, event.value) for event in events.Scalars("loss/mean")]
    assert values == [(1, 1.0), (2, 0.5), (3, 5.0)]
    assert sorted(events.Tags()["scalars"]) == ["loss/mean", "training/epoch"]
    (image,) = events.Images("samples/samples/0")
    assert (image.width, image.height, image.step) == (6, 4, 0)

    wandb.teardown()  # W&B's own process writes the files, a little after a run is finished
    first, second = sorted((run_folder / "wandb").glob("offline-run-*-0123abcd"))
    logged = [b"".join(path.read_bytes() for path in folder.glob("*.wandb")) for folder in (first, second)]
    assert b"loss/mean" in logged[0] and b"loss/mean" in logged[1]
    # A metric record of W&B's file format: every metric ("*") has the axis "step".
    assert all(b'\x12\x01*"\x04step' in content for content in logged)
    assert len(list(first.glob("files/media/images/samples/samples*.png"))) == 1
    assert not any(b"hunter2" in path.read_bytes() for path in run_folder.rglob("*") if path.is_file())
    assert [json.loads(line)["step"] for line in metrics.path.read_text().splitlines()] == [1, 2, 3]
