"""The caches through the scripts: only what changed is encoded, and no result depends on what was there before."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from script_runs import Trainer, assert_equal, script

from sushi_research.caches import encoding
from sushi_research.config.command_line import config_to_yaml
from sushi_research.errors import UserError
from sushi_research.runs import tracking
from testing.tiny_base import save_tiny_base

ONE = pytest.mark.parametrize("architecture", ["sd15"])

# Few modules, because a run's time goes into making them; each learns from images and captions alike.
SMALL = {"train.steps": 2, "lora.targets": ["attn2.to_k"]}


def train(trainer: Trainer, name: str, changes: dict[str, Any] | None = None) -> None:
    assert trainer.train(name, SMALL | (changes or {})) == 0


@dataclass
class Counts:
    """How many images and captions were encoded since they were last taken."""

    images: int = 0
    captions: int = 0

    def take(self) -> tuple[int, int]:
        taken = self.images, self.captions
        self.images = self.captions = 0
        return taken


@pytest.fixture
def mine(architecture, bases, photos, tmp_path) -> Trainer:
    """A trainer with a copy of the photos and a cache of its own, in `tmp_path`."""
    copy = shutil.copytree(photos, tmp_path / "photos")
    return Trainer(architecture, bases[architecture], copy, tmp_path / "runs", tmp_path / "cache")


@pytest.fixture
def encoded(mine: Trainer, monkeypatch: pytest.MonkeyPatch) -> Counts:
    counts, model = Counts(), mine.script.model
    encode_images, encode_captions = encoding.encode_images, model.encode_captions

    def images(vae: Any, pixels: np.ndarray) -> Any:
        counts.images += len(pixels)
        return encode_images(vae, pixels)

    def captions(text: Any, captions: list[str], **settings: Any) -> Any:
        counts.captions += len(captions)
        return encode_captions(text, captions, **settings)

    monkeypatch.setattr(encoding, "encode_images", images)
    monkeypatch.setattr(model, "encode_captions", captions)
    return counts


@pytest.fixture
def fill(mine: Trainer) -> Callable[..., None]:
    """Fills the caches of a config by scripts/cache_dataset.py."""
    main = script("cache_dataset").main

    def run(changes: dict[str, Any] | None = None) -> None:
        assert main(mine.config("unused", changes)) == 0

    return run


def shards(cache: Path, store: str) -> list[Path]:
    return sorted((cache / store).glob("shard-*.arrow"))


# --- What is encoded, and when ---


@pytest.mark.slow
@ONE
def test_a_second_run_encodes_nothing(mine, encoded):
    train(mine, "first")
    # Seven captions that differ, and the empty one.
    assert encoded.take() == (7, 8)
    assert mine.plan("first")["cache"]["images"]["missing"] == 7
    train(mine, "second", {"train.seed": 5, "lora.rank": 8, "train.batch_size": 2})
    assert encoded.take() == (0, 0)
    assert mine.plan("second")["cache"]["images"]["missing"] == 0


@pytest.mark.slow
def test_only_what_changed_is_encoded_again(mine, encoded, fill, tmp_path, bases):
    photos = tmp_path / "photos"
    fill()
    assert encoded.take() == (7, 8)

    pixels = np.array(Image.open(photos / "0.png"))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(photos / "0.png")
    fill()
    assert encoded.take() == (1, 0), "an image's bytes changed"

    (photos / "1.txt").write_text("another caption")
    fill()
    assert encoded.take() == (0, 1), "a caption changed"

    (photos / "3.png").rename(photos / "moved.png")
    (photos / "3.txt").rename(photos / "moved.txt")
    fill({"train.seed": 7, "lora.targets": "kohya", "train.precision": "bf16", "sample.enabled": True})
    assert encoded.take() == (0, 0), "neither names nor the training matter"

    # In finer steps the squares stay as they are; the four others get closer buckets.
    fill({"data.bucket_step": 16})
    assert encoded.take() == (4, 0), "the recipe changed for some"
    fill({"data.flip": 0.5})
    assert encoded.take() == (7, 0), "the mirrored ones are new"
    fill({"data.flip": 1.0})
    assert encoded.take() == (0, 0)

    layer = {"sd15": {"model.clip_skip": 2}, "sdxl": {"model.text_encoder_1_layer": "last"}}[mine.architecture]
    fill(layer)
    assert encoded.take() == (0, 8), "the layer of the text encoder changed"

    other = save_tiny_base(tmp_path / "other", mine.architecture, seed=1)
    fill({"model.vae": str(other)})
    assert encoded.take() == (7, 0), "the VAE changed"
    fill({"model.base": str(other), "model.vae": str(bases[mine.architecture])})
    assert encoded.take() == (0, 8), "the text encoders changed"
    fill()
    assert encoded.take() == (0, 0), "and what there was is still there"


@ONE
def test_filling_the_caches_before_leaves_nothing_to_encode(mine, encoded, capsys, tmp_path):
    main, config = script("cache_dataset").main, mine.config("unused")
    assert main(config.model_copy(update={"dry_run": True})) == 0
    assert "7 image entries and 8 captions to encode" in capsys.readouterr().out
    assert encoded.take() == (0, 0)
    assert main(config) == 0
    printed = capsys.readouterr().out
    assert f"done: {tmp_path / 'cache'} holds 7 image entries and 8 captions, 0." in printed
    assert encoded.take() == (7, 8)
    assert not (tmp_path / "runs").exists(), "it makes no run"
    train(mine, "after")
    assert encoded.take() == (0, 0)


@ONE
@pytest.mark.slow
def test_what_was_there_before_changes_no_result(mine, encoded, fill, tmp_path):
    """Twice the same training: on a cache that another data set and another recipe began, and on one of its own."""
    some = tmp_path / "some"
    some.mkdir()
    for name in ("2.webp", "2.txt", "3.png", "3.txt"):
        shutil.copy(tmp_path / "photos" / name, some)
    fill({"data.path": str(some), "data.flip": 0.5})
    assert encoded.take() == (4, 3)
    train(mine, "shared")
    assert encoded.take() == (5, 5)
    train(mine, "alone", {"cache.folder": str(tmp_path / "alone")})
    assert encoded.take() == (7, 8)
    assert_equal(mine.adapter("shared"), mine.adapter("alone"))
    assert mine.metrics("shared") == mine.metrics("alone")


# --- Damage ---


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@ONE
@pytest.mark.parametrize(("store", "damage"), [("latents", flip_bit), ("text_sd15", cut)])
@pytest.mark.slow
def test_a_damaged_shard_is_reported_and_made_again(mine, encoded, fill, tmp_path, damage, store, caplog):
    """Two shards to a store; the damage is in the first one. Nothing that is damaged is used: the run is as it was.

    A file of the wrong size is noticed when the cache is opened; a row of other bytes, when it is read.
    """
    photos, later = tmp_path / "photos", tmp_path / "later"
    later.mkdir()
    for file in [*photos.glob("4.*"), *photos.glob("5.*"), *photos.glob("6.*")]:
        file.rename(later / file.name)
    fill()
    [shard] = shards(tmp_path / "cache", store)
    for file in later.iterdir():
        file.rename(photos / file.name)
    train(mine, "whole")
    assert len(shards(tmp_path / "cache", store)) == 2
    encoded.take()
    damage(shard)

    if damage is flip_bit:
        with pytest.raises(UserError, match=rf"{shard} is damaged .*: run the same command again"):
            train(mine, "damaged")
        assert encoded.take() == (0, 0)
    train(mine, "damaged")
    assert encoded.take() == {"latents": (4, 0), "text_sd15": (0, 5)}[store], "no more than the shard held"
    warnings = [record.getMessage() for record in caplog.records if record.name == "sushi_research.caches.store"]
    expected = f"{shard} is damaged (it has "
    assert [each[: len(expected)] for each in warnings] == ([] if damage is flip_bit else [expected])
    aside = {path.name for path in shard.parent.iterdir() if path.name.endswith(".damaged")}
    assert aside == {f"{shard.stem}.json.damaged", f"{shard.name}.damaged"}
    assert_equal(mine.adapter("damaged"), mine.adapter("whole"))
    assert mine.metrics("damaged") == mine.metrics("whole")

    caplog.clear()
    fill()
    assert encoded.take() == (0, 0) and not caplog.records


@pytest.mark.slow
@ONE
def test_killed_while_caching_it_goes_on(mine, encoded, forked, tmp_path):
    """Killed as soon as the captions are stored, before the images are."""
    for number in range(60):
        rng = np.random.default_rng(number)
        pixels = rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"more_{number}.png")
        (tmp_path / "photos" / f"more_{number}.txt").write_text("one caption")
    changes = SMALL | {"data.resolution": 128}
    config = tmp_path / "config.yaml"
    config.write_text(config_to_yaml(mine.config("killed", changes)))
    process = forked("scripts/train_sd15_lora.py", "--config", config)
    # The manifest comes last.
    process.wait_until(lambda: list((tmp_path / "cache" / "text_sd15").glob("shard-*.json")))
    process.kill()
    assert process.poll() == -signal.SIGKILL
    assert shards(tmp_path / "cache", "text_sd15") and not shards(tmp_path / "cache", "latents")

    train(mine, "killed", changes)
    assert encoded.take() == (67, 0)
    train(mine, "undisturbed", {**changes, "cache.folder": str(tmp_path / "other")})
    assert_equal(mine.adapter("killed"), mine.adapter("undisturbed"))
    assert mine.metrics("killed") == mine.metrics("undisturbed")


@pytest.mark.slow
@ONE
def test_two_processes_may_fill_one_cache_at_once(mine, encoded, forked, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(config_to_yaml(mine.config("unused")))
    both = [forked("scripts/cache_dataset.py", "sd15", "--config", config) for _ in range(2)]
    for process in both:
        assert process.wait() == 0, process.err
    train(mine, "after")
    assert encoded.take() == (0, 0)
    train(mine, "alone", {"cache.folder": str(tmp_path / "alone")})
    assert_equal(mine.adapter("after"), mine.adapter("alone"))


# --- The same pictures by other ways ---


@pytest.mark.parametrize("architecture", ["sdxl"])  # which is told each image's size
@pytest.mark.slow
def test_a_data_set_is_the_same_however_it_is_given(mine, encoded, tmp_path):
    """Captions in files next to the images, in a metadata.jsonl, and in the rows of a saved HF data set."""
    import datasets

    photos = tmp_path / "photos"
    images = sorted(path for path in photos.iterdir() if path.suffix != ".txt")
    captions = [path.with_suffix(".txt").read_text().strip() for path in images]
    listed = tmp_path / "listed"
    (listed / "sub").mkdir(parents=True)
    lines = []
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        shutil.copy(image, listed / "sub" / f"renamed_{number}{image.suffix}")
        lines.append(json.dumps({"file_name": f"sub/renamed_{number}{image.suffix}", "text": caption}))
    (listed / "metadata.jsonl").write_text("\n".join(lines))
    rows = datasets.Dataset.from_dict({"picture": [str(image) for image in images], "words": captions})
    rows.cast_column("picture", datasets.Image()).save_to_disk(tmp_path / "rows")
    shutil.move(photos, tmp_path / "elsewhere")

    columns = {"data.image_column": "picture", "data.caption_column": "words"}
    train(mine, "rows", {"data.path": str(tmp_path / "rows"), **columns})
    assert encoded.take() == (7, 8)
    for name, folder in {"folder": tmp_path / "elsewhere", "listed": listed}.items():
        train(mine, name, {"data.path": str(folder)})
        assert encoded.take() == (0, 0)
        assert_equal(mine.adapter(name), mine.adapter("rows"))
        assert mine.metrics(name) == mine.metrics("rows")


@ONE
@pytest.mark.slow
def test_repeat_folders_show_their_images_more_often_and_encode_them_once(mine, encoded, tmp_path):
    photos = tmp_path / "photos"
    (photos / "3_rare").mkdir()
    for name in ("0.png", "0.txt", "1.jpg", "1.txt"):
        (photos / name).rename(photos / "3_rare" / name)
    changes = {"train.steps": None, "train.epochs": 2, "train.batch_size": 1}
    train(mine, "repeats", changes)
    assert encoded.take() == (7, 8)
    plan = mine.plan("repeats")
    assert (plan["images"], plan["items_per_epoch"], plan["steps"]) == (7, 11, 22)


# --- Memory ---


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sdxl"])  # which has two text encoders
def test_while_training_no_encoder_is_in_memory(mine, monkeypatch, tmp_path):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    models = (AutoencoderKL, CLIPTextModel, CLIPTextModelWithProjection, UNet2DConditionModel)
    gc.collect()
    before = {id(found) for found in gc.get_objects() if type(found) in models}

    def alive() -> set[str]:
        return {type(found).__name__ for found in gc.get_objects() if type(found) in models and id(found) not in before}

    during: dict[str, list[set[str]]] = {"image": [], "caption": [], "step": []}
    looks = {"image": 1, "caption": 1, "step": 2}  # a look at all objects takes its time
    encode_images, model, log = encoding.encode_images, mine.script.model, tracking.log
    encode_captions = model.encode_captions

    def watch(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **settings: Any) -> Any:
            if len(during[what]) < looks[what]:
                during[what].append(alive())
            return function(*arguments, **settings)

        return watched

    monkeypatch.setattr(encoding, "encode_images", watch("image", encode_images))
    monkeypatch.setattr(model, "encode_captions", watch("caption", encode_captions))
    monkeypatch.setattr(tracking, "log", watch("step", log))
    # Pictures are drawn before the first step and between the two.
    sample = {"sample.enabled": True, "sample.every": 1, "sample.steps": 1, "sample.prompts": ["a cat"]}
    train(mine, "watched", sample)
    texts = {"CLIPTextModel"} | ({"CLIPTextModelWithProjection"} if mine.architecture == "sdxl" else set())
    assert during["caption"] == [texts], "captions: the text encoders alone"
    assert during["image"] == [{"AutoencoderKL"}], "images: the VAE alone"
    assert during["step"] == [{"UNet2DConditionModel"}] * 2, "training: the UNet alone"
    assert (tmp_path / "runs/watched/samples/step-00000001.png").is_file()
