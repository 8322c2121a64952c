"""The sections: defaults, ranges, types, and the sentences of the checks across keys."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from sushi_research.config import SD15Training, SDXLTraining

MINIMAL: dict[str, Any] = {"model": {"base": "base"}, "data": {"path": "photos"}, "train": {"steps": 10}}


def build(config_class: type = SDXLTraining, **sections: dict[str, Any]) -> Any:
    merged = {name: {**MINIMAL.get(name, {}), **sections.get(name, {})} for name in {**MINIMAL, **sections}}
    return config_class(**merged)


def leaf_names(node: Any, prefix: str = "") -> set[str]:
    if not isinstance(node, dict):
        return {prefix[:-1]}
    return set().union(*(leaf_names(value, f"{prefix}{name}.") for name, value in node.items())) or {prefix[:-1]}


def test_defaults_of_each_architecture() -> None:
    sd15, sdxl = build(SD15Training), build(SDXLTraining)
    assert (sd15.data.resolution, sdxl.data.resolution) == (512, 1024)
    assert (sd15.sample.guidance, sdxl.sample.guidance) == (7.0, 5.0)
    assert sd15.model.clip_skip == 1
    assert (sdxl.model.text_encoder_1_layer, sdxl.data.time_ids) == ("penultimate", "image")
    only_sd15 = leaf_names(sd15.model_dump()) - leaf_names(sdxl.model_dump())
    only_sdxl = leaf_names(sdxl.model_dump()) - leaf_names(sd15.model_dump())
    assert only_sd15 == {"model.clip_skip"}
    assert only_sdxl == {"model.text_encoder_1_layer", "data.time_ids", "captions.dropout_to"}


def test_every_key_and_section_is_described_and_ascii() -> None:
    for config_class in (SD15Training, SDXLTraining):
        schema = config_class.model_json_schema()
        for section in schema["$defs"].values():
            assert section["description"].endswith(".")
            assert all(key["description"] for key in section["properties"].values())
        assert json.dumps(schema, ensure_ascii=False).isascii()


def test_a_config_cannot_be_changed() -> None:
    config = build()
    with pytest.raises(ValidationError, match="frozen"):
        config.lora.rank = 8
    with pytest.raises(ValidationError, match="frozen"):
        config.dry_run = True


# An instance of each bound, pattern and choice that a section declares, and of strict types.
REFUSED: list[tuple[str, str, Any]] = [
    ("lora", "rank", "8"),
    ("lora", "rank", 8.0),
    ("lora", "rank", True),
    ("lora", "rank", 0),
    ("lora", "alpha", 0),
    ("lora", "alpha", float("inf")),
    ("lora", "dropout", 1.0),
    ("lora", "init", "pissa"),  # changes the base weights
    ("lora", "init", "orthogonal"),  # not for convolutions
    ("lora", "targets", []),
    ("lora", "targets", "everything"),
    ("lora", "save_dtype", "fp16"),
    ("model", "base", ""),
    ("model", "variant", "fp32"),
    ("model", "text_encoder_1_layer", "first"),
    ("data", "bucket_step", 60),
    ("data", "flip", 1.5),
    ("data", "on_bad_file", "ignore"),
    ("train", "steps", 0),
    ("train", "seed", -1),
    ("train", "seed", 2**32),
    ("train", "precision", "no"),
    ("train", "max_grad_norm", 0),
    ("optimizer", "name", "sgd"),
    ("optimizer", "name", "torch..SGD"),
    ("optimizer", "name", "torch.optim.SGD()"),
    ("optimizer", "lr", 0.0),
    ("optimizer", "lr", float("nan")),
    ("optimizer", "kwargs", {"eps": None}),
    ("optimizer", "kwargs", {"eps": {"a": 1}}),
    ("optimizer", "kwargs", {"eps": float("inf")}),
    ("optimizer", "kwargs", {"weight decay": 0.0}),
    ("schedule", "name", "piecewise_constant"),  # needs rules that no key gives
    ("schedule", "warmup", 1.0),
    ("schedule", "warmup", -1),
    ("schedule", "cycles", 0),
    ("loss", "snr_gamma", 0.0),
    ("checkpoint", "every", 0),
    ("sample", "seeds", []),
    ("sample", "prompts", "a cat"),
    ("sample", "guidance", 0.5),
    ("sample", "width", 100),
    ("sample", "height", 0),
    ("tracking", "wandb", False),
    ("run", "name", ""),
    ("run", "name", ".."),
    ("run", "name", "a/b"),
    ("run", "name", "a b"),
    ("run", "name", "a\n"),
]


def test_a_value_out_of_type_or_range_is_refused() -> None:
    unknown = [("lora", "ran", 1), ("model", "clip_skip", 1), ("run", "output", 1)]  # clip_skip is SD1.5's
    for section, key, value in REFUSED + unknown:
        try:
            build(**{section: {key: value}})
        except ValidationError as error:
            assert {each["loc"][:2] for each in error.errors()} == {(section, key)}, (section, key, value)
        else:
            raise AssertionError(f"accepted: {section}.{key} = {value!r}")


def test_clip_skip_stays_within_the_encoder() -> None:
    assert build(SD15Training, model={"clip_skip": 11}).model.clip_skip == 11
    for clip_skip in (0, 12):
        with pytest.raises(ValidationError, match="clip_skip"):
            build(SD15Training, model={"clip_skip": clip_skip})


TAKEN: list[tuple[str, str, Any, type]] = [
    ("lora", "alpha", 8, float),
    ("schedule", "warmup", 0, int),
    ("lora", "targets", ["to_q", "to_k"], list),
    ("optimizer", "name", "torch.optim.SGD", str),
    ("train", "max_grad_norm", None, type(None)),
    ("sample", "prompts", [""], list),
    ("run", "name", "2024-01-31_a.b", str),
    ("train", "seed", 2**32 - 1, int),
]


def test_a_value_at_the_edge_is_taken_in_its_type() -> None:
    for section, key, value, type_ in TAKEN:
        taken = getattr(getattr(build(**{section: {key: value}}), section), key)
        assert (taken, type(taken)) == (value, type_), (section, key)


def test_kwargs_keep_their_types() -> None:
    kwargs = {"betas": [0.9, 0.99], "eps": 1e-8, "k": 5, "amsgrad": True, "mode": "x"}
    taken = build(optimizer={"kwargs": kwargs}).optimizer.kwargs
    assert taken == kwargs
    assert [type(value) for value in taken.values()] == [list, float, int, bool, str]


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    (
        {"data": {"resolution": 1000}},
        "data.resolution is 1000, not a multiple of data.bucket_step, which is 64: choose 960 or 1024",
    ),
    (
        {"data": {"resolution": 32}},
        "data.resolution is 32, not a multiple of data.bucket_step, which is 64: choose 64",
    ),
    (
        {"data": {"bucket_min_side": 1032}},
        "data.bucket_min_side is 1032, above data.resolution, which is 1024",
    ),
    (
        {"data": {"bucket_max_side": 1016}},
        "data.bucket_max_side is 1016, below data.resolution, which is 1024",
    ),
    ({"lora": {"targets": ["to_q", "to_q"]}}, "lora.targets names a module twice: keep one of each"),
    ({"train": {"steps": None}}, "train.steps and train.epochs are both unset: set one of them"),
    (
        {"train": {"epochs": 2}},
        "train.steps and train.epochs are both set: keep one and set the other to null",
    ),
    ({"optimizer": {"kwargs": {"lr": 0.1}}}, "optimizer.kwargs.lr is not for here: set optimizer.lr"),
    ({"optimizer": {"kwargs": {"params": 1}}}, "optimizer.kwargs.params is not for here: set lora.targets"),
    ({"sample": {"seeds": [3, 3]}}, "sample.seeds has a seed twice: it would generate the same images again"),
    (
        {"sample": {"prompts": ["a cat", "a\0dog"]}},
        "sample.prompts has 'a\\x00dog', which is not text (the control character U+0000): remove that character",
    ),
    (
        {"sample": {"negative_prompt": "\x1b"}},
        "sample.negative_prompt has '\\x1b', which is not text (the control character U+001B): remove that character",
    ),
    (
        {"evaluation": {"drift_captions": ["\ufffd"]}},
        "evaluation.drift_captions has '\ufffd', which is not text (the mark of a lost character: U+FFFD): remove that "
        "character",
    ),
    (
        {"schedule": {"name": "linear", "warmup": 10}},
        "schedule.warmup is 10 steps, but train.steps is 10: "
        "the warm-up must end within the run (a fraction such as 0.05 always does)",
    ),
]


def test_keys_that_contradict_each_other_are_refused() -> None:
    for sections, sentence in CONTRADICTIONS:
        try:
            build(**sections)
        except ValidationError as caught:
            assert [str(error["ctx"]["error"]) for error in caught.errors()] == [sentence]
        else:
            raise AssertionError(f"accepted: {sections}")


def test_keys_that_agree_are_taken() -> None:
    assert build(model={"vae": "other", "vae_revision": "main"}).model.vae_revision == "main"
    assert build(data={"resolution": 960, "bucket_step": 8, "bucket_min_side": 960, "bucket_max_side": 960})
    assert build(train={"steps": None, "epochs": 3}, schedule={"name": "linear", "warmup": 100})
    assert build(schedule={"name": "linear", "warmup": 9}).schedule.warmup == 9
    assert build(schedule={"name": "cosine_with_restarts", "cycles": 3}).schedule.cycles == 3
    assert build(schedule={"name": "polynomial", "power": 2.0}).schedule.power == 2.0
