"""The commands of the README and of docs/ are those of this version: each training is planned on a tiny base, and the page about
a character is run from start to end."""

import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from script_runs import ROOT, script

from sushi_research import models
from sushi_research.config.command_line import config_to_dict, load_config
from sushi_research.config.other_programs import PROGRAMS
from sushi_research.config.other_scripts import SamplingConfig, evaluation_config
from sushi_research.experiments.experiment import Experiment
from testing import option_tables

PAGES = [*sorted(ROOT.glob("README*.md")), *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("docs/[gm]*/*.md"))]
CHARACTER = ROOT / "docs/guides/character_lora.md"
TRAINING = {f"train_{name}_lora.py": kind for name, kind in models.config_classes().items()}
# A launcher's options that take a value, in the pages.
LAUNCHER = {"--config_file", "--num_processes", "--num_machines", "--mixed_precision"}
# Programs of others, whose options are theirs.
FOREIGN = {"cp", "source", "wandb", "tensorboard", "nvidia-smi", "git", "pip"}
# A tiny base at a tiny size in place of a page's.
SMALL: dict[str, Any] = {
    "model.variant": None,
    "model.vae": None,
    "data.path": "photos",
    "data.resolution": 64,
    "data.bucket_step": 32,
    "train.precision": "fp32",
    "train.attention": "sdpa",
    "tracking.wandb": "off",
}


class Command(NamedTuple):
    """A command of a page: its script or program, and the words after it."""

    page: str
    program: str
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        return f"{self.page}: {self.program} {shlex.join(self.words)}"


def commands(page: Path) -> list[Command]:
    """The commands in a page's fenced sh blocks, and in its indented blocks; lines with `...` in place of words are none."""
    text = page.read_text(encoding="utf-8")
    fenced = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    indented = re.findall(
        r"^    ((?:accelerate|python|make) .*(?:\\\n.*)*)", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.M
    )
    lines = "\n".join([*fenced, *indented]).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        if words and "..." not in words:
            found.append(command(page, words))
    return found


def command(page: Path, words: list[str]) -> Command:
    name = page.relative_to(ROOT).as_posix()
    if words[:2] == ["accelerate", "launch"]:
        words = words[2:]
        while words[0].startswith("--"):
            words = words[2 if words[0] in LAUNCHER else 1 :]
    elif words[0] == "python":
        words = words[1:]
    if words[0].startswith("scripts/"):
        return Command(name, words[0].removeprefix("scripts/"), tuple(words[1:]))
    return Command(name, words[0], tuple(words[1:]))


COMMANDS = [each for page in PAGES for each in commands(page)]


def config_of(command: Command) -> Any:
    """The config that a command of a script of ours gives. Raises UserError for a mistake in it."""
    # The one option that is no setting (`cache_dataset.read`).
    words = [word for word in command.words if word != "--prune" or command.program != "cache_dataset.py"]
    kind: Any = {"sample.py": SamplingConfig, "run_experiment.py": Experiment, **TRAINING}.get(command.program)
    if kind is None:
        kind = models.config_classes()[words.pop(0)]
        if command.program == "evaluate.py":
            kind = evaluation_config(kind)
    return load_config(kind, words, script=command.program, intro="\n".join("12345"))


def changed(config: Any, changes: dict[str, Any]) -> Any:
    """The config with other values, by dotted key."""
    nested = config_to_dict(config)
    for key, value in changes.items():
        *sections, name = key.split(".")
        place = nested
        for section in sections:
            place = place[section]
        place[name] = value
    return type(config).model_validate(nested)


