"""What a run will write, by hand, and what happens if there is no room for it."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from sushi_research.config import SD15Training
from sushi_research.errors import UserError
from sushi_research.models import sd15
from sushi_research.runs.job import Job
from sushi_research.training import disk_plan
from sushi_research.training.disk_plan import DiskPlan
from sushi_research.training.length import due_of

MIB = 2**20
NONE = {"enabled": False, "prompts": [], "every": 250}
IMAGES = [SimpleNamespace(width=64, height=64)] * 2


@pytest.fixture
def job(tmp_path):
    """A job of ten steps whose run and cache are in a folder."""

    def make(**changes):
        sections = {
            "model": {"base": "x"},
            "data": {"path": "x", "resolution": 64},
            "train": {"steps": 10},
            "optimizer": {"name": "adamw"},
            "checkpoint": {"every": 2, "keep": 2},
            "sample": {"prompts": ["a", "b"], "every": 5},
            "evaluation": {},
            "ema": {},
            "lora": {},
            "run": {"folder": str(tmp_path / "runs"), "name": "trial"},
            "cache": {"folder": str(tmp_path / "new/cache")},
        }
        for section, values in changes.items():
            sections[section] = sections[section] | values
        accelerator = SimpleNamespace(num_processes=1, is_main_process=True, device="cpu")
        return Job(SD15Training(**sections), sd15, accelerator, "fp32")

    return make


def planned(job, cache, images=IMAGES):
    due = due_of(job.config, steps=10, items=10, global_batch_size=1)
    return disk_plan.plan_run(job, cache, 10, due, 1000, images)


def test_the_bytes_of_a_new_run(job):
    found = planned(job(), 500)
    # Saved at 2, 4, 6, 8 and 10: two are kept, and a third exists while it is saved. Weights and two averages in fp32; each has an
    # adapter file in fp16.
    assert (found.checkpoint_count, found.checkpoints, found.adapter, found.cache) == (3, 3 * 1000 * 12, 5 * 2000, 500)
    # Two prompts at 0, 5 and 10, and a line for each step.
    assert found.others == 2 * 2 * 64 * 64 * (2 * 3 + 8) + 7000
    assert planned(job(checkpoint={"every": None}), 0).checkpoint_count == 1
    assert planned(job(optimizer={"name": "torch.optim.SGD"}), 0).checkpoints == 3 * 1000 * 4
    assert planned(job(), 0, ()).others == 7000, "no images"
    # Pictures at 0, 4, 8 and 10: three of held-out captions, two of neutral ones, which are smaller.
    evaluation = {"held_out": 0.5, "every": 4, "pictures": 3, "drift_captions": ["a", "b"]}
    changes = {"sample": NONE | {"width": 32}, "evaluation": evaluation}
    assert planned(job(**changes), 0, ()).others == 2 * 4 * (3 * 64 * 64 + 2 * 32 * 64) + 7000


def test_what_is_there_does_not_count(job, tmp_path):
    for step in (4, 6):
        (tmp_path / f"runs/trial/checkpoints/step-{step:08d}").mkdir(parents=True)
    found = planned(job(), 500)
    assert (found.checkpoint_count, found.adapter) == (1, 2 * 2000)
    assert found.others == 2 * 2 * 64 * 64 * (2 * 1 + 8) + 7000 * 4 // 10
    (tmp_path / "runs/trial/checkpoints/step-00000010").mkdir()
    assert planned(job(), 500).run == 2000
    (tmp_path / "runs/trial/trial.safetensors").touch()
    assert planned(job(), 500) == DiskPlan(0)
    assert planned(job(), 500).parts() == "nothing"


def test_what_a_start_removes_first_does_not_count(job, tmp_path):
    checkpoints = tmp_path / "runs/trial/checkpoints"
    (checkpoints / ".step-00000006.0123abcd.tmp").mkdir(parents=True)
    (checkpoints / ".step-00000006.0123abcd.tmp/state.pt").write_bytes(bytes(9000))
    (checkpoints / ".step-00000008.0123abcd.tmp").touch()
    assert planned(job(), 500).checkpoints == 3 * 1000 * 12 - 9000


def test_the_adapter_takes_the_room_of_a_checkpoint_that_was_removed(job):
    # Before the adapter is written, the third checkpoint makes room for it. If all are kept, nothing does.
    assert planned(job(checkpoint={"keep_adapters": 0}), 0).run == 3 * 1000 * 12
    assert planned(job(checkpoint={"keep": 5, "keep_adapters": 0}), 0).run == 5 * 1000 * 12 + 2000
    # The files of the four checkpoints before it are there already.
    assert planned(job(), 0).run == 3 * 1000 * 12 + 4 * 2000
    assert "3 adapter files 6 KiB" in planned(job(checkpoint={"keep_adapters": 2}), 0).parts()


@pytest.mark.parametrize(("finished_at", "adapter"), [(10, 0), (12, 0), (8, 2000)])
def test_a_finished_run_needs_no_checkpoints_to_be_finished(job, tmp_path, finished_at, adapter):
    folder = tmp_path / "runs/trial"
    folder.mkdir(parents=True)
    record = {"format": 2, "steps": 10, "finished_at": finished_at, "wandb_id": "x", "identity": {}}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "trial.safetensors").touch()
    found = planned(job(), 500)
    assert found.adapter == adapter and (found == DiskPlan(0)) is (not adapter)


def with_free(monkeypatch, free, total=10**12):
    asked = []
    usage = SimpleNamespace(total=total, used=total - free, free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(Path(path)) or usage)
    return asked


def check(job, plan):
    disk_plan.require_room(job, plan, disk_plan.rooms_of(job, plan))


def test_too_little_room_is_refused(job, monkeypatch, tmp_path, capsys):
    plan = DiskPlan(cache=4 * MIB, checkpoints=3 * MIB, checkpoint_count=3, adapter=MIB, others=2 * MIB)
    asked = with_free(monkeypatch, 8 * MIB - 1)
    with pytest.raises(UserError) as caught:
        check(job(), plan)
    assert str(caught.value) == (
        f"too little space: 8 MiB free on the disk of {tmp_path}/new/cache and {tmp_path}/runs/trial, and at least 8 MiB will be "
        "written there (cache 4 MiB, 3 checkpoints 3 MiB, adapter 1 MiB, samples and results about 2 MiB): free 2 MiB there, or "
        "give --cache.folder or --run.folder on another disk, or lower --checkpoint.keep."
    )
    assert asked == [tmp_path], "the nearest folder that exists, once for both"
    with_free(monkeypatch, 8 * MIB)
    check(job(), plan)
    assert "warning: 8 MiB free" in capsys.readouterr().out
    with_free(monkeypatch, 10 * MIB)
    check(job(), plan)
    assert capsys.readouterr().out == ""


def test_a_file_system_that_does_not_tell_refuses_nothing(job, monkeypatch):
    with_free(monkeypatch, 0, total=0)
    check(job(), DiskPlan(MIB))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    check(job(), DiskPlan(MIB))


def test_each_disk_is_checked_for_what_is_written_there(job, monkeypatch, tmp_path):
    monkeypatch.setattr(disk_plan, "_device", lambda folder: "cache" if "new" in str(folder) else "run")
    (tmp_path / "new").mkdir()
    monkeypatch.setattr(
        shutil,
        "disk_usage",
        lambda path: shutil._ntuple_diskusage(10**9, *((10**9, 0) if "new" in str(path) else (0, 10**9))),
    )
    check(job(), DiskPlan(cache=0, checkpoints=MIB, checkpoint_count=1))
    with pytest.raises(UserError, match=f"0 bytes free on the disk of {tmp_path}/new/cache, and at least 1 byte"):
        check(job(), DiskPlan(cache=1, checkpoints=MIB, checkpoint_count=1))


def test_blocks_that_are_reserved_for_root_are_room_for_root(job, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10 * MIB, used=5 * MIB, free=0))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    check(job(), DiskPlan(5 * MIB))
    assert "warning: 0 bytes free" in capsys.readouterr().out
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UserError, match="0 bytes free"):
        check(job(), DiskPlan(5 * MIB))


def test_two_quotas_of_one_disk_are_not_one(job, monkeypatch):
    space = {"cache": (9 * MIB, MIB), "run": (2 * MIB, 8 * MIB)}
    monkeypatch.setattr(disk_plan, "_existing", lambda folder: "cache" if "cache" in str(folder) else "run")
    monkeypatch.setattr(disk_plan, "_device", lambda folder: 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10 * MIB, *space[place]))
    check(job(), DiskPlan(cache=MIB, checkpoints=7 * MIB, checkpoint_count=1))


def test_checkpoints_that_a_link_puts_on_another_disk_are_not_judged(job, monkeypatch):
    with_free(monkeypatch, 0)
    monkeypatch.setattr(disk_plan, "_existing", lambda folder: folder)
    monkeypatch.setattr(disk_plan, "_device", lambda folder: folder.name == "checkpoints")
    check(job(), DiskPlan(cache=0, checkpoints=MIB, checkpoint_count=1))


def test_a_command_that_trains_no_run_needs_none(tmp_path):
    cache = SimpleNamespace(folder=str(tmp_path / "cache"))
    [room] = disk_plan.rooms_of(SimpleNamespace(config=SimpleNamespace(cache=cache), model=sd15), DiskPlan(MIB))
    assert [*room.folders] == ["cache.folder"] and room.least == MIB and room.free


def test_averages_are_in_checkpoints_files_and_snapshots(job):
    # One exponential and two power-function averages in fp32; snapshots at 3, 6, 9 and 10, of two lengths in fp16.
    ema = {"ema": {"decay": 0.9, "post_hoc": True, "every": 3}}
    found = planned(job(**ema), 0)
    assert found.checkpoints == 3 * 1000 * (12 + 3 * 4)
    assert (found.adapter, found.averages) == (6 * 2000, 4 * 2 * 2000)
    assert found.run == found.checkpoints + found.averages + found.adapter - 2000
    assert "6 adapter files 12 KiB, snapshots of averages 16 KiB" in found.parts()
    assert planned(job(**ema, lora={"save_dtype": "float32"}), 0).averages == 4 * 2 * 4000
