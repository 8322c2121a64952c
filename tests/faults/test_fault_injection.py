"""The short fault injection: every kind of fault once, on a real script; the long one is `make chaos N=100`."""

import dataclasses

import pytest

from sushi_research.errors import UserError

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("fault_injection")]
# States in 8 bits, bf16, dropout, and all else that a step may depend on. Two processes: tests/scripts/test_equivalence.py.
SETUP = "sd15-1"


@pytest.fixture(scope="module")
def injected(tmp_path_factory):
    """One test of each kind: the exit status, the table, and the folder that is kept, with the uninterrupted run."""
    from testing import fault_injection

    folder = tmp_path_factory.mktemp("faults")
    words = ["--tests", "10", "--setup", SETUP, "--output", str(folder / "table.md"), "--keep", str(folder / "kept")]
    status = fault_injection.main(fault_injection.parse(words))
    return status, (folder / "table.md").read_text(), folder / "kept"


def test_every_kind_of_fault_ends_as_if_nothing_had_happened(injected):
    status, table, _ = injected
    assert status == 0, table
    rows = [line for line in table.splitlines() if line.startswith("| ") and (" of " in line or line.endswith("- |"))]
    assert len(rows) == 11 and " 0 of 1 " not in table


def test_an_unknown_setup_is_one_sentence():
    from testing import fault_injection

    with pytest.raises(UserError, match="--setup sd3-1 is unknown: choose from sd15-1, sdxl-1,"):
        fault_injection.main(fault_injection.parse(["--setup", "sd3-1"]))


def test_a_run_that_differs_is_reported(injected, tmp_path, monkeypatch, capsys):
    from testing import fault_injection, faults
    from testing.launches import Setup

    class AnotherSeed(Setup):
        """The setup with another seed: what a trainer that does not continue exactly comes to."""

        @property
        def settings(self):
            return super().settings | {"train.seed": 1}

    def another_run(test, launcher, reference, place, rng):
        test.setup = AnotherSeed(*dataclasses.astuple(test.setup))
        faults.finish(test, launcher, reference, place)

    place = injected[2] / "reference" / SETUP
    reference = faults.Reference(place / "runs/run", place / "cache", seconds=1.0, writes=1)
    monkeypatch.setattr(fault_injection, "make_reference", lambda *_: reference)
    monkeypatch.setitem(faults.FAULTS, "killed", another_run)
    words = ["--tests", "1", "--kind", "killed", "--setup", SETUP, "--keep", str(tmp_path / "kept")]
    assert fault_injection.main(fault_injection.parse(words)) == 1
    printed = capsys.readouterr()
    assert "| all | 0 of 1 | 0 of 1 |" in printed.out
    assert f"1 of 1 tests differ; their files are in {tmp_path / 'kept'}" in printed.err
    assert "differs: run: the adapter" in printed.err and (tmp_path / "kept/test-000/runs/run").is_dir()
