"""The images of a list of prompts: their settings, files and labels."""

import pytest

from sushi_research.config import SD15Training
from sushi_research.config.prompts import Prompt, as_prompts
from sushi_research.errors import UserError
from sushi_research.sampling.prompts import of_run, require_few_chunks


def config(**sample):
    return SD15Training(
        model={"base": "x"},
        data={"path": "x", "resolution": 64},
        train={"steps": 1},
        sample={"guidance": 5.0, **sample},
    )


def images(prompts, **sample):
    return of_run(config(**sample), as_prompts(prompts))


def test_a_prompt_takes_what_it_does_not_say_from_the_other_settings():
    own = Prompt(prompt="b", negative_prompt="", seed=9, width=96, height=32, steps=3, guidance=1.0, scale=0.5)
    first, second = images(["a", own], negative_prompt="blurry", steps=7, height=128)
    settings = lambda image: {name: value for name, value in vars(image).items() if name in Prompt.model_fields}  # noqa: E731
    assert settings(first) == {
        "prompt": "a",
        "negative_prompt": "blurry",
        "seed": 0,
        "width": 64,
        "height": 128,
        "steps": 7,
        "guidance": 5.0,
        "scale": 1.0,
    }
    assert settings(second) == own.given
    assert [image.file_name for image in (first, second)] == ["00-seed0.png", "01-seed9.png"]


def test_each_label_says_what_distinguishes_its_image():
    prompts = [
        "a",
        *(Prompt(prompt="a", **{key: value}) for key, value in {"scale": 0.5, "width": 96, "steps": 3}.items()),
    ]
    prompts += [Prompt(prompt="a", guidance=1.5), Prompt(prompt="a", negative_prompt="dark", seed=4)]
    labels = [image.label for image in images(prompts, seeds=[0])]
    assert labels == [
        "a (seed 0)",
        "a (seed 0, scale 0.5)",
        "a (seed 0, 96x64)",
        "a (seed 0, steps 3)",
        "a (seed 0, guidance 1.5)",
        "a (seed 4, negative: dark)",
    ]
    assert [image.label for image in images(["a", "b"])] == ["a", "b"]
    assert [image.label for image in images([Prompt(prompt="a", negative_prompt="")], negative_prompt="dark")] == [
        "a (no negative prompt)"
    ]


def test_a_seed_of_its_own_is_one_image():
    found = images(["a", Prompt(prompt="b", seed=5)], seeds=[0, 1])
    assert [(image.number, image.seed) for image in found] == [(0, 0), (0, 1), (1, 5)]


def test_the_same_image_twice_is_refused():
    with pytest.raises(UserError, match=r"^the prompts 1 and 3 are the same image \('a', seed 0\): remove one"):
        images(["a", "b", Prompt(prompt="a", width=64, seed=0)])
    with pytest.raises(UserError, match=r"^the prompts and seeds give 20,000 images, and at most 10,000 are generated"):
        images([str(number) for number in range(100)], seeds=list(range(200)))


def test_texts_that_would_be_repeated_without_end_are_refused():
    found = images(["a", Prompt(prompt="b", negative_prompt="c")])
    require_few_chunks(found, {"a": 200, "b": 12, "c": 8})  # 200 and 1, and both 24
    with pytest.raises(UserError, match="'b' and its negative prompt have 12 and 11 chunks .* repeated to 132 each"):
        require_few_chunks(found, {"b": 12, "c": 11})
