"""Runs side by side on this machine: how many, on which GPUs, and the threads that wait for them."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from sushi_research.errors import UserError
from sushi_research.experiments import launcher
from sushi_research.experiments.experiment import Planned
from sushi_research.experiments.experiment_file import Experiment
from sushi_research.experiments.run_work import LOGS, Outcome, RunWork


@dataclass(frozen=True)
class Slot:
    """A place for one run at a time: its GPUs, by what CUDA_VISIBLE_DEVICES calls them; none on a CPU."""

    number: int
    gpus: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        return f"GPU {','.join(self.gpus)}" if self.gpus else ""


def slots_of(jobs: int | None, processes: int | None, gpus: Sequence[str]) -> list[Slot]:
    """The slots of a machine with these GPUs, for runs of so many processes each (None: not known, so each run has all GPUs).

    `jobs` null: as many as the GPUs allow, at least one. With more jobs than that, GPUs are shared in turn.
    """
    if not gpus:
        return [Slot(number) for number in range(jobs or 1)]
    size = len(gpus) if processes is None else min(processes, len(gpus))
    fit = len(gpus) // size
    groups = [tuple(gpus[place * size : (place + 1) * size]) for place in range(fit)]
    return [Slot(number, groups[number % fit]) for number in range(jobs or fit)]


def processes_of(launch: Sequence[str]) -> int | None:
    """The number of processes that the arguments of accelerate launch ask for; None if they do not say it."""
    for number, word in enumerate(launch):
        name, equals, text = word.partition("=")
        if name.replace("-", "_") in ("__num_processes", "_n"):
            text = text if equals else "".join(launch[number + 1 : number + 2])
            return int(text) if text.isdecimal() and int(text) > 0 else None
    return None


def visible_gpus() -> list[str]:
    """The GPUs that CUDA shows to this process, by what CUDA_VISIBLE_DEVICES calls them. CUDA is not initialized."""
    import torch

    count, given = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name.strip() for name in given.split(",")][:count] if given else [str(number) for number in range(count)]


def command_of(experiment: Experiment, run: Planned, is_alone: bool) -> list[str]:
    """The command of a run: that of `accelerate launch`, with the exit status of the script."""
    launch = list(experiment.launch)
    if not is_alone and (processes_of(launch) or 2) > 1 and "main_process_port" not in " ".join(launch):
        launch += ["--main_process_port", "0"]  # a free one: the usual one is the same for all
    # By this Python, so that the virtual environment need not be activated.
    return [sys.executable, "-m", launcher.__name__, *launch, str(run.script), *run.arguments]


class LocalJobs:
    """Runs on this machine, each in a slot. A context manager: its end waits for them.

    With one slot, the output of a run goes to the terminal.
    """

    fills_first = True
    outlive = False

    def __init__(self, experiment: Experiment) -> None:
        needs_gpus = experiment.jobs is None or experiment.jobs > 1
        gpus = visible_gpus() if needs_gpus else []
        self.slots = slots_of(experiment.jobs, processes_of(experiment.launch), gpus)
        self.is_alone = len(self.slots) == 1
        if not self.is_alone and "gpu_ids" in " ".join(experiment.launch).replace("-", "_"):
            raise UserError(
                "launch has --gpu_ids, which would give all runs side by side the same GPUs: set CUDA_VISIBLE_DEVICES for the "
                "experiment, whose GPUs are shared out, or give jobs 1."
            )
        self._experiment = experiment
        self._pool = ThreadPoolExecutor(len(self.slots), "run")
        self._running: dict[Future[Outcome], tuple[RunWork, Slot]] = {}

    def __enter__(self) -> LocalJobs:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:  # nobody is left to look after them
            self.stop(signal.SIGTERM)
        self._pool.shutdown()

    def has_room(self) -> bool:
        """Whether another run can be started."""
        return len(self._running) < len(self.slots)

    def start(self, run: Planned, trains: bool) -> str:
        """Starts the work on a run; returns where. `trains`: false if it is only to be scored."""
        taken = [slot.number for _, slot in self._running.values()]
        slot = next(slot for slot in self.slots if slot.number not in taken)
        environment = {"WANDB_RUN_GROUP": Path(self._experiment.folder).name}
        if slot.gpus and not self.is_alone:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(slot.gpus)
        work = RunWork(
            run.name,
            run.folder,
            Path(self._experiment.folder) / LOGS,
            command_of(self._experiment, run, self.is_alone) if trains else None,
            self._experiment.score,
            environment=environment,
            on_terminal=self.is_alone,
            where=slot.where,
        )
        self._running[self._pool.submit(work)] = work, slot
        return slot.where

    def ended(self, seconds: float) -> list[tuple[str, Outcome]]:
        """(name, outcome) of the runs whose work has ended, after waiting at most so long for one."""
        if not self._running:
            time.sleep(seconds)
        done, _ = wait(self._running, timeout=seconds, return_when=FIRST_COMPLETED)
        return [(self._running.pop(each)[0].name, each.result()) for each in done]

    def left(self) -> list[str]:
        """The numbers of jobs that go on after `stop`: none."""
        return []

    def stop(self, number: int) -> None:
        """Asks all runs to save and stop, as by a signal. Called by signal handlers."""
        for work, _ in list(self._running.values()):
            work.stop(number)
