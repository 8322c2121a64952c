import os
import signal
import threading
import time

import pytest

from sushi_research import workers
from sushi_research.workers import Worker, WorkerEnded, results


def call(job, worker):
    return worker(job) if worker else job * 2


def test_every_job_is_done_once_in_threads():
    found = list(results(range(100), call, count=3))
    assert sorted(found) == [(job, job * 2) for job in range(100)]
    assert list(results([], call, count=3)) == []


def test_every_job_is_done_once_in_processes():
    found = dict(results((f"/x/{job}" for job in range(20)), call, count=2, function=os.path.basename))
    assert found == {f"/x/{job}": str(job) for job in range(20)}


def test_an_error_in_a_worker_is_raised_and_the_worker_goes_on():
    with Worker(os.path.getsize) as worker:
        with pytest.raises(FileNotFoundError):
            worker("/no/such/file")
        assert worker(__file__) == os.path.getsize(__file__)
    with Worker(eval) as worker, pytest.raises(TypeError, match="cannot pickle"):
        worker("__import__('os')")


def test_a_worker_that_is_killed_says_so():
    with Worker(time.sleep) as worker:
        threading.Timer(0.5, lambda: os.kill(worker._process.pid, signal.SIGKILL)).start()
        with pytest.raises(WorkerEnded, match="killed by SIGKILL"):
            worker(60)


def test_an_iteration_that_ends_early_gives_up_what_its_workers_do():
    jobs = results([0, 3600], call, count=2, function=time.sleep)
    assert next(jobs) == (0, None)
    jobs.close()  # it would wait an hour


def test_a_keyboard_interrupt_in_a_thread_ends_the_iteration():
    seen = []

    def interrupted(job, worker):
        if job == 3:
            raise KeyboardInterrupt
        return job

    with pytest.raises(KeyboardInterrupt):
        for job, _ in results(range(10**9), interrupted, count=1):
            seen.append(job)
    assert seen == [0, 1, 2]


def test_a_worker_imports_neither_torch_nor_the_script():
    with Worker(eval) as worker:
        assert worker("'torch' in __import__('sys').modules or 'pytest' in __import__('sys').modules") is False


def test_a_container_has_the_cores_of_its_share(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_SHARE", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    found = []
    for text in (None, "max 100000\n", "250000 100000\n", "1000 100000\n", "odd"):
        if text is not None:
            workers._SHARE.write_text(text)
        found.append(workers.cores())
    assert found == [64, 64, 3, 1, 64]
