"""Prompts with settings of their own: in a config, in a YAML list, and one per line with kohya's options."""

import pytest

from sushi_research.config import SD15Training
from sushi_research.config.command_line import config_to_yaml, load_config
from sushi_research.config.other_scripts import SamplingConfig
from sushi_research.config.prompts import Prompt, read_prompts
from sushi_research.errors import UserError

REQUIRED = ["--model.base", "base", "--data.path", "photos", "--train.steps", "3"]


def load(*words, config_class=SD15Training):
    required = REQUIRED if config_class is SD15Training else ["--base", "base"]
    return load_config(config_class, [*required, *words], script="script", intro="1\n2\n3\n4\n5")


def test_a_config_with_mappings_reads_back_equal(tmp_path):
    config = load(
        "--sample.prompts", "['a cat', {prompt: a dog, seed: 3, width: 64, scale: -0.5, negative_prompt: ''}]"
    )
    assert config.sample.prompts == ["a cat", Prompt(prompt="a dog", seed=3, width=64, scale=-0.5, negative_prompt="")]
    text = config_to_yaml(config)
    assert "  - prompt: a dog\n    negative_prompt: ''\n    seed: 3\n    width: 64\n    scale: -0.5\n" in text
    (tmp_path / "config.yaml").write_text(text)
    assert load("--config", str(tmp_path / "config.yaml")) == config


LINES = """\
\ufeff# kohya's file of sample prompts

a photo of\u2028sks dog, on a beach --w 1024 --H 768 --s 28 --l 6.5 --d 7 --n blurry, low-res
  a well-lit room, 1girl\t
"""


def test_a_text_file_has_a_prompt_per_line_with_kohyas_options(tmp_path):
    (tmp_path / "prompts.txt").write_text(LINES)
    assert read_prompts(str(tmp_path / "prompts.txt"), "prompts_file") == [
        Prompt(
            prompt="a photo of\u2028sks dog, on a beach",
            negative_prompt="blurry, low-res",
            seed=7,
            width=1024,
            height=768,
            steps=28,
            guidance=6.5,
        ),
        Prompt(prompt="a well-lit room, 1girl"),
    ]


def test_a_yaml_file_is_a_list_of_the_same(tmp_path):
    (tmp_path / "prompts.yaml").write_text("- a cat\n- prompt: a dog\n  scale: 0.7\n")
    found = read_prompts(str(tmp_path / "prompts.yaml"), "prompts_file")
    assert found == [Prompt(prompt="a cat"), Prompt(prompt="a dog", scale=0.7)]


KNOWN = (
    "a line takes --w (width), --h (height), --s (steps), --l (guidance), --d (seed), --n (negative_prompt); a YAML list takes the "
    "scale too."
)
MISTAKES = {
    "p.txt": [
        ("a cat\na dog --ss euler_a --w 64", [f"unknown option --ss in line 2 of p.txt: {KNOWN}"]),
        (
            "# no\n\n--w 64 a cat",
            ["a prompt is missing in line 3 of p.txt, which begins with --w: options follow the prompt."],
        ),
        ("a --w 64 --w 65", ["--w is given twice in line 1 of p.txt: keep one."]),
        (
            "a --l 1 --n blurry\nb --l 1 --n",
            [
                "negative_prompt in line 1 of p.txt has no effect while its guidance is 1, which is none: set another guidance, or "
                "remove it"
            ],
        ),
        (
            "a --w 1oo",
            [
                'width is "1oo" in line 1 of p.txt: must be a whole number (at least 8, at most 8192, a multiple of 8) or null'
            ],
        ),
        (
            "a --d -1\nb --l 0.5",
            [
                "seed is -1 in line 1 of p.txt: must be a whole number (at least 0, below 4294967296) or null",
                "guidance is 0.5 in line 2 of p.txt: must be a number (at least 1, at most 100) or null",
            ],
        ),
        ("# nothing\n", ["p.txt has no prompt: write one, or remove prompts_file."]),
        (b"\xff\xfe\x00", ["p.txt cannot be read as UTF-8 text: save it as UTF-8."]),
        ("a\x07b", ["the prompt 'a\\x07b' in line 1 of p.txt is not text (the control character U+0007): correct it."]),
    ],
    "p.yaml": [
        ("prompt: a cat", ['p.yaml holds {"prompt": "a cat"}: write a list of prompts, each after a hyphen.']),
        ("- prompt: a\n  widht: 64", ["unknown key widht in entry 1 of p.yaml: did you mean width?"]),
        ("- a\n- seed: 3", ["prompt is missing in entry 2 of p.yaml: add it, the text of the prompt"]),
        (
            "- [a]",
            [
                '["a"] in entry 1 of p.yaml is not a prompt: write text, or a mapping with prompt and any of negative_prompt, '
                "seed, width, height, steps, guidance, scale."
            ],
        ),
        ("- [a", ["p.yaml, line 1, column 5: not valid YAML: expected ',' or ']', but got '<stream end>'"]),
    ],
    "p.toml": [
        (
            "a",
            [
                "prompts_file is p.toml: give a file that ends in .txt (one prompt per line) or .yaml (a list of prompts)."
            ],
        )
    ],
}


@pytest.mark.parametrize("name", MISTAKES)
def test_every_mistake_in_a_file_has_its_sentence(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content, sentences in MISTAKES[name]:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(UserError) as error:
            read_prompts(name, "prompts_file")
        assert str(error.value).split("\n") == sentences, content
    with pytest.raises(UserError, match=r"^prompts_file: missing\.txt does not exist: check the path$"):
        read_prompts("missing.txt", "prompts_file")


@pytest.mark.parametrize(
    ("words", "config_class", "sentence"),
    [
        (
            ["--sample.prompts", "[{prompt: a, width: 65}, {seed: 1}]"],
            SD15Training,
            'sample.prompts is [{"prompt": "a", "width": 65}, {"seed": 1}] on the command line: width is 65 in entry 1: must be a '
            "whole number (at least 8, at most 8192, a multiple of 8) or null; prompt is missing in entry 2: add it, the text of "
            "the prompt",
        ),
        (
            ["--sample.prompts", "[a]", "--sample.prompts_file", "p.txt"],
            SD15Training,
            "sample.prompts (on the command line) and sample.prompts_file (on the command line) are both set: keep one of them",
        ),
        (
            ["--prompts", "['']"],
            SamplingConfig,
            "prompts has an empty prompt: write its text",
        ),
        ([], SamplingConfig, "no prompts: give --prompts TEXT or --prompts_file FILE"),
        (
            ["--prompts", "[a]", "--prompts_file", "p.txt"],
            SamplingConfig,
            "prompts and prompts_file are both set: keep one of them",
        ),
    ],
)
def test_a_mistake_in_a_config_has_its_sentence(words, config_class, sentence):
    with pytest.raises(UserError) as error:
        load(*words, config_class=config_class)
    assert str(error.value) == sentence
