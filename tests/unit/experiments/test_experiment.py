"""What runs an experiment has, and how each stands; a mistake in its file is one sentence before anything runs."""

import json

import pytest

from sushi_research.config.command_line import config_to_dict, config_to_yaml, load_config
from sushi_research.errors import UserError
from sushi_research.experiments.experiment import Experiment, describe, plan, state_of
from sushi_research.experiments.script import ROOT, config_class_of
from sushi_research.runs import code, identity
from sushi_research.runs.run_folder import FORMAT, RunFolder

INTRO = "1\n2\n3\n4\n5"


@pytest.fixture
def experiment(tmp_path):
    """An experiment file's text as an Experiment, read as the script reads it."""
    base = tmp_path / "base.yaml"
    base.write_text("model: {base: somewhere}\ndata: {path: photos}\ntrain: {steps: 4}\n")

    def read(text, *words):
        path = tmp_path / "experiment.yaml"
        lines = [
            "title: A title",
            "script: scripts/train_sd15_lora.py",
            f"configs: [{base}]",
            f"folder: {tmp_path / 'runs'}",
        ]
        path.write_text("\n".join(lines) + f"\n{text}\n")
        return load_config(Experiment, ["--config", str(path), *words], script="scripts/run_experiment.py", intro=INTRO)

    return read


def test_variants_by_seeds(experiment):
    runs = plan(experiment("variants: {small: {lora: {rank: 2}}, large: {lora: {rank: 8, alpha: 8.0}}}\nseeds: [3, 5]"))
    assert [run.name for run in runs] == ["small-seed3", "large-seed3", "small-seed5", "large-seed5"]
    last = runs[-1]
    assert (last.config.lora.rank, last.config.lora.alpha, last.config.train.seed) == (8, 8.0, 5)
    assert (
        last.config.run.name == "large-seed5"
        and last.folder.parent.name == "runs"
        and last.folder.name == "large-seed5"
    )
    # What is launched is what was checked.
    again = load_config(type(last.config), last.arguments, script="s", intro=INTRO)
    assert again == last.config


def test_a_grid_is_every_combination(experiment):
    text = "grid: {lora: {rank: [2, 8]}, loss: {snr_gamma: [null, 5.0]}}\nseeds: [0]"
    runs = plan(experiment(text))
    assert [run.variant for run in runs] == [
        "rank-2_snr_gamma-null",
        "rank-2_snr_gamma-5.0",
        "rank-8_snr_gamma-null",
        "rank-8_snr_gamma-5.0",
    ]
    assert [run.config.loss.snr_gamma for run in runs] == [None, 5.0, None, 5.0]


def test_settings_of_every_kind_arrive(experiment):
    text = """
settings:
  sample: {prompts: ["a cat, 'quoted'", "8"], negative_prompt: "null", every: null}
  optimizer: {name: adamw, kwargs: {betas: [0.9, 0.99]}}
  data: {flip: 0.5}
variants: {one: {train: {gradient_checkpointing: true}}}
seeds: [0]
"""
    [run] = plan(experiment(text))
    assert run.config.sample.prompts == ["a cat, 'quoted'", "8"] and run.config.sample.every is None
    assert run.config.optimizer.kwargs == {"betas": [0.9, 0.99]} and run.config.train.gradient_checkpointing == "all"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("variants: {a: {}}\nsed: [0]", "unknown key sed in .*: did you mean seeds?"),
        ("seeds: [0]", "variants and grid .* are both set or both empty|variants and grid are both set or both empty"),
        ("variants: {a: {}}\ngrid: {lora: {rank: [1]}}", "both set or both empty"),
        (
            "variants: {a: {lora: {rnk: 3}}}",
            "the variant a: unknown key lora.rnk on the command line: did you mean --lora.rank",
        ),
        (
            "variants: {a: {lora: {rank: x}}}",
            'the variant a: lora.rank is "x" on the command line: must be a whole number',
        ),
        ("variants: {a: {train: {seed: 3}}}", "train.seed .*is set by the experiment itself: remove it"),
        ("variants: {a: 3}", "a is not a mapping of settings: nest them by section"),
        ("variants: {Plain: {}, plain: {lora: {rank: 2}}}", "two variants would share the folder Plain "),
        ("grid: {lora: {targets: [[to_q], [to.q], [to/q]]}}", "two variants would share the folder targets-"),
        ("grid: {lora: {rank: 3}}", r"grid: lora.rank is 3: give a list of the values to try"),
        ("variants: {a: {}}\nreference: b", "reference is b, but the variants are a: name one of them"),
        ("variants: {a: {}}\nseeds: [1, 1]", "seeds has a duplicate"),
        ("variants: {a/b: {}}", "variants"),
    ],
)
def test_a_mistake_is_one_sentence(experiment, text, words):
    with pytest.raises(UserError, match=words) as caught:
        plan(experiment(text))
    assert "\n" not in str(caught.value)


