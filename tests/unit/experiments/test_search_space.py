"""Random draws from a search space in W&B's form, and W&B's sweep files as experiments and back."""

from __future__ import annotations

import collections
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from sushi_research.config.command_line import load_config
from sushi_research.errors import UserError
from sushi_research.experiments import search_space, selection, written_sweep
from sushi_research.experiments.experiment import plan, variants_of
from sushi_research.experiments.experiment_file import Experiment
from sushi_research.experiments.script import ROOT

SPACE = {
    "optimizer": {"lr": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-3}},
    "lora": {"rank": {"values": [4, 8, 16]}, "dropout": {"min": 0.0, "max": 0.5}},
    "train": {"batch_size": {"min": 1, "max": 4}, "max_grad_norm": {"value": 1.0}},
}


def drawn(parameter, count=2000):
    return [search_space.drawn("a.key", parameter, 0, number) for number in range(count)]


@pytest.mark.parametrize(
    ("parameter", "quantile"),
    [
        ({"min": 2.0, "max": 6.0}, lambda u: 2 + 4 * u),
        ({"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-3}, lambda u: 10 ** (-5 + 2 * u)),
        ({"distribution": "log_uniform", "min": -3, "max": 1}, lambda u: math.exp(-3 + 4 * u)),
    ],
)
def test_continuous_draws_have_the_quantiles_of_their_distribution(parameter, quantile):
    values = drawn(parameter)
    for u in (0.1, 0.25, 0.5, 0.9):
        share = np.mean([value <= quantile(u) for value in values])
        assert abs(share - u) < 4.5 * math.sqrt(u * (1 - u) / len(values))  # 4.5 standard errors
    assert all(value == float(f"{value:.4g}") for value in values)


def test_normal_whole_and_listed_draws():
    values = np.array(drawn({"distribution": "normal", "mu": 3.0, "sigma": 0.5}))
    assert abs(values.mean() - 3.0) < 4.5 * 0.5 / math.sqrt(2000) and 0.46 < values.std() < 0.54
    logs = np.log(drawn({"distribution": "log_normal", "mu": -1.0}))
    assert abs(logs.mean() + 1.0) < 4.5 / math.sqrt(2000) and 0.92 < logs.std() < 1.08
    counts = collections.Counter(drawn({"min": 1, "max": 4}))
    assert sorted(counts) == [1, 2, 3, 4] and all(400 < count < 600 for count in counts.values())
    counts = collections.Counter(drawn({"values": ["a", "b"], "probabilities": [0.9, 0.1000001]}))
    assert 1740 < counts["a"] < 1860
    assert set(drawn({"distribution": "q_uniform", "min": 0, "max": 20, "q": 8})) == {0, 8, 16, 24} - {24}
    assert set(drawn({"distribution": "q_uniform", "min": 0.0, "max": 1.0, "q": 0.5})) == {0.0, 0.5, 1.0}


def test_a_draw_depends_on_nothing_but_its_key_number_and_seed():
    five, nine = (list(search_space.draws_of(SPACE, samples, 0)) for samples in (5, 9))
    assert nine[:5] == five
    fewer = list(search_space.draws_of({"optimizer": SPACE["optimizer"]}, 5, 0))
    assert [settings["optimizer.lr"] for _, settings in fewer] == [settings["optimizer.lr"] for _, settings in five]
    other = list(search_space.draws_of(SPACE, 5, 1))
    assert not {settings["optimizer.lr"] for _, settings in other} & {s["optimizer.lr"] for _, s in five}
    # What does not vary is not in the names.
    assert five[0][1]["train.max_grad_norm"] == 1.0 and "max_grad_norm" not in five[0][0]
    with pytest.raises(UserError, match="search has 3 different values .* and samples is 4: give fewer samples"):
        list(search_space.draws_of({"lora": {"rank": {"values": [1, 2, 3]}}}, 4, 0))


@pytest.mark.parametrize(
    ("parameter", "words"),
    [
        (3, "a.key is 3, which is no parameter"),
        ({"values": []}, "values must be a list that is not empty"),
        ({"max": 3}, r"a.key \(uniform\) needs min"),
        ({"min": 3, "max": 1}, "min must not be above max"),
        ({"min": "a", "max": 1}, "min must be a number"),
        ({"distribution": "log_uniform_values", "min": 0, "max": 1}, "min must be above 0"),
        ({"distribution": "log_uniform", "min": 4, "max": 128}, "log_uniform_values has the values themselves"),
        ({"distribution": ["uniform"]}, "which is not known here"),
        ({"min": 1, "max": 10**400}, "max must be a number, at most 1e"),
        ({"distribution": "q_normal", "q": 1e-300}, "q must be above 0"),
        ({"distribution": "beta"}, "the distribution 'beta', which is not known here: use one of constant"),
        ({"values": [1, 2], "probabilities": [0.5, 0.6]}, "probabilities must be a list"),
        ({"values": [1], "goal": 3}, "the unknown key goal"),
        ({"distribution": "int_uniform", "min": 0.5, "max": 2}, "must be whole numbers"),
    ],
)
def test_a_parameter_that_cannot_be_drawn_from_is_one_sentence(parameter, words):
    with pytest.raises(UserError, match=words):
        search_space.drawn("a.key", parameter, 0, 0)


def test_sections_with_keys_called_min_and_max_are_no_parameters():
    space = {"timesteps": {"min": {"values": [0, 100]}, "max": {"min": 500, "max": 900}}}
    assert dict(search_space.leaves(space)) == {
        "timesteps.min": {"values": [0, 100]},
        "timesteps.max": {"min": 500, "max": 900},
    }


def read(file, *words) -> Experiment:
    return load_config(Experiment, ["--config", str(file), *words], script="s", intro="1\n2\n3\n4\n5")


@pytest.mark.parametrize("path", sorted((ROOT / "configs/sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_sweep_file_is_an_experiment_with_the_same_runs(path, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    sweep, words = yaml.safe_load(path.read_text()), []
    if sweep["method"] == "random":
        words = ["--samples", "4"]
    experiment = read(path, *words)
    runs = plan(experiment)
    parameters = {key: each for key, each in sweep["parameters"].items() if key != "train.seed"}
    for run in runs:
        values = run.config.model_dump()
        assert values["tracking"]["wandb"] == "online" and values["data"]["path"] == "photos"
        for key, parameter in parameters.items():
            section, _, name = key.partition(".")
            value = "null" if values[section][name] is None else values[section][name]
            assert value in parameter["values"] if "values" in parameter else parameter["min"] <= value
    if sweep["method"] == "grid":
        axes = itertools.product(*(each["values"] for each in sweep["parameters"].values()))
        assert len(runs) == len(list(axes))
    # Written as a sweep, and read again: the same variants.
    again = tmp_path / "again.yaml"
    again.write_text(written_sweep.text_of(experiment))
    assert list(variants_of(read(again, *words))) == list(variants_of(experiment))
    assert read(again).seeds == experiment.seeds
    assert yaml.safe_load(again.read_text())["parameters"].keys() == {**parameters, "train.seed": {}}.keys()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "bayes"}, "method is 'bayes' in .*: without W&B's server a sweep can be grid or random"),
        ({"command": ["python", "a.py"]}, r"the command in .* has no \$\{program\}"),
        ({"command": None}, "has no command"),
        ({"command": ["python", "${program}", "--lora.rank=4"]}, r"has no \$\{args\}, so that no run would get its"),
        (
            {"command": ["${program}", "--lora.alpha=4", "--lora.alpha", "8", "${args}"]},
            "--lora.alpha is given twice in",
        ),
        ({"command": ["${program}", "--lora.rank=4", "${args}"]}, "lora.rank is a parameter and in the command"),
        ({"command": ["${program}", "photos", "${args}"]}, "has the word photos, which is no setting"),
        (
            {"command": ["${program}", "${args_json}", "${args}"]},
            r"has \$\{args_json\}, which the scripts of this suite do",
        ),
        (
            {"command": ["${program}", "--data.path=${envvar:NO_SUCH}", "${args}"]},
            "NO_SUCH is not set in the environment",
        ),
        ({"parameters": {"optimizer.lr": {"min": 0.1, "max": 0.2}}}, "has no list of values, which a grid"),
        ({"parameters": {"lora": 3}}, "lora is 3, which is no parameter"),
        (
            {"early_terminate": {"type": "hyperband"}},
            "early_terminate, and without W&B's server every run is trained to its end",
        ),
        ({"run_cap": 3}, "is a grid of 12 runs with the run_cap 3"),
        (
            {"method": "random", "run_cap": 2},
            "has 3 seeds and the run_cap 2: remove it, or give fewer values of train.seed",
        ),
        ({"run_cap": "x"}, "run_cap is 'x' in .*: it must be a whole number above 0"),
        ({"paramters": {}}, "has the key paramters, which is not known of a sweep"),
    ],
)
def test_a_sweep_that_cannot_be_read_is_one_sentence(tmp_path, change, words):
    sweep = yaml.safe_load((ROOT / "configs/sweeps/sdxl_rank.yaml").read_text()) | change
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    with pytest.raises(UserError, match=words):
        read(tmp_path / "sweep.yaml")


def test_one_seed_for_all_runs_of_a_sweep(tmp_path):
    """As a parameter with one value, or in the command."""
    sweep = yaml.safe_load((ROOT / "configs/sweeps/sdxl_rank.yaml").read_text())
    of_command = {**sweep, "parameters": {"lora.rank": {"values": [4]}}}
    of_command["command"] = [*sweep["command"][:-1], "--train.seed=7", "${args}"]
    for content in (of_command, sweep | {"parameters": {"lora.rank": {"values": [4]}, "train.seed": {"value": 7}}}):
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
        assert read(tmp_path / "sweep.yaml").seeds == [7]


def test_a_sweep_without_a_seed_has_that_of_its_config(tmp_path):
    """Each run of W&B's is one run here, and run_cap counts them."""
    sweep = yaml.safe_load((ROOT / "configs/sweeps/sdxl_rank.yaml").read_text())
    sweep["parameters"] = {"lora.rank": {"values": [4, 8]}}
    for seed, text in (
        (0, "lora: {rank: 8}"),
        (7, "train: {seed: 7}"),
        (7, "train: {seed: 7, steps: 3}\nlora: {rank: 8}"),
    ):
        (tmp_path / "base.yaml").write_text(text)
        command = ["accelerate", "launch", "${program}", "--config", str(tmp_path / "base.yaml"), "${args}"]
        for change in ({"run_cap": 2}, {"method": "random", "run_cap": 5}):
            (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({**sweep, "command": command, **change}))
            experiment = read(tmp_path / "sweep.yaml")
            assert experiment.seeds == [seed] and experiment.samples == (5 if "method" in change else None)


def test_variables_of_the_environment_in_a_command_are_filled_in_as_wandb_does(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_DATA", "photos")
    sweep = yaml.safe_load((ROOT / "configs/sweeps/sdxl_rank.yaml").read_text())
    words = ["--num_processes", "${envvar:MY_DATA}", "${program}", "--config", "${envvar:MY_DATA}/a.yaml"]
    sweep["command"] = ["accelerate", "launch", *words, "--data.path=/x/${envvar:MY_DATA}", "${args}"]
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    experiment = read(tmp_path / "sweep.yaml")
    assert experiment.launch == ["--num_processes", "photos"] and experiment.configs == ["photos/a.yaml"]
    assert experiment.settings == {"data": {"path": "/x/photos"}}


def test_a_variant_with_nothing_after_its_name_has_no_settings(tmp_path):
    text = "title: t\nscript: s.py\nconfigs: [c.yaml]\nfolder: runs\nvariants:\n  plain:\n  five: {loss: {snr_gamma: null}}\n"
    (tmp_path / "experiment.yaml").write_text(text)
    found = dict(variants_of(read(tmp_path / "experiment.yaml")))
    assert found == {"plain": {}, "five": {"loss.snr_gamma": None}}


def test_a_parameter_takes_the_place_of_a_setting_in_a_written_sweep(tmp_path):
    """Else W&B's run is given it twice, and refuses."""
    settings = {"title": "t", "script": "s.py", "configs": ["c.yaml"], "folder": "runs"}
    settings["settings"] = {"lora": {"rank": 16, "alpha": 2}}
    for space in (
        {"grid": {"lora": {"rank": [2, 4]}}},
        {"search": {"lora": {"rank": {"min": 2, "max": 4}}}, "samples": 2},
    ):
        command = written_sweep.sweep_of(Experiment(**settings, **space))["command"]
        assert command[-4:] == ["--config", "c.yaml", "--lora.alpha=2", "${args}"]


def test_a_sweep_over_seeds_alone_repeats_one_run(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    sweep = yaml.safe_load((ROOT / "configs/sweeps/sdxl_rank.yaml").read_text())
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep | {"parameters": {"train.seed": {"values": [4, 5]}}}))
    assert [run.name for run in plan(read(tmp_path / "sweep.yaml"))] == ["run-seed4", "run-seed5"]


def test_a_search_may_be_nested_as_wandb_nests_it():
    plain = {"optimizer": {"lr": {"min": 0.1, "max": 0.2}}}
    nested = {"optimizer": {"parameters": plain["optimizer"]}}
    assert list(search_space.leaves(nested)) == list(search_space.leaves(plain))


def test_names_of_variants_fit_into_a_folder_name():
    """A sweep has many parameters, and texts of any length and letters; names up to the limit are as ever."""
    assert search_space.name_of({"lora.rank": 8, "loss.snr_gamma": None}) == "rank-8_snr_gamma-null"
    long = [{"a.prompt": "é" + "x" * 300 + end} for end in "12"] + [{f"a.key{n}": 0.123 for n in range(40)}]
    names = [search_space.name_of(settings) for settings in long]
    assert len(set(names)) == 3 and all(len(name) < 180 and name.isascii() for name in names)


@pytest.mark.parametrize("text", ["1e3", "+.5", "0o7", "off", "null", "2024-01-01", "a\u2028b", "-1", ""])
def test_texts_of_a_written_sweep_are_texts_for_both_readers(text):
    """W&B reads YAML 1.1, and we 1.2; text_of asserts that both find the sweep."""
    settings = {"title": "t", "script": "s.py", "configs": ["c.yaml"], "folder": "runs"}
    written_sweep.text_of(Experiment(**settings, grid={"lora": {"author": [text, "x"]}}))


def test_search_in_an_experiment_file(tmp_path):
    content = {
        "title": "t",
        "script": "scripts/train_sd15_lora.py",
        "configs": [str(ROOT / "configs/sd15_lora.yaml")],
        "settings": {"data": {"path": "photos"}},
        "folder": str(tmp_path / "runs"),
        "variants": {"plain": {}},
        "search": SPACE | {"train": {"batch_size": {"min": 1, "max": 4}}},
        "samples": 3,
        "reference": "plain",
        "seeds": [0],
    }
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump(content))
    runs = plan(read(file))
    assert [run.variant for run in runs][0] == "plain" and len(runs) == 4
    assert all(1e-5 <= run.config.optimizer.lr <= 1e-3 and run.config.lora.rank in (4, 8, 16) for run in runs[1:])
    for change, words in (
        ({"samples": None}, "samples and search belong together"),
        ({"grid": {"lora": {"rank": [1]}}, "variants": {}}, "search and grid are both set"),
        ({"search": {"train": {"seed": {"values": [1]}}}}, "train.seed is set by the experiment itself"),
        ({"slurm": {"timeout_min": 3}}, "slurm has parameters of jobs, and cluster is null"),
    ):
        file.write_text(yaml.safe_dump(content | change))
        with pytest.raises(UserError, match=words):
            read(file)
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="variants have names and settings of their own"):
        written_sweep.text_of(read(file))


def test_a_searched_page_names_the_luck_of_the_best():
    def pair(error):
        return SimpleNamespace(outcome=SimpleNamespace(difference=SimpleNamespace(standard_error=error)))

    pairs = [pair(0.1), pair(0.2), pair(0.4), SimpleNamespace(outcome=None)]
    [note] = selection.notes(20, pairs)  # 1.867 x 0.2 / sqrt(2) = 0.264
    assert "The 20 variants were searched" in note and "look better than their mean by about 0.26 in log loss" in note
    [note] = selection.notes(20, [])
    assert "about" not in note and "with seeds that the search did not use" in note
    assert selection.notes(2, pairs) == []


def test_the_best_of_equal_variants():
    """Against the known expected maxima of normal samples (Harter 1961): 1.1630 for 5, 1.8675 for 20."""
    assert selection.expected_best(1) == 0.0
    for count, known in ((2, 0.56419), (5, 1.16296), (20, 1.86748), (100, 2.50759)):
        assert selection.expected_best(count) == pytest.approx(known, abs=1e-4)
