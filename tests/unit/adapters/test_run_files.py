"""Which adapter file a run folder stands for."""

import json
import re
from pathlib import Path

import pytest

from sushi_research.adapters.run_files import model_settings, resolve, resolve_all
from sushi_research.errors import UserError
from sushi_research.runs.run_folder import RunFolder


@pytest.fixture
def run(tmp_path) -> RunFolder:
    """A run of 400 steps with the files of two steps on the way."""
    folder = RunFolder(tmp_path / "my cat", None)
    folder.path.mkdir()
    record = {"format": 2, "steps": 400, "finished_at": 400, "wandb_id": "x", "identity": {}}
    folder.run.write_text(json.dumps(record))
    folder.step_adapter(100).touch()
    folder.step_adapter(1_000_000).touch()
    return folder


def refusal(text: str) -> str:
    with pytest.raises(UserError) as caught:
        resolve(text)
    return str(caught.value)


def test_a_folder_a_step_and_the_best(run, capsys, monkeypatch):
    assert resolve(str(run.path)) == run.step_adapter(1_000_000), "the newest by its number, not by its name"
    assert "is not finished: its newest adapter file is used, my cat-1000000.safetensors" in capsys.readouterr().out
    run.adapter.touch()
    assert resolve(f"{run.path}/") == run.adapter
    assert resolve(f"{run.path}@100") == resolve(f"{run.path}@0100") == run.step_adapter(100)
    assert resolve(f"{run.path}@400") == run.adapter, "the finished file is that of the last step"
    assert "has no file of a best step, which evaluation.keep_best keeps; it has" in refusal(f"{run.path}@best")
    for step in (100, 300):
        run.best_adapter(step).touch()
    assert resolve(f"{run.path}@best") == resolve(f"{run.path}@300") == run.best_adapter(300)
    assert resolve(f"{run.path}@100") == run.step_adapter(100)
    monkeypatch.chdir(run.path)
    assert resolve(".").samefile(run.adapter)
    assert capsys.readouterr().out == ""


def test_what_is_not_there_is_refused_with_what_is(run, tmp_path):
    run.adapter.touch()
    assert refusal(f"{run.path}@250") == (
        f"{run.path}@250: {run.path} has no adapter file of step 250; it has those of steps 100, 1000000 and the finished one of "
        f"step 400: give one of these, as {run.path}@1000000."
    )
    other = run.path.rename(tmp_path / "renamed")
    sentence = refusal(str(other))
    assert (
        " is a folder without the adapter file renamed.safetensors; it has my cat-" in sentence
        and "give the path of a file" in sentence
    )
    (tmp_path / "empty").mkdir()
    assert "there is none in it: give an adapter file, a run folder" in refusal(str(tmp_path / "empty"))


def test_one_file_under_two_names_is_refused(run):
    run.adapter.touch()
    assert resolve_all([str(run.path), f"{run.path}@100"]) == [str(run.adapter), str(run.step_adapter(100))]
    with pytest.raises(UserError, match="my cat and .*my cat@400 are the same adapter file"):
        resolve_all([str(run.path), f"{run.path}@400"])


def test_a_link_to_a_run_is_that_run(run, tmp_path):
    (tmp_path / "current").symlink_to(run.path)
    (run.path / "samples").mkdir()
    for text in (f"{tmp_path}/current@100", f"{tmp_path}/current/@100", f"{run.path}/samples/..@100"):
        assert resolve(text).samefile(run.step_adapter(100))


def test_a_path_is_a_path(tmp_path):
    for name in ("a.safetensors", "mine@2.safetensors", "nowhere@250", "nowhere@best"):
        assert resolve(str(tmp_path / name)) == tmp_path / name
    digits = f"{tmp_path}@{'9' * 5_000}"  # more than Python reads as a number
    assert resolve(digits) == Path(digits)
    (tmp_path / "a").mkdir()
    (tmp_path / "a@250").touch()
    assert resolve(str(tmp_path / "a@250")) == tmp_path / "a@250", "what is there by this name is that"


def test_the_base_of_a_run(run, tmp_path):
    config = "lora: {}\ntrain: {}\nmodel: {base: 'a', clip_skip: 2, vae: null, other: 1}\n"
    run.config.write_text(config)
    assert model_settings(["x.safetensors", f"{run.path}@100"]) == {"base": "a", "clip_skip": 2}
    second = RunFolder(tmp_path / "second", None)
    second.path.mkdir()
    second.config.write_text(config.replace("clip_skip: 2", "clip_skip: 1"))
    with pytest.raises(UserError, match=re.escape("different bases (model.clip_skip is 2 and 1): give --base")):
        model_settings([str(run.path), str(second.path)])
    with pytest.raises(UserError, match="base is missing: give --base VALUE, or a run folder"):
        model_settings(["x.safetensors"])
    with pytest.raises(UserError, match="^runs/none@250 does not exist: give an adapter file, a run folder"):
        model_settings(["runs/none@250"])
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match="photos is a folder without the adapter file photos.safetensors"):
        model_settings([str(tmp_path / "photos")])
    run.config.write_text("lora: {}\ntrain: {}\n")
    with pytest.raises(UserError, match="has no model.base"):
        model_settings([str(run.path)])