def record(run, finished, **changes):
    """A run folder as the training leaves it; an epoch is seven images, in steps of two."""
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text(config_to_yaml(run.config))
    (run.folder / "plan.json").write_text(json.dumps({"items_per_epoch": 7, "global_batch_size": 2}))
    stored = identity.run_identity(config_to_dict(run.config), {"global_batch_size": 1}) | changes
    content = {"format": FORMAT, "steps": 4, "finished_at": finished, "wandb_id": "w", "identity": stored}
    (run.folder / "run.json").write_text(json.dumps(content))


def test_states(experiment, tmp_path):
    done, cut, new, lost = plan(experiment("variants: {a: {}}\nseeds: [0, 1, 2, 3]"))
    record(done, 4)
    RunFolder(done.folder, None).adapter.touch()
    record(cut, None)
    record(lost, 4)  # finished, and its adapter is gone
    assert [state_of(run) for run in (done, cut, new, lost)] == ["done", "to continue", "to do", "to continue"]
    longer = plan(experiment("settings: {train: {steps: 9}}\nvariants: {a: {}}\nseeds: [0]"))
    assert state_of(longer[0]) == "to continue"


@pytest.mark.parametrize(
    ("was", "now", "state"),
    [
        ("epochs: 2", "epochs: 2", "done"),
        ("epochs: 2", "epochs: 3", "to continue"),
        ("epochs: 2", "epochs: 1", "done"),
        ("epochs: 2", "steps: 7", "done"),
        ("epochs: 2", "steps: 8", "to continue"),
        ("steps: 7", "epochs: 2", "done"),
        ("steps: 7", "epochs: 3", "to continue"),
        ("steps: 7", "steps: 6", "done"),
        # These are facts of the run: whether they are the same, the training decides.
        ("steps: 7", "steps: 7, batch_size: 2", "to continue"),
        ("steps: 7, batch_size: 2", "steps: 7, accumulation: 2", "done"),
        ("steps: 7", "steps: 7, precision: bf16", "to continue"),
    ],
)
def test_a_finished_run_is_done_unless_its_settings_ask_for_more(experiment, was, now, state):
    def planned(train):
        train = train if "steps" in train else f"steps: null, {train}"
        [run] = plan(experiment(f"settings: {{train: {{{train}}}}}\nvariants: {{a: {{}}}}\nseeds: [0]"))
        return run

    run = planned(was)
    record(run, 7)
    RunFolder(run.folder, None).adapter.touch()
    assert state_of(planned(now)) == state


def test_a_length_in_epochs_that_cannot_be_told_is_left_to_the_training(experiment):
    [run] = plan(experiment("settings: {train: {steps: null, epochs: 2}}\nvariants: {a: {}}\nseeds: [0]"))
    record(run, 7)
    RunFolder(run.folder, None).adapter.touch()
    for content in ("{", "[]", '{"items_per_epoch": 7}'):
        (run.folder / "plan.json").write_text(content)
        assert state_of(run) == "to continue"


def test_a_run_that_has_not_a_key_of_this_version_is_this_one(experiment):
    [run] = plan(experiment("variants: {a: {}}\nseeds: [0]"))
    record(run, 4)
    RunFolder(run.folder, None).adapter.touch()
    path = run.folder / "run.json"
    content = json.loads(path.read_text())
    del content["identity"]["loss.snr_gamma"], content["identity"]["lora.init"]
    path.write_text(json.dumps(content))
    assert state_of(run) == "done"
    [other] = plan(experiment("variants: {a: {loss: {snr_gamma: 5.0}}}\nseeds: [0]"))
    with pytest.raises(UserError, match="loss.snr_gamma was null, is now 5.0"):
        state_of(other)
    path.write_text(json.dumps(content | {"format": 1}))
    with pytest.raises(UserError, match="run.json has format 1, this version reads format 2"):
        state_of(run)


