"""Several processes of which some fail: one error line, and all end."""

from __future__ import annotations

import pytest

from testing.forked_scripts import free_port, ranks

SCRIPT = """
import os, signal, sys
import torch.distributed as dist
from sushi_research import stopping
from sushi_research.config.process import run_main
from sushi_research.errors import UserError
from sushi_research.runs.launch import joining, one_report

@one_report()
def main(failing):
    with joining():
        dist.init_process_group("gloo")
    if failing in ("all", os.environ["RANK"]):
        raise UserError("a file is missing: restore it.")
    with stopping.doing("caching", "three images are kept"):
        number, _, rank = failing.partition(" to ")
        if rank == os.environ["RANK"]:
            os.kill(os.getpid(), getattr(signal, number))
        dist.barrier()

run_main(main, sys.argv[1])
"""


@pytest.mark.parametrize("failing", ["0", "1", "all", "SIGKILL to 1", "SIGHUP to 1", "SIGHUP to 0"])
@pytest.mark.slow
def test_one_process_reports(forked, tmp_path, failing):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    processes = [forked(str(script), failing, **environment) for environment in ranks(2, free_port())]
    statuses = [process.wait() for process in processes]
    said = "".join(process.err for process in processes)
    if failing.startswith("SIGHUP"):
        # The record of who ended is in process 0, unless a launcher keeps it.
        assert statuses == ([129, 129] if failing == "SIGHUP to 1" else [129, 2])
        name = "SIGHUP to process 1" if failing == "SIGHUP to 1" else "SIGHUP"
        assert said.splitlines() == [f"{name} while caching: three images are kept"]
        return
    killed = failing == "SIGKILL to 1"
    assert statuses == ([2, -9] if killed else [2, 2])
    expected = "another process ended without a message" if killed else "a file is missing: restore it."
    assert said.count("error: ") == 1 and f"error: {expected}" in said and "Traceback" not in said


def test_mpi_s_variables_by_themselves_are_one_sentence(forked, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("""
from accelerate import Accelerator
from sushi_research.config.process import run_main
from sushi_research.runs import launch

def main(_):
    with launch.joining():
        Accelerator(cpu=True)

run_main(main, None)
""")
    alone = forked(str(script), PMI_SIZE="2")
    assert alone.wait() == 2
    assert alone.err.startswith("error: the processes cannot begin together (") and alone.err.count("\n") == 1


def test_a_process_whose_others_never_come_ends(forked, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("""
import torch.distributed as dist
from sushi_research.runs import launch

launch.START_SECONDS = 0.2
with launch.joining():
    dist.init_process_group("gloo")
""")
    alone = forked(str(script), **ranks(2, free_port())[0])
    assert alone.wait() == 2
    assert alone.err.startswith("error: the processes cannot begin together (RANK 0, LOCAL_RANK 0, WORLD_SIZE 2, ")
    assert "the others did not come within 0.2 seconds" in alone.err and alone.err.count("\n") == 1
