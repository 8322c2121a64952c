"""What runs an experiment has, and how each stands; a mistake in its file is one sentence before anything runs."""

import json

import pytest

from sushi_research.config.command_line import config_to_dict, load_config
from sushi_research.errors import UserError
from sushi_research.experiments.experiment import Experiment, plan, state_of
from sushi_research.runs import identity
from sushi_research.runs.run_folder import FORMAT

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
    assert run.config.optimizer.kwargs == {"betas": [0.9, 0.99]} and run.config.train.gradient_checkpointing is True


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
    """A run folder as the training leaves it."""
    run.folder.mkdir(parents=True)
    stored = identity.run_identity(config_to_dict(run.config), {"global_batch_size": 1}) | changes
    content = {"format": FORMAT, "steps": 4, "finished_at": finished, "wandb_id": "w", "identity": stored}
    (run.folder / "run.json").write_text(json.dumps(content))


def test_states(experiment, tmp_path):
    done, cut, new, lost = plan(experiment("variants: {a: {}}\nseeds: [0, 1, 2, 3]"))
    record(done, 4)
    (done.folder / "adapter.safetensors").touch()
    record(cut, None)
    record(lost, 4)  # finished, and its adapter is gone
    assert [state_of(run) for run in (done, cut, new, lost)] == ["done", "to continue", "to do", "to continue"]
    longer = plan(experiment("settings: {train: {steps: 9}}\nvariants: {a: {}}\nseeds: [0]"))
    assert state_of(longer[0]) == "to continue"


def test_a_run_with_other_settings_is_not_taken_for_this_one(experiment):
    [run] = plan(experiment("variants: {a: {lora: {rank: 4}}}\nseeds: [0]"))
    record(run, 4, **{"lora.rank": 16})
    with pytest.raises(
        UserError, match=r"lora.rank was 16, is now 4.*: give the experiment another folder, or remove that run"
    ):
        state_of(run)
