"""Several processes of which some fail: one error line, and all end."""

from __future__ import annotations

import pytest

from testing.forked_scripts import free_port, ranks

SCRIPT = """
import os, signal, sys
import torch.distributed as dist
from sushi_research.config.process import run_main
from sushi_research.errors import UserError
from sushi_research.runs.launch import one_report

@one_report()
def main(failing):
    dist.init_process_group("gloo")
    if failing in ("all", os.environ["RANK"]):
        raise UserError("a file is missing: restore it.")
    if failing == "killed" and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()

run_main(main, sys.argv[1])
"""


@pytest.mark.parametrize("failing", ["0", "1", "all", "killed"])
def test_one_process_reports(forked, tmp_path, failing):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    processes = [forked(str(script), failing, **environment) for environment in ranks(2, free_port())]
    statuses = [process.wait() for process in processes]
    assert statuses == ([2, -9] if failing == "killed" else [2, 2])
    said = "".join(process.err for process in processes)
    expected = "another process ended without a message" if failing == "killed" else "a file is missing: restore it."
    assert said.count("error: ") == 1 and f"error: {expected}" in said and "Traceback" not in said
