"""Which runs are started when, on which GPUs, and which of those that failed again; with jobs that are none."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable

import pytest
import yaml

from sushi_research.config.command_line import config_to_dict, load_config
from sushi_research.errors import UserError
from sushi_research.experiments import cells, scheduling
from sushi_research.experiments.experiment import plan
from sushi_research.experiments.experiment_file import Experiment
from sushi_research.experiments.local_jobs import LocalJobs, command_of, processes_of, slots_of
from sushi_research.experiments.run_work import Outcome, claim_of, record_path
from sushi_research.experiments.screen import Screen
from sushi_research.runs import identity
from sushi_research.runs.folder_lock import FolderLock
from sushi_research.runs.run_folder import FORMAT, RunFolder


@pytest.fixture
def experiment(tmp_path) -> Experiment:
    (tmp_path / "base.yaml").write_text("model: {base: somewhere}\ndata: {path: photos}\ntrain: {steps: 4}\n")
    content = {
        "title": "t",
        "script": "scripts/train_sd15_lora.py",
        "configs": [str(tmp_path / "base.yaml")],
        "variants": {"a": {}, "b": {"lora": {"rank": 2}}, "c": {"lora": {"rank": 3}}},
        "seeds": [0],
        "folder": str(tmp_path / "runs"),
        "retries": 1,
    }
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(content))
    return load_config(Experiment, ["--config", str(tmp_path / "experiment.yaml")], script="s", intro="1\n2\n3\n4\n5")


def finish(run) -> None:
    """Leaves the run as a finished training does."""
    run.folder.mkdir(parents=True, exist_ok=True)
    settings = identity.run_identity(config_to_dict(run.config), {"global_batch_size": 1})
    content = {"format": FORMAT, "steps": 4, "finished_at": 4, "wandb_id": "w", "identity": settings}
    (run.folder / "run.json").write_text(json.dumps(content))
    (run.folder / "metrics.jsonl").write_text('{"step": 4}\n')
    RunFolder(run.folder, None).adapter.touch()


class Scripted:
    """Jobs whose outcomes are given by name, one after the other; one without is a finished training. `started` has the order."""

    is_alone = outlive = False

    def __init__(self, outcomes: dict[str, list[Outcome]], room: int = 1, fills_first: bool = False) -> None:
        self.outcomes, self.room, self.fills_first = outcomes, room, fills_first
        self.started, self.running, self.looks = [], {}, 0
        self.at_look: Callable[[], None] = lambda: None

    def has_room(self) -> bool:
        return len(self.running) < self.room

    def start(self, run, trains: bool) -> str:
        self.started.append(run.name.removesuffix("-seed0"))
        self.running[run.name] = run
        return ""

    def ended(self, seconds: float) -> list[tuple[str, Outcome]]:
        self.looks += 1
        self.at_look()
        found = []
        for name, run in list(self.running.items())[:1]:
            left = self.outcomes.get(run.variant)
            outcome = left.pop(0) if left else Outcome(seconds=60.0)
            if outcome is None:  # it still runs
                continue
            if not outcome.status and not outcome.is_busy:
                finish(run)
            found.append((name, outcome))
            del self.running[name]
        return found

    def stop(self, number: int) -> None:
        pass


def worked(experiment: Experiment, jobs: Scripted) -> dict[str, cells.Cell]:
    found = cells.cells_of(experiment, plan(experiment))
    scheduling.Scheduler(experiment, found, jobs).run()
    return {cell.run.variant: cell for cell in found}


def test_a_failed_run_is_launched_again_after_the_others_while_it_comes_further(experiment, capsys):
    failed, further = Outcome(1, "exit status 1"), Outcome(-9, "signal 9", further=True)
    jobs = Scripted({"a": [failed, failed], "b": [further, further, failed, failed], "c": [Outcome(2, "error: no")]})
    found = worked(experiment, jobs)
    assert jobs.started == ["a", "b", "c", "a", "b", "b", "b"]
    assert {name: cell.state for name, cell in found.items()} == {"a": "failed", "b": "failed", "c": "failed"}
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("a-seed0 failed (exit status 1); its output is in ") and said[0].endswith(
        "launched again"
    )
    assert said[2].endswith("c-seed0.log; continuing with the others") and "(error: no)" in said[2]

    # The same command again tries them again, and only them.
    second = Scripted({})
    assert all(cell.state == "done" for cell in worked(experiment, second).values())
    assert second.started == ["a", "b", "c"] and worked(experiment, third := Scripted({})) and third.started == []


def test_a_run_that_ends_while_it_is_asked_to_stop_is_what_it_is(experiment, capsys):
    """Done, or failed, and only else stopped; none is launched again."""
    ends = {"b": [Outcome(1, "exit status 1: boom")], "c": [Outcome(143, "exit status 143", is_stopped=True)]}
    jobs = Scripted(ends, room=3)
    jobs.at_look = lambda: signal.raise_signal(signal.SIGTERM) if jobs.looks == 1 else None
    cells_found = cells.cells_of(experiment, plan(experiment))
    scheduler = scheduling.Scheduler(experiment, cells_found, jobs)
    scheduler.run()
    assert [cell.state for cell in cells_found] == ["done", "failed", "waiting"]
    assert jobs.started == ["a", "b", "c"] and scheduler.interrupted == ["c-seed0"]
    assert "b-seed0 failed (exit status 1: boom); " in capsys.readouterr().err


def test_the_first_run_fills_the_caches_alone(experiment):
    jobs = Scripted({"a": [None, None, None]}, room=3, fills_first=True)
    [first, *_] = plan(experiment)

    def at_look():
        if jobs.looks == 2:
            assert jobs.started == ["a"]
            first.folder.mkdir(parents=True)
            (first.folder / "metrics.jsonl").write_text('{"step": 1}\n')

    jobs.at_look = at_look
    worked(experiment, jobs)
    assert jobs.started == ["a", "b", "c"] and jobs.looks > 3


def test_a_first_run_that_fails_has_filled_nothing(experiment):
    """All others at once would each encode the same images."""
    jobs = Scripted({"a": [Outcome(2, "error: no")], "b": [None, None]}, room=3, fills_first=True)
    beside = []
    jobs.at_look = lambda: beside.append([run.variant for run in jobs.running.values()])
    worked(experiment, jobs)
    assert beside[:3] == [["a"], ["b"], ["b"]]


def test_a_run_of_another_command_is_left_to_it_and_skipped_when_it_is_done(experiment, monkeypatch, capsys):
    monkeypatch.setattr(scheduling, "BUSY", 0.0)
    jobs = Scripted({"a": [Outcome(is_busy=True), Outcome(is_busy=True)]})
    [run, *_] = plan(experiment)
    jobs.at_look = lambda: finish(run) if jobs.looks == 2 else None
    found = worked(experiment, jobs)
    assert found["a"].state == "done" and jobs.started[:2] == ["a", "a"] and jobs.started.count("a") == 2
    assert capsys.readouterr().out.count("another command works on a-seed0") == 1

    # One whose lock can be seen is not even started.
    (run.folder / "run.json").unlink()
    lock, jobs = FolderLock(run.folder), Scripted({})
    jobs.at_look = lambda: (finish(run), lock.close()) if jobs.looks == 2 else None
    assert worked(experiment, jobs)["a"].state == "done" and jobs.started == []


def test_the_table(experiment, tmp_path):
    a, b, c = plan(experiment)
    logs = tmp_path / "runs/logs"
    logs.mkdir(parents=True)
    finish(a)
    record_path(logs, b.name).write_text(json.dumps({"state": "failed", "launches": 2, "reason": "signal 9"}))
    c.folder.mkdir(parents=True)
    with open(claim_of(logs, c.name), "w"):
        pass
    lock = FolderLock(c.folder)
    try:
        lines = cells.table(cells.cells_of(experiment, [a, b, c]))
        before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
        assert cells.table(cells.cells_of(experiment, [a, b, c])) == lines
        assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before
    finally:
        lock.close()
    assert lines == [
        "3 runs: 1 done, 1 running, 1 failed",
        "  c-seed0  running  starting",
        "  b-seed0  failed   to do  launch 2  signal 9",
        "  a-seed0  done",
    ]
    assert cells.table(cells.cells_of(experiment, [a, b, c]), 3)[2] == "  and 2 more"


def test_the_table_is_drawn_in_place(capsys):
    lines = ["one", "two"]
    screen = Screen(lambda most: lines, is_terminal=True)
    screen.refresh()
    screen.refresh()  # too soon
    screen.say("an event")
    screen.refresh()
    assert capsys.readouterr().out == "one\ntwo\n\x1b[2F\x1b[Jan event\none\ntwo\n"


def test_slots():
    def places(*words):
        return [",".join(slot.gpus) for slot in slots_of(*words)]

    assert places(None, 1, []) == [""] and places(3, 1, []) == ["", "", ""]
    assert places(None, 1, ["0", "1", "2"]) == ["0", "1", "2"]
    assert places(None, 2, ["4", "5", "6", "7", "8"]) == ["4,5", "6,7"]
    assert places(4, 1, ["0", "1"]) == ["0", "1", "0", "1"]
    assert places(None, None, ["0", "1"]) == ["0,1"] and places(None, 8, ["0", "1"]) == ["0,1"]
    assert processes_of(["--num_processes", "2"]) == processes_of(["--num-processes=2"]) == 2
    assert processes_of(["--config_file", "x.yaml"]) is None


def test_several_processes_side_by_side_take_a_free_port(experiment):
    [run, *_] = plan(experiment)
    alone, beside = (command_of(experiment, run, is_alone) for is_alone in (True, False))
    assert alone == beside and "--main_process_port" not in alone
    several = experiment.model_copy(update={"launch": ["--num_processes", "2"]})
    command = command_of(several, run, is_alone=False)
    assert command[command.index("--main_process_port") + 1] == "0"
    assert "--main_process_port" not in command_of(several, run, is_alone=True)


def test_runs_side_by_side_on_the_same_gpus_are_refused(experiment):
    given = {"launch": ["--gpu_ids", "0,1", "--num_processes", "1"]}
    with pytest.raises(UserError, match="launch has --gpu_ids, .*: set CUDA_VISIBLE_DEVICES"):
        LocalJobs(experiment.model_copy(update=given | {"jobs": 2}))
    with LocalJobs(experiment.model_copy(update=given | {"jobs": 1})) as jobs:
        assert jobs.is_alone
