"""One system call of a run fails, by strace; `make faults-io N=100` lets a hundred fail."""

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("fault_injection")]


def test_a_failing_call_is_one_sentence(tmp_path, monkeypatch):
    from testing import faults, io_faults
    from testing.launches import Launcher
    from testing.system_calls import Fault, Untraceable, find_strace

    finished = []
    monkeypatch.setattr(faults, "finish", lambda *arguments: finished.append(arguments))
    test = faults.FaultTest(0, "mkdir, ENOSPC", io_faults.sampling_setups()[0])
    try:
        find_strace()
        io_faults.one_fault(
            test, Fault("mkdir", "ENOSPC", "cache/latents", 1), Launcher(tmp_path), None, tmp_path / "test"
        )
    except Untraceable as reason:
        pytest.skip(str(reason))
    assert (test.status, test.wrong) == (2, []) and len(finished) == 1
    assert "status 2, error: " in test.events[0]
    assert "(INJECTED)" in (tmp_path / "test/calls").read_text()
