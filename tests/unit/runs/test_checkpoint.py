"""Checkpoints: what is saved comes back, the newest N stay, and damage is never used nor silent."""

import json
import logging
import os
import sys
from collections import OrderedDict

import pytest
import torch

from sushi_research.errors import UserError
from sushi_research.runs.checkpoint import latest_checkpoint, read_checkpoint, save_checkpoint

FACTS = {"samples_seen": 480, "epoch": 2, "world": 1, "identity": {"lora.rank": 4, "optimizer.lr": 1e-4}}


def save(folder, step, keep=10, **facts):
    return save_checkpoint(folder, step, {"value": torch.full((100,), float(step))}, FACTS | facts, keep)


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def flip_bit(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_what_is_saved_comes_back_as_it_was(tmp_path):
    state = {
        "adapter": OrderedDict(a=torch.randn(3, 4), b=torch.randn(2, dtype=torch.bfloat16)),
        "optimizer": {"state": {0: {"step": torch.tensor(7.0), "q": torch.arange(5, dtype=torch.uint8)}}},
        "groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "fused": None, "amsgrad": False}],
        "scaler": {"scale": 65536.0, "name": "fp16"},
    }
    path = save_checkpoint(tmp_path / "checkpoints", 120, state, FACTS, keep=1)
    found = latest_checkpoint(tmp_path / "checkpoints")
    assert (found.path, found.step, found.facts) == (path, 120, FACTS)
    assert path.name == "step-00000120" and names(path) == ["manifest.json", "state.pt"]
    loaded = found.load()
    for one, other in (
        (loaded["adapter"]["a"], state["adapter"]["a"]),
        (loaded["adapter"]["b"], state["adapter"]["b"]),
        (loaded["optimizer"]["state"][0]["q"], state["optimizer"]["state"][0]["q"]),
    ):
        assert one.dtype == other.dtype and torch.equal(one, other)
    assert loaded["groups"] == state["groups"] and loaded["scaler"] == state["scaler"]


def test_only_what_loads_without_pickle_is_accepted(tmp_path):
    with pytest.raises(AssertionError, match=r"state\['rng'\]\[1\] is a object"):
        save_checkpoint(tmp_path, 1, {"rng": [1, object()]}, FACTS, keep=1)
    with pytest.raises(AssertionError, match="Parameter"):
        save_checkpoint(tmp_path, 1, {"p": torch.nn.Parameter(torch.zeros(1))}, FACTS, keep=1)
    assert names(tmp_path) == []


def test_the_newest_stay(tmp_path):
    for step in (5, 10, 20, 100):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000020", "step-00000100"]
    save(tmp_path, 100_000_000, keep=1)
    assert names(tmp_path) == ["step-100000000"]
    assert latest_checkpoint(tmp_path).step == 100_000_000


def test_a_truncated_one_is_not_counted_among_those_kept(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    os.truncate(tmp_path / "step-00000003" / "state.pt", 10)
    save(tmp_path, 4, keep=2)
    assert names(tmp_path) == ["step-00000002", "step-00000004"]


def test_saving_a_step_again_leaves_the_whole_one_alone(tmp_path):
    path = save(tmp_path, 3, world=1)
    before = (path / "state.pt").stat().st_ino
    assert save(tmp_path, 3, world=2) == path
    assert (path / "state.pt").stat().st_ino == before
    assert read_checkpoint(path).facts["world"] == 1


def test_saving_a_step_again_replaces_a_damaged_one(tmp_path):
    path = save(tmp_path, 3)
    flip_bit(path / "state.pt", 700)  # the size stays, so only the checksum tells
    save(tmp_path, 3)
    assert torch.equal(read_checkpoint(path).load()["value"], torch.full((100,), 3.0))
    assert names(tmp_path) == ["step-00000003"]


def test_later_steps_go_when_the_run_went_back_behind_them(tmp_path):
    save(tmp_path, 10)
    flip_bit(save(tmp_path, 20) / "state.pt", 700)
    assert latest_checkpoint(tmp_path).step == 10
    save(tmp_path, 15, keep=2)
    assert names(tmp_path) == ["step-00000010", "step-00000015"]


def test_no_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path / "missing") is None
    (tmp_path / "notes.txt").write_text("mine")
    assert latest_checkpoint(tmp_path) is None
    assert names(tmp_path) == ["notes.txt"]


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    save(tmp_path, 1)
    leftover = tmp_path / ".step-00000002.0123abcd.tmp"
    leftover.mkdir()
    (leftover / "state.pt").write_bytes(b"half")
    (tmp_path / ".DS_Store").write_bytes(b"not ours")
    assert latest_checkpoint(tmp_path).step == 1
    assert names(tmp_path) == [".DS_Store", "step-00000001"]


@pytest.mark.parametrize("other", [1, 3])
def test_another_format_is_refused_and_not_taken_for_damage(tmp_path, monkeypatch, other):
    monkeypatch.setattr("sushi_research.runs.checkpoint.FORMAT", other)
    save(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(UserError, match=f"has format {other}, this version reads format 2; continue with the version"):
        latest_checkpoint(tmp_path)


def test_a_damaged_fact_is_noticed(tmp_path, caplog):
    save(tmp_path, 10)
    path = save(tmp_path, 20) / "manifest.json"
    path.write_text(path.read_text().replace('"samples_seen": 480', '"samples_seen": 481'))
    assert latest_checkpoint(tmp_path).step == 10
    assert "manifest.json does not hold what was written" in caplog.text


def test_a_renamed_checkpoint_is_noticed(tmp_path):
    save(tmp_path, 10).rename(tmp_path / "step-00000011")
    with pytest.raises(UserError, match="no whole checkpoint is left"):
        latest_checkpoint(tmp_path)


def test_one_warning_for_each_damaged_one(tmp_path, caplog):
    for step in (10, 20, 30):
        save(tmp_path, step)
    (tmp_path / "step-00000030" / "state.pt").unlink()
    (tmp_path / "step-00000020" / "manifest.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path).step == 10
    first, second = (record.getMessage() for record in caplog.records)
    assert first == f"checkpoint {tmp_path}/step-00000030 is damaged (state.pt is missing); using step-00000010 instead"
    assert second.startswith(f"checkpoint {tmp_path}/step-00000020 is damaged (manifest.json is not valid JSON")


@pytest.mark.skipif(sys.platform != "linux", reason="finds an open file's name under /proc")
def test_everything_is_on_the_disk_before_the_name_appears(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(descriptor):
        events.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def recorded_rename(source, target):
        events.append(("rename", os.path.basename(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    save(tmp_path, 7)
    hidden = events[2][1]
    assert hidden.startswith(".step-00000007.")
    assert events == [
        ("sync", "state.pt"),
        ("sync", "manifest.json"),
        ("sync", hidden),
        ("rename", "step-00000007"),
        ("sync", tmp_path.name),
    ]


def test_the_manifest_can_be_read_by_anyone(tmp_path):
    manifest = json.loads((save(tmp_path, 7) / "manifest.json").read_text())
    size = (tmp_path / "step-00000007" / "state.pt").stat().st_size
    assert manifest["format"] == 2 and manifest["step"] == 7 and manifest["facts"] == FACTS
    assert manifest["files"]["state.pt"]["bytes"] == size
