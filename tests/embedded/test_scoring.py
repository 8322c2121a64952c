"""The demo's judge as a command: what it writes for a run, when it does nothing, what it refuses. No base draws anything here."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import yaml
from fake_runs import fake_run

from demo import night, scoring
from demo.checker import Checker
from demo.concepts import CONCEPTS, known_scenes
from demo.drawing import Scene, draw
from demo.painter import BASES
from sushi_research.reports.scores import Score, read_scores
from sushi_research.runs.run_folder import RunFolder

STAR, UNAGI = CONCEPTS["star"], CONCEPTS["unagi"]
PROMPTS = (3, 2)


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A finished run, whose adapter draws the second picture of each set wrong."""
    folder = fake_run(tmp_path / "run")
    (folder / "run.safetensors").write_bytes(b"not read here")
    config(folder)
    monkeypatch.setattr(scoring, "load_pipeline", lambda base, adapter: (base, adapter))
    monkeypatch.setattr(scoring, "paint", paint)
    monkeypatch.setattr(scoring, "quiet_libraries", lambda: None)  # it imports them
    return folder


def config(folder: Path, base: str = str(BASES / "sd15"), data: str = "demo/photos/star") -> None:
    settings = {"model": {"base": base}, "data": {"path": data}, "lora": {}, "train": {}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))


def paint(pipeline, prompts, description):
    assert pipeline[0] == BASES / "sd15" and pipeline[1].name == "run.safetensors"
    scenes = [Scene.from_caption(prompt) for prompt in prompts]
    return [draw(scenes[0] if number == 1 else scene) for number, scene in enumerate(scenes)]


def checker_of(concept):
    return Checker([*concept.unseen_scenes(PROMPTS[0]), *known_scenes(PROMPTS[1])])


def main(*words: object, measures=MappingProxyType({})) -> None:
    scoring.main([str(word) for word in words], PROMPTS, checker_of, measures)


def expected(concept) -> dict[str, Score]:
    asked, known = concept.unseen_scenes(PROMPTS[0]), known_scenes(PROMPTS[1])
    return {
        "concept": Score({asked[0].caption: 1.0, asked[1].caption: 0.0, asked[2].caption: 1.0}, True, "learned"),
        "kept": Score({known[0].caption: 1.0, known[1].caption: 0.0}, True, "kept"),
    }


def test_each_prompt_of_the_concept_and_of_the_base_s_world_is_scored(run, capsys):
    main(run)
    assert read_scores(run / "scores.json") == expected(STAR)
    assert capsys.readouterr().out == "run: concept 2 of 3 right\nrun: kept 1 of 2 right\n"
    main(run)
    assert capsys.readouterr().out == f"{run / 'scores.json'} is up to date\n"
    main(run, "--concept", "unagi")  # the data may be another folder
    assert read_scores(run / "scores.json") == expected(UNAGI)
    capsys.readouterr()
    later = (run / "scores.json").stat().st_mtime_ns + 10**9
    os.utime(run / "run.safetensors", ns=(later, later))
    main(run, "--concept", "unagi")
    assert "concept 2 of 3 right" in capsys.readouterr().out


def test_the_brightness_of_night_pictures_is_scored_too(run, capsys):
    """A daylight drawing of a night scene is wrong by far more than the drawing of another night scene."""
    scenes = CONCEPTS["night"].unseen_scenes(PROMPTS[0])
    for _ in range(2):  # the second finds the scores up to date
        main(run, "--concept", "night", measures=night.MEASURES)
    found = read_scores(run / "scores.json")["brightness error"]
    assert list(found.values) == [scene.caption for scene in scenes]
    assert (found.higher_is_better, found.about) == (False, "learned")
    assert capsys.readouterr().out.endswith("is up to date\n")
    day = night.brightness_error(draw(replace(scenes[0], style="day")), scenes[0])
    assert found.values[scenes[0].caption] == 0 and found.values[scenes[1].caption] < 0.25 * day and day > 0.15


def test_a_run_that_is_evaluated_with_the_average_of_its_weights_is_scored_with_it(run):
    settings = yaml.safe_load((run / "config.yaml").read_text())
    folder = RunFolder(run, None)
    assert [
        scoring.adapter_of(folder, settings | ema)
        for ema in ({}, {"ema": {"evaluate": False}}, {"ema": {"evaluate": True}})
    ] == [folder.adapter, folder.adapter, folder.average]


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda run: (run / "run.json").unlink(), "holds no finished run"),
        (lambda run: (run / "run.json").write_text("{"), "run.json is not valid JSON"),
        (lambda run: config(run, data="photos/mine"), "was trained on photos/mine, which is none of demo/photos"),
        (lambda run: config(run, base="someone/sd15"), "someone/sd15, the base of .*, is not a folder here"),
        (lambda run: config(run, base=3), "config.yaml has no model.base: restore it"),
        (lambda run: (run / "config.yaml").unlink(), "config.yaml"),
    ],
)
def test_anything_else_is_one_sentence(run, capsys, harm, words):
    harm(run)
    with pytest.raises(SystemExit) as caught:
        main(run)
    printed = capsys.readouterr()
    assert caught.value.code == 2 and printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert re.search(words, printed.err)
    assert not (run / "scores.json").exists()