@pytest.fixture
def workspace(tmp_path, photos, monkeypatch) -> Path:
    """A folder with what the commands of the pages name, as the current folder."""
    for name in ("configs", "demo", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/2_mrwhiskers").symlink_to(photos)
    (tmp_path / "prompts.txt").write_text("a photo of mrwhiskers --w 64 --h 64 --d 1\n")
    for run in ("A", "NAME"):
        (tmp_path / f"runs/{run}").mkdir(parents=True)
        (tmp_path / f"runs/{run}/config.yaml").write_text("model: {base: x}\ndata: {path: photos}\ntrain: {steps: 1}\n")
    for page in PAGES:
        for name, text in re.findall(r"^```yaml\n# (\S+\.yaml)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_is_one_of_ours_with_options_that_it_has(workspace):
    assert len(COMMANDS) > 40
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    ours = {path.name for path in (ROOT / "scripts").glob("*.py")}
    for each in COMMANDS:
        if each.program == "make":
            assert each.words[0] in targets, each.text
        elif each.program == "-m":
            assert find_spec(each.words[0]) is not None, each.text
        elif each.program in ("compare_runs.py", "convert_lora.py", "push_to_hub.py", "reconstruct_ema.py"):
            assert script(each.program.removesuffix(".py")).parse(each.words), each.text
        elif each.program == "find_learning_rate.py":
            assert script("find_learning_rate").read(each.words).config, each.text
        elif each.program in ours - {"inspect_model.py", "doctor.py"}:
            try:
                config_of(each)
            except (Exception, SystemExit) as error:
                pytest.fail(f"{each.text}\n{error}")
        else:
            assert each.program in ours | FOREIGN | {"-c"}, each.text


def test_every_training_of_a_page_has_a_plan(workspace, bases, capsys):
    planned = []
    for each in COMMANDS:
        if each.program not in TRAINING:
            continue
        architecture = each.program.split("_")[1]
        small = {**SMALL, "model.base": str(bases[architecture]), "lora.start_from": None, "dry_run": True}
        config = changed(config_of(each), small)
        if (architecture, config) in planned:  # with and without --dry-run
            continue
        planned.append((architecture, config))
        assert script(f"train_{architecture}_lora").main(config) == 0, each.text
        assert "steps" in capsys.readouterr().out, each.text
    assert len(planned) > 5


def test_the_page_about_a_character_is_run_from_start_to_end(workspace, bases, capsys):
    small = {
        **SMALL,
        "model.base": str(bases["sdxl"]),
        "lora.targets": ["attn2.to_k"],
        "train.batch_size": 4,
        "train.accumulation": 1,
        "optimizer.name": "adamw",
        "sample.seeds": [0],
        "sample.steps": 1,
        "sample.width": 64,
        "sample.height": 64,
    }
    lengths = iter([2, 2, 1])  # epochs: of the plan, the run and the second stage
    done = []
    for each in commands(CHARACTER):
        if each.program == "cp":
            assert (workspace / each.words[0]).is_file(), each.text
        elif each.program in TRAINING:
            config = changed(config_of(each), {**small, "train.epochs": next(lengths)})
            assert script("train_sdxl_lora").main(config) == 0, each.text
        elif each.program == "sample.py":
            # 14 samples per epoch, four per step: the files of the run are those of steps 4 and 7.
            words = [re.sub(r"@\d+", "@4", word, count=1) for word in each.words]
            words = [re.sub(r", runs/\w+@(?!4\b)\d+", "", word) for word in words]
            config = config_of(each._replace(words=tuple(words)))
            small_images = config.model_copy(update={"steps": 1, "width": 64, "height": 64})
            assert script("sample").main(small_images) == 0, each.text
            assert Path(config.output).is_file()
        done.append(each.program)
    assert done.count("train_sdxl_lora.py") == 3 and {"sample.py", "cp"} <= set(done)
    # The files that the page names.
    run = workspace / "runs/mrwhiskers"
    assert (run / "mrwhiskers-000004.safetensors").is_file() and (run / "report.html").is_file()
    assert (run / "dry_run/data_report.json").is_file()
    assert json.loads((run / "plan.json").read_text())["steps"] == 7
    assert (workspace / "runs/mrwhiskers_2/mrwhiskers_2.safetensors").is_file()


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_tables_of_a_page_are_those_of_the_hints(program):
    text = option_tables.page(program).read_text(encoding="utf-8")
    assert text == option_tables.with_table(text, program), "run python -m testing.option_tables"


def test_the_links_of_the_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            path, _, heading = target.partition("#")
            if path.startswith(("http:", "https:", "mailto:")):
                continue
            file = page.parent / path if path else page
            assert file.exists(), f"{page.name}: {target}"
            if heading and file.suffix == ".md":
                assert heading in headings(file), f"{page.name}: {target}"


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in found}
