"""A run folder that is moved, deleted or replaced while a run is using it: the run stops, and nothing of another run is touched."""

import os
import shutil
import sys

import pytest

from sushi_research.errors import UserError
from sushi_research.runs import folder_lock
from sushi_research.runs.run_folder import open_run_folder

ONE = pytest.mark.parametrize("architecture", ["sd15"])
# Every kind of file that a run writes.
EVERYTHING = {
    "train.steps": 1,
    "evaluation.held_out": 0.25,
    "evaluation.noise_samples": 4,
    "evaluation.drift_captions": ["a plain wall"],
    "sample.enabled": True,
    "sample.prompts": ["a cat"],
    "sample.steps": 1,
    "checkpoint.keep": 1,
}


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def begun_again(folder):
    """Another run in the place of `folder`, of which a writer would find and replace everything."""
    shutil.rmtree(folder)
    folder.mkdir()
    for name in ("metrics.jsonl", "run.json", "lost.safetensors", "checkpoints"):
        (folder / name).write_text("of another run")


@ONE
@pytest.mark.parametrize("how", ["begun again", "renamed", "a link to another"])
def test_the_run_stops_at_the_next_step(trainer, monkeypatch, tmp_path, how):
    folder, step, before = trainer.folder("lost"), trainer.script.training_step, {}

    def lose(job, unet, batch, *rest):
        if batch.step == 1 and not before:
            if how == "begun again":
                begun_again(folder)
            else:
                shutil.move(folder, tmp_path / "elsewhere")
            if how == "a link to another":
                (tmp_path / "other").mkdir()
                begun_again(tmp_path / "other")
                folder.symlink_to(tmp_path / "other")
            before.update(content(folder) if folder.exists() else {"nothing": b""})
        step(job, unet, batch, *rest)

    monkeypatch.setattr(trainer.script, "training_step", lose)
    with pytest.raises(UserError, match="the run folder .*lost was moved, deleted or replaced"):
        trainer.train("lost")
    assert folder.exists() == (how != "renamed")
    assert not folder.exists() or content(folder) == before


@ONE
@pytest.mark.parametrize("is_continued", [False, True])
def test_the_run_stops_where_it_was_lost_while_the_caches_were_filled(trainer, monkeypatch, is_continued):
    """What it then reads, its W&B id and its checkpoint, would be missing or of the run that is there now."""
    folder, fill_caches = trainer.folder("lost"), trainer.script.fill_caches
    if is_continued:
        trainer.train("lost", {"train.steps": 1})

    def lose(job, inputs):
        fill_caches(job, inputs)
        shutil.rmtree(folder)

    monkeypatch.setattr(trainer.script, "fill_caches", lose)
    with pytest.raises(UserError, match="the run folder .*lost was moved, deleted or replaced"):
        trainer.train("lost", {"train.steps": 2})


@ONE
def test_every_write_checks_first_that_the_folder_is_the_same(trainer, monkeypatch, with_curves):
    """Also a later write that somebody adds: the check comes before each file that is opened for writing, renamed or removed."""
    folder, checked, unchecked, on = str(trainer.folder("watched")), [False], [], [True]
    real = folder_lock.FolderLock.require_same
    monkeypatch.setattr(folder_lock.FolderLock, "require_same", lambda lock: real(lock) or checked.__setitem__(0, True))

    def watch(event, arguments):
        if not on[0] or event not in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"):
            return
        # Without what is removed below a hidden name, which is this process's own.
        path = str(arguments[1] if event == "os.rename" else arguments[0])
        if not path.startswith(folder + os.sep) or path.endswith(folder_lock.NOTE):
            return
        writes = event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not writes or (event in ("os.remove", "os.rmdir", "shutil.rmtree") and ".tmp" in path):
            return
        if not checked[0]:
            unchecked.append((event, path))
        # A folder that was just made is written into at once.
        checked[0] = event == "os.mkdir"

    sys.addaudithook(watch)  # it stays for good, so it is switched off at the end
    try:
        trainer.train("watched", EVERYTHING)
        trainer.train("watched", {**EVERYTHING, "train.steps": 2})
    finally:
        on[0] = False
    assert unchecked == []
    written = {path.name for path in trainer.folder("watched").iterdir()}
    assert {"metrics.jsonl", "evaluation.parquet", "drift.parquet", "samples", "loss.png", "checkpoints"} <= written


def test_the_lock_is_the_folder_s_and_not_a_file_s(tmp_path):
    first = open_run_folder(tmp_path, "trial")
    (tmp_path / "trial" / ".lock").unlink()
    with pytest.raises(UserError, match="trial is in use by another process"):
        open_run_folder(tmp_path, "trial")
    os.rename(tmp_path / "trial", tmp_path / "renamed")
    with pytest.raises(UserError, match="renamed is in use"):
        open_run_folder(tmp_path, "renamed")
    second = open_run_folder(tmp_path, "trial")
    assert "was moved, deleted or replaced" in str(first.lost()) and second.lost() is None
    first.close()
    with pytest.raises(UserError, match="trial is in use by process"):
        open_run_folder(tmp_path, "trial")
    with pytest.raises(UserError, match="was moved, deleted or replaced"):
        shutil.rmtree(tmp_path / "trial")
        second.mark_started({}, 1)
    second.close()
    assert not (tmp_path / "trial").exists()


def test_a_run_folder_behind_a_link_is_the_same_folder(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    with open_run_folder(tmp_path / "runs", "trial") as run:
        assert run.lost() is None and run.mark_started({}, 1) == run.record()
        with pytest.raises(UserError, match="in use by process"):
            open_run_folder(tmp_path / "disk", "trial")
        run.remove_if_empty()
        assert run.record() is not None
