"""Runs a function on many jobs at the same time, in threads or in processes of its own.

A worker process imports the module of its function and nothing else: no script, and no torch unless that module needs it. It is
started with a command line of its own, because `multiprocessing` would import the script again in every process, or copy one that
has threads. It ends with the process that started it, whatever ends that.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

Job = TypeVar("Job")

_LENGTH = struct.Struct("<Q")
# Microseconds that the processes of a container may compute in each period of so many (Linux, cgroup v2).
_SHARE = Path("/sys/fs/cgroup/cpu.max")
# Results that wait for their reader, per worker.
_WAITING = 64


def cores() -> int:
    """The number of processor cores that this process may use: in a container those of its share, not those of the machine."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else sys.maxsize
    with contextlib.suppress(OSError, ValueError):  # "max 100000" is no limit
        quota, period = map(int, _SHARE.read_text().split())
        allowed = min(allowed, -(-quota // period))
    return max(1, min(os.cpu_count() or 1, allowed))


class WorkerEnded(Exception):
    """A worker process ended in the middle of a job. `reason` says how: "killed by SIGKILL", or "exit status 1"."""

    def __init__(self, status: int) -> None:
        self.reason = f"exit status {status}"
        if status < 0:
            names = {number.value: number.name for number in signal.Signals}
            self.reason = f"killed by {names.get(-status, f'signal {-status}')}"
        super().__init__(self.reason)


class Worker:
    """A process that calls a function of a module for one job at a time. Jobs, results and errors are pickled."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        root = str(Path(__file__).parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            # -P: a file of the working folder is not taken for a module.
            [sys.executable, "-P", "-m", __name__, function.__module__, function.__qualname__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        )

    def __call__(self, job: Any) -> Any:
        """The function's result. Raises what the function raises, and WorkerEnded if the process ends before it answers."""
        try:
            _send(self._process.stdin, pickle.dumps(job, pickle.HIGHEST_PROTOCOL))
            failed, result = _receive(self._process.stdout)
        except (OSError, EOFError):
            raise WorkerEnded(self._process.wait()) from None
        if failed:
            raise result
        return result

    def end(self) -> None:
        """Ends the process at once, in the middle of a job too."""
        self._process.kill()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # what was not sent is lost with the process
                pipe.close()
        self._process.wait()


def results(
    jobs: Iterable[Job], call: Callable[[Job, Worker | None], Any], *, count: int, function: Callable | None = None
) -> Iterator[tuple[Job, Any]]:
    """Yields (job, call(job, worker)) in the order in which they are done, from `count` threads.

    Each thread has a `Worker` of `function`, or None without a function. The jobs are taken one by one, so that there may be many.
    An exception of a call, or a KeyboardInterrupt in it, is raised here. If the iteration ends early, running jobs in workers are
    given up, and others are waited for.
    """
    given, lock, stop = iter(jobs), threading.Lock(), threading.Event()
    done: queue.Queue[tuple[Any, Any, BaseException | None]] = queue.Queue(_WAITING * count)
    workers: list[Worker] = []

    def put(entry: tuple[Any, Any, BaseException | None]) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                return done.put(entry, timeout=0.1)

    def run() -> None:
        try:
            with contextlib.nullcontext() if function is None else Worker(function) as worker:
                workers.extend([worker] if worker else [])
                while not stop.is_set():
                    with lock:
                        job = next(given, _END)
                    if job is _END:
                        break
                    put((job, call(job, worker), None))
            put((_END, None, None))
        except BaseException as error:  # it goes on in the thread that iterates
            put((_END, None, error))

    threads = [threading.Thread(target=run, name=f"worker {number}", daemon=True) for number in range(count)]
    try:
        for thread in threads:
            thread.start()
        running = count
        while running:
            job, result, error = done.get()
            if error is not None:
                raise error
            if job is _END:
                running -= 1
            else:
                yield job, result
    finally:
        stop.set()
        for worker in list(workers):
            worker.end()
        for thread in threads:
            if thread.ident is not None:
                thread.join()


_END: Any = object()


def _send(pipe: BinaryIO, data: bytes) -> None:
    pipe.write(_LENGTH.pack(len(data)))
    pipe.write(data)
    pipe.flush()


def _receive(pipe: BinaryIO) -> Any:
    """The next value. Raises EOFError if the other side has ended."""
    header = pipe.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        raise EOFError
    (length,) = _LENGTH.unpack(header)
    data = pipe.read(length)
    if len(data) < length:
        raise EOFError
    return pickle.loads(data)


def _serve(module: str, name: str) -> None:
    """Answers jobs from stdin on stdout, until the other side ends."""
    # Ctrl-C in a terminal reaches every process of the command: the first one decides what happens.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    jobs, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    function = getattr(importlib.import_module(module), name)
    while True:
        try:
            job = _receive(jobs)
        except EOFError:
            return
        try:
            answer = pickle.dumps((False, function(job)), pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            answer = pickle.dumps((True, error))
        try:
            _send(answers, answer)
        except BrokenPipeError:
            os._exit(0)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
