"""The end of a run lists what is there, with commands that are valid."""

import json
import shlex
from types import SimpleNamespace

from sushi_research.config import SD15Training
from sushi_research.config.command_line import config_to_yaml, load_config
from sushi_research.config.other_scripts import SamplingConfig, evaluation_config
from sushi_research.runs.run_folder import RunFolder
from sushi_research.training.run_end import outputs


def job_of(folder, **sections):
    run = RunFolder(folder / "my runs" / "cat", None)
    (run.path / "samples").mkdir(parents=True, exist_ok=True)
    config = SD15Training(
        model={"base": "base"}, data={"path": "photos"}, train={"steps": 9}, **sections, run={"folder": str(folder)}
    )
    run.config.write_text(config_to_yaml(config))
    run.adapter.touch()
    return SimpleNamespace(run=run, config=config, model=SimpleNamespace(NAME="sd15"))


def command(lines, program):
    """The arguments of the command that the lines give for a program."""
    [line] = [line for line in lines if f"scripts/{program}" in line]
    words = shlex.split(line[line.index("python scripts/") :])
    assert words[:2] == ["python", f"scripts/{program}"]
    return words[2:]


def test_each_output_is_listed_with_a_command_that_uses_it(tmp_path):
    job = job_of(tmp_path, evaluation={"held_out": 0.1, "keep_best": True}, tracking={"tensorboard": True})
    run = job.run
    for step in (3, 6):
        run.step_adapter(step).touch()
    run.best_adapter(6).touch()
    (run.path / "wandb" / "offline-run-1").mkdir(parents=True)
    (run.path / "tensorboard").mkdir()
    for path in (run.report, run.evaluation, run.samples / "progress.png"):
        path.touch()
    lines = outputs(job)
    listed = {line.split()[0]: line[12:] for line in lines if line.startswith("  ") and line[2] != " "}
    assert listed == {
        "adapter": str(run.adapter), "earlier": str(run.step_adapter(6)), "best": str(run.best_adapter(6)),
        "page": str(run.report), "samples": f"{run.samples}/progress.png", "losses": str(run.evaluation),
        "charts": f"{run.path}/tensorboard", "W&B": f"{run.path}/wandb",
    }  # fmt: skip
    given = load_config(SamplingConfig, command(lines, "sample.py"), script="s", intro="1\n2\n3\n4\n5")
    assert (given.adapters, given.prompts) == ([str(run.path)], ["YOUR PROMPT"])
    architecture, *words = command(lines, "evaluate.py")
    given = load_config(evaluation_config(SD15Training), words, script="s", intro="1\n2\n3\n4\n5")
    assert (architecture, given.adapters, given.data) == ("sd15", [str(run.path)], job.config.data)
    assert command(lines, "compare_runs.py") == [str(run.path), "OTHER_RUN"]
    text = "\n".join(lines)
    for part in ("@6", "@best", "/wandb/offline-run-*", "/tensorboard"):
        assert f"{shlex.quote(str(run.path))}{part}" in text


def test_a_program_that_does_not_load_the_file_is_named(tmp_path):
    job = job_of(tmp_path)
    assert any("(diffusers: load_lora_weights)" in line for line in outputs(job))
    job.run.plan.write_text(json.dumps({"global_batch_size": 1, "not_loaded": {"diffusers": "it reads pairs only"}}))
    text = "\n".join(outputs(job))
    assert "load_lora_weights" not in text
    assert "diffusers will not load this adapter as it is: it reads pairs only." in text


def test_what_is_not_there_is_not_listed(tmp_path):
    job = job_of(tmp_path)
    lines = outputs(job)
    assert [line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "] == ["adapter"]
    # The run has no held-out images, so they are to be given.
    given = load_config(
        evaluation_config(SD15Training), command(lines, "evaluate.py")[1:], script="s", intro="1\n2\n3\n4\n5"
    )
    assert given.data.path == "FOLDER_OF_OTHER_IMAGES"