def test_a_run_that_was_done_with_other_code_is_listed_so(experiment, tmp_path):
    script = tmp_path / "mine.py"
    text = (ROOT / "scripts/train_sd15_lora.py").read_text()
    script.write_text(text.replace("import contextlib", "import contextlib\n\nimport my_losses"))
    (tmp_path / "my_losses.py").write_text("scale = 1\n")
    [run] = plan(experiment("variants: {a: {}}\nseeds: [0]", "--script", str(script)))
    record(run, 4)
    RunFolder(run.folder, None).adapter.touch()
    entries = run.folder / "provenance.json"
    entries.write_text(json.dumps([{"step": 0, "code": code.code_of(script)}]))
    assert describe([(run, state_of(run))]) == "  a-seed0  done"
    (tmp_path / "my_losses.py").write_text("scale = 1  # as before\n")
    assert describe([(run, "done")]) == "  a-seed0  done"
    (tmp_path / "my_losses.py").write_text("scale = 2\n")
    assert describe([(run, "done")]) == "  a-seed0  done, with other code than the script has now: my_losses.py"
    assert describe([(run, "to do")]) == "  a-seed0  to do"
    found_by_the_script = code.code_of(script)
    found_by_the_script["files"]["on_a_path_that_it_adds.py"] = "f" * 32
    entries.write_text(json.dumps([{"step": 0, "code": found_by_the_script}]))
    assert describe([(run, "done")]) == "  a-seed0  done"
    entries.write_text(json.dumps([{"step": 0, "code": {"commit": "c"}}]))
    assert describe([(run, "done")]) == "  a-seed0  done, its code was not recorded"


CALL = "\nCONFIG = read_command_line({}, script='mine.py', intro='')\n"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("from sushi_research.config import SD15Training" + CALL.format("SD15Training"), "SD15Training"),
        ("from sushi_research.config.sdxl import SDXLTraining as C" + CALL.format("C"), "SDXLTraining"),
        ("from sushi_research import config" + CALL.format("config.SDXLTraining"), "SDXLTraining"),
        ("import sushi_research.config as c\nKind = c.SD15Training" + CALL.format("Kind"), "SD15Training"),
        (
            "from sushi_research.config import *\nconfig_class = SDXLTraining"
            + CALL.format("config_class=config_class"),
            "SDXLTraining",
        ),
        (
            "from sushi_research.config import SD15Training, SDXLTraining\n\ndef read():"
            + CALL.format("SD15Training").replace("\n", "\n    ", 1),
            "SD15Training",
        ),
    ],
)
def test_the_config_class_of_any_script(tmp_path, text, name):
    script = tmp_path / "mine.py"
    script.write_text("raise RuntimeError('it is not run')\n" + text)
    assert config_class_of(script).__name__ == name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("from sushi_research.config import SD15Training", "does not call read_command_line with a config class"),
        (
            "class SD15Training: pass" + CALL.format("SD15Training"),
            "reads its command line with its own class SD15Training",
        ),
        (
            "from elsewhere import SD15Training" + CALL.format("SD15Training"),
            "with SD15Training .not of this suite., and",
        ),
        ("from elsewhere import Mine" + CALL.format("Mine"), "reads its command line with Mine"),
        (
            "from sushi_research.config import SD15Training\nclass Mine(SD15Training): x: int = 1"
            + CALL.format("Mine"),
            "its own class Mine",
        ),
        ("def f(:", r"mine.py, line 1 is not Python \(.*\): correct it"),
    ],
)
def test_a_script_whose_settings_cannot_be_told_is_refused(experiment, tmp_path, text, words):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        plan(experiment("variants: {a: {}}", "--script", str(tmp_path / "mine.py")))
    assert "\n" not in str(caught.value)
    with pytest.raises(
        UserError, match="script is gone.py, which is not a file: give the path of a training script, such as"
    ):
        plan(experiment("variants: {a: {}}", "--script", "gone.py"))


def test_a_run_with_other_settings_is_not_taken_for_this_one(experiment):
    [run] = plan(experiment("variants: {a: {lora: {rank: 4}}}\nseeds: [0]"))
    record(run, 4, **{"lora.rank": 16})
    with pytest.raises(
        UserError, match=r"lora.rank was 16, is now 4.*: give the experiment another folder, or remove that run"
    ):
        state_of(run)
