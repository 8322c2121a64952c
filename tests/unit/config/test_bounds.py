"""Numbers, lists, texts and paths that nobody means, and YAML that would take all time or memory."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sushi_research.config import SD15Training, SDXLTraining
from sushi_research.config.command_line import load_config
from sushi_research.config.keys import keys_of
from sushi_research.config.other_scripts import SamplingConfig, evaluation_config
from sushi_research.config.yaml12 import parse_yaml, read_yaml
from sushi_research.errors import UserError
from sushi_research.experiments.experiment import Experiment, plan

REQUIRED = {"--model.base": "base", "--data.path": "photos", "--train.steps": "10"}
SAMPLING = {"--base": "base", "--prompts": "[a]"}
EXPERIMENT = {
    "--title": "t",
    "--script": "scripts/train_sdxl_lora.py",
    "--configs": "[configs/demo_sdxl.yaml]",
    "--folder": "runs/x",
    "--grid": "{lora: {rank: [1, 2]}}",
}
CLASSES = {SDXLTraining: REQUIRED, SD15Training: REQUIRED, SamplingConfig: SAMPLING, Experiment: EXPERIMENT}


def refusal(config_class: type, given: dict[str, str]) -> str:
    """The sentence that settings are refused with; "" if they are accepted."""
    words = [f"{key}={value}" for key, value in (CLASSES[config_class] | given).items()]
    try:
        load_config(config_class, words, script="s", intro="1\n2\n3\n4\n5")
    except UserError as error:
        return str(error)
    return ""


def numbers(schema: Any) -> Iterator[dict[str, Any]]:
    """Every schema of a number within a schema."""
    for part in schema.values() if isinstance(schema, dict) else schema:
        if isinstance(part, dict | list):
            yield from numbers(part)
    if isinstance(schema, dict) and schema.get("type") in ("integer", "number"):
        yield schema


def test_every_number_has_bounds() -> None:
    for config_class in (*CLASSES, evaluation_config(SDXLTraining)):
        for name, schema in keys_of(config_class.model_json_schema()).leaves.items():
            if name == "optimizer.kwargs":
                continue  # the optimizer's own
            for number in numbers(schema):
                assert {"maximum", "exclusiveMaximum"} & number.keys(), (name, number)
                assert {"minimum", "exclusiveMinimum"} & number.keys(), (name, number)


def test_a_number_beyond_its_bound_is_refused() -> None:
    for key, number in {
        "lora.rank": str(2**40), "lora.alpha": "1e300", "train.batch_size": "1" + "0" * 400, "optimizer.lr": "1e300",
        "sample.width": str(2**31), "sample.steps": "1001", "train.seed": str(2**63), "schedule.warmup": str(2**40),
        "loss.snr_gamma": "-1e300", "train.steps": "1e3",
    }.items():  # fmt: skip
        assert refusal(SDXLTraining, {f"--{key}": number}).startswith(f"{key} is "), key


def test_the_bounds_leave_room_for_what_is_meant() -> None:
    large = {
        "lora.rank": "4096", "lora.alpha": "1000", "train.batch_size": "256", "train.accumulation": "256",
        "train.steps": "10000000", "checkpoint.keep": "999999", "data.resolution": "2048", "optimizer.lr": "1.0",
        "sample.width": "4096", "sample.guidance": "30", "evaluation.noise_samples": "1000", "evaluation.held_out": "0.9",
        "loss.snr_gamma": "1000", "train.max_grad_norm": "1e6", "sample.seeds": str(list(range(1000))),
    }  # fmt: skip
    assert refusal(SDXLTraining, {f"--{key}": value for key, value in large.items()}) == ""


def test_an_empty_value_does_not_switch_a_setting_off() -> None:
    for key in ("train.max_grad_norm", "loss.snr_gamma", "checkpoint.every", "lora.rank"):
        for empty in ("", "# none"):
            assert refusal(SDXLTraining, {f"--{key}": empty}).startswith(f'{key} is "{empty}" on the command line')


TOO_MUCH: list[tuple[type, dict[str, str], str]] = [
    (SDXLTraining, {"--train.batch_size": "4096", "--train.accumulation": "17"}, "is 69,632 samples per step"),
    (SDXLTraining, {"--sample.seeds": str(list(range(1001)))}, "it has 1,001 entries, and at most 1,000 can be used"),
    (SDXLTraining, {"--sample.prompts": f"[{'a' * 65_537}]"}, "has 65,537 letters, and at most 65,536 are read"),
    (SDXLTraining, {"--sample.negative_prompt": "a" * 65_537}, "has 65,537 letters, and at most 65,536 are read"),
    (SDXLTraining, {"--data.split": "a" * 1001}, "it has 1,001 letters, and at most 1,000 can be used"),
    (SDXLTraining, {"--run.name": "a" * 201}, "must be at most 200 letters"),
    (SDXLTraining, {"--optimizer.kwargs.a": f"[{'1,' * 1001}]"}, "optimizer.kwargs.a is [1, 1"),
    (SamplingConfig, {"--seeds": str(list(range(999))), "--adapters": str([*"abcdefgh"])}, "give 16,983 images"),
    (Experiment, {"--seeds": str(list(range(501)))}, "make more than 1000 runs"),
    (
        Experiment,
        {"--grid": f"{{lora: {{{', '.join(f'k{n}: [1, 2, 3]' for n in range(40))}}}}}"},
        "more than 1000 runs",
    ),
]


def test_what_is_too_much_in_sum_is_refused() -> None:
    for config_class, given, sentence in TOO_MUCH:
        found = refusal(config_class, given)
        if not found:
            words = [f"{key}={value}" for key, value in (CLASSES[config_class] | given).items()]
            with pytest.raises(UserError) as caught:
                plan(load_config(config_class, words, script="s", intro="1\n2\n3\n4\n5"))
            found = str(caught.value)
        assert sentence in found


def location_keys() -> Iterator[tuple[type, str, bool]]:
    """(config class, key, whether it is a list) of every key that takes a path."""
    for config_class, section in ((SDXLTraining, ""), (SamplingConfig, ""), (Experiment, "")):
        for name in keys_of(config_class.model_json_schema()).leaves:
            last = name.rpartition(".")[2]
            if last in ("base", "vae", "text_encoders", "tokenizers", "path", "folder", "output", "script"):
                yield config_class, section + name, False
            elif last in ("adapters", "configs"):
                yield config_class, section + name, True


def test_every_path_is_checked_and_its_home_folder_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    found = list(location_keys())
    assert len(found) >= 17
    for config_class, key, is_list in found:
        for path in ("a\0b", "x" * 5000, "~nobody-here/x", ""):
            value = f'["{path}"]'.replace("\0", "\\0") if is_list else path
            assert refusal(config_class, {f"--{key}": value}).startswith(f"{key} is "), (key, path)
        words = {**CLASSES[config_class], f"--{key}": "[~/a]" if is_list else "~/a"}
        words |= {"--masks.source": "files"} if key == "masks.folder" else {}  # without which it has no effect
        config: Any = load_config(
            config_class, [f"{name}={value}" for name, value in words.items()], script="s", intro="1\n2\n3\n4\n5"
        )
        for part in key.split("."):
            config = getattr(config, part)
        assert config == (["/home/me/a"] if is_list else "/home/me/a"), key


WIDE = ", ".join(["x"] * 20)
DEEP_YAML = {
    "flow lists": "a: " + "[" * 10_000,
    "flow mappings": "{a: " * 10_000,
    "block lists": "a:\n " + "- " * 10_000 + "x",
    "block mappings": "\n".join(" " * depth + "a:" for depth in range(1_000)),
    "keys": "? " * 10_000 + "x",
    "aliases": "a0: &a0 [x]\n" + "\n".join(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 200)),
    "an alias of itself": "a: &a {b: [*a]}",
}
LARGE_YAML = {
    "many values": f"a: [{'x, ' * 20_001}]",
    "aliases of aliases": f"a0: &a0 [{WIDE}]\n"
    + "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 20)}]" for n in range(1, 20)),
    "merges of merges": "a0: &a0 {x: 1}\n"
    + "\n".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 20)}], y{n}: 1}}" for n in range(1, 20)),
}
WRONG_TAGS = ("!!bool x", '!!int ""', "!!int " + "1" * 5000, '!!float ""', "!!timestamp x", "!!timestamp 2024-99-99")


def test_yaml_is_read_within_bounds() -> None:
    for kind, texts in {"nested more than 100 deep": DEEP_YAML, "more than 20,000 values": LARGE_YAML}.items():
        for name, text in texts.items():
            with pytest.raises(UserError, match=kind):
                parse_yaml(text, name)
    for tag in WRONG_TAGS:
        with pytest.raises(UserError, match="line 1, column 4: not valid YAML: .* cannot be read as"):
            parse_yaml(f"a: {tag}", "x")
    shared = parse_yaml("a: &a {x: [1, 2]}\nb: *a\nc: {<<: *a, y: 3}\n", "x")
    assert shared["b"] == {"x": [1, 2]} and shared["c"] == {"x": [1, 2], "y": 3}


def test_a_config_that_is_no_small_file_is_refused(tmp_path: Path) -> None:
    large, fifo = tmp_path / "large.yaml", tmp_path / "fifo.yaml"
    with large.open("wb") as file:
        file.truncate(200 << 20)
    os.mkfifo(fifo)
    for path, problem in {large: "larger than 1,048,576 bytes", fifo: "a FIFO", Path("/dev/zero"): "a device"}.items():
        with pytest.raises(UserError, match=problem):
            read_yaml(str(path))


def test_a_file_of_another_program_gets_a_short_answer(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("".join(f"learning_rate_{number}: 1\n" for number in range(5_000)) + "k" * 1_000 + ": 1\n")
    lines = refusal(SDXLTraining, {"--config": str(file)}).splitlines()
    assert lines[0] == "5001 problems in the configuration:" and lines[-1] == "  and 4981 more" and len(lines) == 22
