"""A dry run: what it writes, and that it neither begins a run nor disturbs one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from script_runs import Trainer

from sushi_research.data.own_outputs import kind_of
from sushi_research.errors import UserError
from sushi_research.runs.run_folder import open_run_folder

pytestmark = pytest.mark.parametrize("architecture", ["sd15"])


def dry_run(trainer: Trainer, name: str, changes: dict[str, Any] | None = None) -> Path:
    """Runs the script with --dry-run; returns the folder of what it wrote."""
    assert trainer.script.main(trainer.config(name, changes).model_copy(update={"dry_run": True})) == 0
    return trainer.folder(name) / "dry_run"


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_it_begins_no_run_and_the_run_that_follows_is_its_next_source_of_the_speed(trainer, capsys):
    written = dry_run(trainer, "run")
    assert files(trainer.folder("run")) == {"dry_run/plan.json", "dry_run/data_report.json"}
    plan = json.loads((written / "plan.json").read_text())
    assert plan["speed"] is None
    found = plan["checkpoints"]
    assert (found["times"], found["kept"], found["often"], found["kept_adapters"]) == (3, 2, "every step", 0)
    assert found["metadata"].startswith("full: ")
    assert len(json.loads((written / "data_report.json").read_text())["used"]) == 7
    assert kind_of(written, ["plan.json", "data_report.json"]) == "the folder of a dry run"
    assert "speed        not known: no run in" in capsys.readouterr().out

    # The command of the user's own is shown, and stored nowhere.
    dry_run(trainer, "run", {"checkpoint.command": "secret-command {adapter}"})
    assert "command      after each checkpoint: secret-command {adapter}" in capsys.readouterr().out
    assert "secret-command" not in (written / "plan.json").read_text()

    # What is refused before it begins leaves the plan, and no lock.
    with pytest.raises(UserError, match="fits no module"):
        trainer.train("run", {"lora.targets": ["to_z"]})
    assert files(trainer.folder("run")) == {"dry_run/plan.json", "dry_run/data_report.json"}

    assert trainer.train("run", {"sample.enabled": False}) == 0
    assert "starting the run run" in capsys.readouterr().out
    assert json.loads((written / "plan.json").read_text()) == plan, "the run leaves it as it was"

    # The same settings but for the length; the folder is that of a run that is going on.
    before = files(trainer.folder("run"))
    with open_run_folder(trainer.runs, "run"):
        dry_run(trainer, "run", {"train.steps": 3000})
    assert files(trainer.folder("run")) == before
    speed = json.loads((written / "plan.json").read_text())["speed"]
    assert (speed["run"], speed["steps"]) == (str(trainer.folder("run")), 3)
    lines = [json.loads(line) for line in (trainer.folder("run") / "metrics.jsonl").read_text().splitlines()]
    assert speed["peak_memory_gib"] == max(line["peak_memory_gib"] for line in lines)
    printed = capsys.readouterr().out
    assert f"run          {trainer.folder('run')} has begun: without --dry-run it goes on" in printed
    [line] = [line for line in printed.splitlines() if line.startswith("speed ")]
    seconds = 4 * speed["seconds_per_image"]
    assert f"about {seconds:.3g} s per step" in line and f": as {trainer.folder('run')} took" in line


def test_it_says_what_becomes_of_the_run_that_is_there(trainer, capsys):
    trainer.train("run", {"sample.enabled": False})
    dry_run(trainer, "run", {"optimizer.lr": 0.5})
    assert (
        "was started with other settings (optimizer.lr was 0.001, is now 0.5): give another" in capsys.readouterr().out
    )
    dry_run(trainer, "run", {"sample.enabled": False})
    assert "is finished, at step 3: without --dry-run there is nothing to do" in capsys.readouterr().out


def test_all_problems_are_in_its_report(trainer, tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(12):
        Image.new("RGB", (64, 64)).save(tmp_path / "photos" / f"{number:02}.png")
    with pytest.raises(UserError) as caught:
        dry_run(trainer, "bad", {"data.path": str(tmp_path / "photos")})
    report = trainer.folder("bad") / "dry_run" / "data_report.json"
    assert files(trainer.folder("bad")) == {"dry_run/data_report.json"}
    assert "09.png (no caption" in str(caught.value) and f"the whole list is in {report}" in str(caught.value)
    assert len(json.loads(report.read_text())["problems"]) == 12


def test_a_folder_that_cannot_be_written_is_a_warning(trainer, tmp_path, capsys, caplog):
    (tmp_path / "file").write_text("")
    dry_run(trainer, "run", {"run.folder": str(tmp_path / "file")})
    assert "length       3 optimizer steps" in capsys.readouterr().out
    [warning] = [record.getMessage() for record in caplog.records if record.name.startswith("sushi_research")]
    assert "cannot make the folder" in warning and warning.endswith("the plan is printed without it")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"lora.kind": "lokr", "lora.rank": 1},
            {
                "diffusers": "it reads low-rank pairs only, not LoKr",
                "InvokeAI": "it cannot tell the base, because it looks for a pair of attn2.to_k or attn2.to_v",
            },
        ),
        (
            {"lora.targets": ["conv1", "time_emb_proj"]},
            {"InvokeAI": "it takes it for one of SDXL, because it looks for a pair of attn2.to_k or attn2.to_v"},
        ),
    ],
)
def test_the_plan_says_which_programs_will_not_load_the_file(trainer, capsys, changes, said):
    plan = json.loads((dry_run(trainer, "run", changes) / "plan.json").read_text())
    assert plan["not_loaded"] == said
    lines = [line for line in capsys.readouterr().out.split("\n") if " will not load this adapter " in line]
    assert lines == [
        f"{' ' * 13}warning: {program} will not load this adapter as it is: {why}." for program, why in said.items()
    ]
