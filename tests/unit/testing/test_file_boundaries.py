"""What ckpt-chaos recorded of a kill is read, and the flags that come from its method are explained."""

import json

import pytest

from sushi_research.errors import UserError
from testing import file_boundaries
from testing.file_boundaries import DRIFT, HALVED, Judged, judge, read_judged, table, tool_command

EXPECTED = {"adapter.safetensors": "a", "metrics.jsonl": "m", "checkpoints/step-00000002": "c"}


def record(mode="before", *, raised=None, drift=False, crashed=True, newest=2, used=2):
    outcome = {"raised": raised, "resumed_from_step": used, "newest_complete_step": newest, "weights_diff": 0.0}
    return {
        "order": 1,
        "label": "#1",
        "rc": 137,
        "crashed": crashed,
        "drift": drift,
        "point": [1, mode],
        "outcome": outcome,
    }


def judged(recorded, verdict="PASS", names=("run.json", "run.json"), **found):
    return judge(recorded, verdict, names, EXPECTED | found, EXPECTED)


def test_a_kill_is_recovered_from_lost_or_different():
    assert judged(record()).recovered
    changed = judge(
        record(), "SILENT_DIVERGENCE", ("run.json", "run.json"), {**EXPECTED, "metrics.jsonl": "x"}, EXPECTED
    )
    assert (changed.recovered, changed.lost, changed.different) == (False, (), ("metrics.jsonl",))
    less = {what: value for what, value in EXPECTED.items() if what != "adapter.safetensors"}
    lost = judge(record(), "SILENT_DIVERGENCE", ("x", "x"), less | {"checkpoints/step-00000002": "damaged"}, EXPECTED)
    assert lost.lost == ("adapter.safetensors", "checkpoints/step-00000002") and lost.different == ()
    older = judged(record(used=None), "LOST_WORK")
    assert older.lost == ("the checkpoint of step 2: resumed from step 0",) and not older.recovered
    failed = judged(record(raised="ExitCode2"), "HARD_FAIL")
    assert (failed.recovered, failed.failed) == (False, "ExitCode2")


def test_flags_that_come_from_the_method_are_explained():
    halved = judge(
        record("torn"), "SILENT_DIVERGENCE", ("metrics.jsonl",) * 2, EXPECTED | {"metrics.jsonl": "half"}, EXPECTED
    )
    assert halved.recovered and halved.flags == (HALVED,)
    # The same difference after another kill, and another difference after the same kill, are faults.
    assert not judge(
        record(), "SILENT_DIVERGENCE", ("metrics.jsonl",) * 2, {**EXPECTED, "metrics.jsonl": "x"}, EXPECTED
    ).recovered
    worse = EXPECTED | {"metrics.jsonl": "half", "adapter.safetensors": "x"}
    assert not judge(record("torn"), "SILENT_DIVERGENCE", ("metrics.jsonl",) * 2, worse, EXPECTED).recovered
    assert judged(record(drift=True), names=(".run.json.0123abcd.tmp", ".run.json.89abcdef.tmp")).flags == (DRIFT,)
    moved = judged(record(drift=True), names=(".run.json.0123abcd.tmp", ".plan.json.89abcdef.tmp")).flags
    assert moved == ("killed at .plan.json.89abcdef.tmp in place of .run.json.0123abcd.tmp",)
    assert judged(record(crashed=False)).flags == ("not killed",)


def test_the_table_counts_each_setup():
    points = [judged(record()), judged(record(drift=True), names=(".a.01234567.tmp", ".a.76543210.tmp"))]
    points.append(judged(record(used=0), "LOST_WORK"))
    lines = table(
        [Judged("sd15-1-plain", 0, 60, points), Judged("sdxl-2-plain", 1, 9, points[:1])], "note"
    ).splitlines()
    assert lines[2] == f"| train_sd15_lora.py, 1 | process 0 | 60 | 3 | 2 | 0 | 1 | 0 | 1: {DRIFT} |"
    assert lines[3] == "| train_sdxl_lora.py, 2 | process 1 | 9 | 1 | 1 | 0 | 0 | 0 | none |"
    assert lines[4] == "| all |  | 69 | 4 | 3 | 0 | 1 | 0 |  |" and lines[-1] == "note"


def test_a_folder_of_ckpt_chaos_is_read(tmp_path, monkeypatch):
    pytest.importorskip("ckpt_chaos")
    monkeypatch.setattr(file_boundaries, "fingerprint", lambda run: EXPECTED)
    for name, event in (("reference", ".a.01234567.tmp"), ("pt_001", ".a.76543210.tmp")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "events.log.rank0").write_text(f"1\topen\t{event}\t1\n")
    (tmp_path / "pt_001/result.json").write_text(json.dumps(record(drift=True)))
    with pytest.raises(UserError, match="two runs of sd15-1-plain without a kill differ, or failed"):
        read_judged(tmp_path, "sd15-1-plain", 0)
    (tmp_path / "pt_control").mkdir()
    control = record() | {"order": 0, "label": "no crash (control)", "rc": 0, "crashed": False}
    (tmp_path / "pt_control/result.json").write_text(json.dumps(control))
    found = read_judged(tmp_path, "sd15-1-plain", 0)
    assert found.events == 1 and [point.flags for point in found.points] == [(DRIFT,)]


def test_the_command_of_ckpt_chaos():
    command = tool_command("s.py", 2, 1, {"run.name": "run", "lora.targets": ["a"]}, work="w", points=7)
    assert command[-5:] == ["s.py", "--run.name", "run", "--lora.targets", '["a"]']
    assert command[command.index("--crash-rank") + 1] == "1" and command[command.index("--max-points") + 1] == "7"
