"""An experiment has its runs scored by a command of the user's: real processes of the command, and a training that is none."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import numpy
import psutil
import pytest
from safetensors.numpy import save_file
from script_runs import script

from sushi_research.config.command_line import config_to_dict, config_to_yaml, load_config
from sushi_research.experiments.experiment import Experiment, plan
from sushi_research.experiments.run_command import RunCommand
from sushi_research.runs import identity
from sushi_research.runs.run_folder import FORMAT

SCRIPT = script("run_experiment")
# Which run it scores, and what it does there, is in a file next to it. It notes each call.
JUDGE = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
run, here = Path(sys.argv[1]), Path(__file__).parent
with open(here / "calls", "a") as calls:
    print(run.name, file=calls)
print("judging", run.name)
todo = json.loads((here / "todo.json").read_text()).get(run.name)
if todo == "stop":
    child = subprocess.Popen(["sleep", "60"])
    (here / "child").write_text(str(child.pid))
    os.kill(os.getppid(), signal.SIGTERM)
    child.wait()
    time.sleep(60)
if todo == "fail":
    raise ValueError("no picture of " + run.name)
if todo != "nothing":
    (run / "scores.json").write_text(json.dumps({"votes": "many" if todo == "malformed" else 3}))
print("done\\n")
"""


class Trained:
    """Stands for a training: it leaves a finished run. `compared` are the runs of the last page."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "base.yaml").write_text("model: {base: somewhere}\ndata: {path: photos}\ntrain: {steps: 4}\n")
        (tmp_path / "judge.py").write_text(JUDGE)
        content = {
            "title": "Two ranks",
            "script": "scripts/train_sd15_lora.py",
            "configs": [str(tmp_path / "base.yaml")],
            "variants": {"small": {"lora": {"rank": 2}}, "large": {"lora": {"rank": 4}}},
            "seeds": [0],
            "folder": str(tmp_path / "runs"),
            "score": f"python {tmp_path / 'judge.py'} {{run}}",
        }
        (tmp_path / "experiment.yaml").write_text(json.dumps(content))
        self.folder, self.compared = tmp_path, []
        self.todo({})
        monkeypatch.setattr(RunCommand, "train", lambda processes, *words: (self.train(*words), ""))
        monkeypatch.setattr(SCRIPT, "write_comparison", self.compare)

    def todo(self, what: dict[str, str]) -> None:
        """What the judge does with each run, other than scoring it."""
        (self.folder / "todo.json").write_text(json.dumps(what))

    def compare(self, experiment, runs):
        self.compared = [run.name for run in runs]
        return 0

    def train(self, words, environment):
        name = next(word.partition("=")[2] for word in words if word.startswith("--run.name="))
        [run] = [run for run in plan(self.read()) if run.name == name]
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "config.yaml").write_text(config_to_yaml(run.config))
        steps = run.config.train.steps
        settings = identity.run_identity(config_to_dict(run.config), {"global_batch_size": 1})
        content = {"format": FORMAT, "steps": steps, "finished_at": steps, "wandb_id": "w", "identity": settings}
        (run.folder / "run.json").write_text(json.dumps(content))
        adapter = {"a.lora_up.weight": numpy.ones(1, numpy.float32)}
        save_file(
            adapter, run.folder / f"{run.folder.name}.safetensors", metadata={"sshs_model_hash": f"{name} {steps}"}
        )
        return 0

    def read(self, *words: str) -> Experiment:
        arguments = ["--config", str(self.folder / "experiment.yaml"), *words]
        return load_config(Experiment, arguments, script="s", intro="1\n2\n3\n4\n5")

    def main(self, *words: str) -> tuple[int, list[str]]:
        """(exit status, the runs that were scored)."""
        calls = self.folder / "calls"
        calls.write_text("")
        return SCRIPT.main(self.read(*words)), calls.read_text().split()


@pytest.fixture
def trained(tmp_path, monkeypatch):
    return Trained(tmp_path, monkeypatch)


def test_every_finished_run_is_scored_once(trained, capfd):
    assert trained.main("--dry-run") == (0, [])
    assert "small-seed0  to do, to score\n" in capfd.readouterr().out
    assert trained.main() == (0, ["small-seed0", "large-seed0"])
    assert "scoring small-seed0\njudging small-seed0\ndone\n" in capfd.readouterr().out
    assert trained.main() == (0, []) and trained.compared == ["small-seed0", "large-seed0"]
    assert "small-seed0  done, scored, its code was not recorded\n" in capfd.readouterr().out

    # A longer training gives other adapters; another command other scores.
    (trained.folder / "base.yaml").write_text("model: {base: somewhere}\ndata: {path: photos}\ntrain: {steps: 8}\n")
    assert trained.main() == (0, ["small-seed0", "large-seed0"])
    other = ("--score", f"python -u {trained.folder / 'judge.py'} {{run}}")
    assert trained.main("--dry-run", *other) == (0, [])
    assert "large-seed0  done, to score, its code was not recorded\n" in capfd.readouterr().out
    assert trained.main(*other) == (0, ["small-seed0", "large-seed0"])
    printed = capfd.readouterr().out
    assert "--- run 2 of 2: large-seed0 (to score) ---" in printed


@pytest.mark.parametrize(
    ("todo", "words"),
    [
        ("fail", "failed (exit status 1); the last that it said: ValueError: no picture of small-seed0; continuing"),
        ("nothing", "scores.json is missing: correct the command that wrote it; the last that it said: done; contin"),
        ("malformed", "scores.json does not hold scores (votes: it should be a valid number)"),
    ],
)
def test_a_run_that_cannot_be_scored_is_named_and_the_page_has_it_all_the_same(trained, capfd, todo, words):
    trained.todo({"small-seed0": todo})
    assert trained.main() == (1, ["small-seed0", "large-seed0"])
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 2 and said[0].startswith("small-seed0 has no scores: ") and words in said[0]
    assert said[1] == "error: 1 of 2 runs have no scores: small-seed0; the reasons are above"
    assert trained.compared == ["small-seed0", "large-seed0"]
    trained.todo({})
    assert trained.main() == (0, ["small-seed0"])


def test_a_command_that_is_not_found(trained, capfd):
    assert trained.main("--score", "no-such-judge {run}") == (1, [])
    said = capfd.readouterr().err
    assert "small-seed0 has no scores: no-such-judge cannot be started (No such file or directory): check its" in said
    assert "error: 2 of 2 runs have no scores: small-seed0, large-seed0; the reasons are above" in said


def test_interrupted_while_scoring(trained, capfd):
    """The command ends, with what it has started, and the same experiment goes on with it."""
    trained.todo({"large-seed0": "stop"})
    assert trained.main() == (128 + signal.SIGTERM, ["small-seed0", "large-seed0"])
    out, err = capfd.readouterr()
    assert "stopped in large-seed0; the same command again continues from here" in out and err == ""
    assert trained.compared == []
    child, until = int((trained.folder / "child").read_text()), time.monotonic() + 30
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.01)
    trained.todo({})
    assert trained.main() == (0, ["large-seed0"]) and trained.compared == ["small-seed0", "large-seed0"]


def test_a_mistake_in_the_command_is_one_sentence(trained):
    with pytest.raises(
        ValueError, match="^score is .*: it does not say which run is scored: put {run} in it"
    ) as caught:
        trained.main("--score", "python judge.py")
    assert "\n" not in str(caught.value).strip()
