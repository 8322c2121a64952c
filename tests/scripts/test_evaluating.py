"""Runs that are evaluated: what is measured, that it changes nothing, and that it is the same after a stop or on a file."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from script_runs import CONFIGS, Trainer, assert_equal, script
from test_resume import Killed, at_micro_batch, kill, stop

from sushi_research.data.items import Item
from sushi_research.data.samples import Sample
from sushi_research.data.scan import Scan
from sushi_research.data.training_data import Data
from sushi_research.errors import UserError
from sushi_research.evaluation.results import Results
from sushi_research.reports.run_record import read_record
from testing.forked_scripts import free_port, ranks

SCRIPT = script("evaluate")

ONE = pytest.mark.parametrize("architecture", ["sd15"])
SDXL = pytest.mark.parametrize("architecture", ["sdxl"])


def make_pictures(folder: Path, count: int, seed: int) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"held-out picture {number}\n")
    return folder


@pytest.fixture(scope="session")
def held(tmp_path_factory) -> Path:
    """Three captioned pictures that no run trains on."""
    return make_pictures(tmp_path_factory.mktemp("held"), 3, 9)


def settings_of(held: Path) -> dict:
    return {
        "train.steps": 5,
        "checkpoint.every": 2,
        "evaluation.path": str(held),
        "evaluation.every": 2,
        "evaluation.noise_samples": 4,
        "evaluation.drift_captions": ["a cat", "a dog"],
    }


@pytest.fixture
def settings(held) -> dict:
    return settings_of(held)


def tables(folder: Path) -> list[list[dict]]:
    """Rows of the losses, of the drift, and of what is measured without being asked for."""
    names = ("evaluation", "drift", "base_images", "trained")
    return [pyarrow.parquet.read_table(folder / f"{name}.parquet").to_pylist() for name in names]


def evaluations(trainer: Trainer, name: str) -> list[dict]:
    return [line for line in trainer.metrics(name) if "evaluation/loss" in line]


@pytest.fixture(scope="session")
def whole(bases, photos, held, caches, tmp_path_factory) -> Trainer:
    """The finished SD1.5 run "whole" of these settings, trained once."""
    trainer = Trainer("sd15", bases["sd15"], photos, tmp_path_factory.mktemp("whole"), caches)
    assert trainer.train("whole", settings_of(held)) == 0
    return trainer


@pytest.mark.slow
@ONE
def test_evaluating_changes_nothing(trainer, settings, whole):
    """A run without an evaluation learns the same."""
    plain = {key: value for key, value in settings.items() if not key.startswith("evaluation.")}
    assert trainer.train("plain", plain) == 0
    assert_equal(trainer.adapter("plain"), whole.adapter("whole"))
    assert_equal(trainer.checkpoint("plain").load(), whole.checkpoint("whole").load())
    assert trainer.metrics("plain") == [line for line in whole.metrics("whole") if "loss" in line]


@SDXL
def test_what_is_kept_and_logged(trainer, settings, held, with_curves):
    assert trainer.train("run", settings) == 0
    folder = trainer.folder("run")
    losses, moved, kept, trained = tables(folder)
    assert sorted({row["step"] for row in losses}) == sorted({row["step"] for row in moved}) == [0, 2, 4, 5]
    assert len(losses) == 4 * 3 * 4 and len(moved) == 4 * 2 * 4
    assert all(row["loss"] == row["base_loss"] for row in losses if row["step"] == 0), "training starts from the base"
    assert any(row["loss"] != row["base_loss"] for row in losses if row["step"] == 5)
    assert all((row["loss"] == 0) is (row["step"] == 0) for row in moved)
    assert len(kept) == 4 * 2 * 4 and len(trained) == 4 * 3 * 4, "as many training images as held-out ones"
    lines = evaluations(trainer, "run")
    assert [line["step"] for line in lines] == [0, 2, 4, 5]
    assert (
        lines[0]["evaluation/kept"] == lines[0]["evaluation/learned"] == 0
        and lines[0]["evaluation/memorised_auc"] == 0.5
    )
    assert lines[-1]["evaluation/kept"] != 0 != lines[-1]["evaluation/trained"] and "evaluation/prior" not in lines[-1]
    record = read_record(folder)
    assert record.problems == [] and record.evaluation.times.clock == "CPU time"
    assert (np.diff(record.evaluation.seconds) > 0).all() and (np.diff(record.evaluation.times.wall_seconds) > 0).all()
    last = [row for row in losses if row["step"] == 5]
    assert lines[-1]["evaluation/loss"] == pytest.approx(np.mean([row["loss"] for row in last]), rel=1e-6)
    assert {row["image"] for row in moved} == {"a cat", "a dog"}

    val_set = json.loads((folder / "validation_set.json").read_text())
    assert sorted(image["name"] for image in val_set["images"]) == ["0.png", "1.png", "2.png"]
    plan = trainer.plan("run")["evaluation"]
    assert (plan["images"], plan["noise_samples"], plan["evaluations"], plan["drift_captions"]) == (3, 4, 4, 2)
    [entry] = json.loads((folder / "provenance.json").read_text())
    assert (
        entry["validation_set"] == val_set["hash"]
        and entry["split"]["source"] == "path"
        and entry["split"]["images"] == 3
    )
    assert entry["resolved_config"]["evaluation"]["path"] == str(held)
    assert (folder / "loss.png").is_file()
    assert not list(folder.glob("pictures*")), "pictures are off by default"


@pytest.mark.slow
@ONE
def test_a_run_in_pieces_has_the_same_evaluations(trainer, settings, whole):
    """Stopped at a step that is evaluated (it is made up for), and killed between a checkpoint and the next."""
    with at_micro_batch(trainer, 2, 0, stop):
        assert trainer.train("pieces", settings) > 128
    assert Results(trainer.folder("pieces") / "evaluation.parquet").steps() == [0], "a stop is not kept waiting"
    with at_micro_batch(trainer, 5, 0, kill), pytest.raises(Killed):
        trainer.train("pieces", settings)
    assert Results(trainer.folder("pieces") / "evaluation.parquet").steps() == [0, 2, 4]
    assert trainer.train("pieces", settings) == 0
    assert tables(trainer.folder("pieces")) == tables(whole.folder("whole"))
    assert trainer.metrics("pieces") == whole.metrics("whole")
    assert_equal(trainer.adapter("pieces"), whole.adapter("whole"))
    assert_equal(trainer.checkpoint("pieces").load(), whole.checkpoint("whole").load())

    # What was written and not logged is logged when the run is continued from there.
    metrics = trainer.folder("pieces") / "metrics.jsonl"
    kept = [line for line in metrics.read_text().splitlines(keepends=True) if '"step": 5, "evaluation' not in line]
    metrics.write_text("".join(kept))
    record = json.loads((trainer.folder("pieces") / "run.json").read_text())
    (trainer.folder("pieces") / "run.json").write_text(json.dumps(record | {"finished_at": None}))
    assert trainer.train("pieces", settings) == 0
    assert trainer.metrics("pieces") == whole.metrics("whole")


@pytest.mark.slow
@ONE
def test_after_a_stop_at_the_last_step_the_same_command_adds_the_evaluation(trainer, settings, whole):
    with at_micro_batch(trainer, 5, 0, stop):
        assert trainer.train("late", settings) > 128
    assert (trainer.folder("late") / "late.safetensors").exists()
    assert trainer.train("late", settings) == 0
    assert tables(trainer.folder("late")) == tables(whole.folder("whole"))
    assert trainer.metrics("late") == whole.metrics("whole")


@pytest.mark.slow
@ONE
def test_another_validation_set_in_mid_run_drops_what_the_old_one_gave(trainer, settings, tmp_path, capsys):
    with at_micro_batch(trainer, 3, 0, stop):
        trainer.train("run", settings)
    other = make_pictures(tmp_path / "other", 3, 10)
    assert trainer.train("run", settings | {"evaluation.path": str(other)}) == 0
    assert "warning: the held-out images have changed: earlier validation losses are dropped" in capsys.readouterr().out
    assert [line["step"] for line in evaluations(trainer, "run")] == [4, 5]
    assert Results(trainer.folder("run") / "evaluation.parquet").steps() == [4, 5]


@pytest.mark.slow
@ONE
def test_other_drift_captions_and_noise_samples_drop_their_own_results_alone(trainer, settings, capsys):
    with at_micro_batch(trainer, 2, 0, stop):
        trainer.train("run", settings)
    settings = settings | {"evaluation.drift_captions": ["a cat", "a bird"]}
    with at_micro_batch(trainer, 4, 0, stop):
        trainer.train("run", settings)
    said = capsys.readouterr().out
    assert "warning: the captions for the drift have changed: earlier drift values are dropped" in said
    assert "held-out images" not in said and "validation losses are dropped" not in said
    assert trainer.train("run", settings | {"evaluation.noise_samples": 8}) == 0
    said = capsys.readouterr().out
    assert "warning: evaluation.noise_samples was 4 and is 8: earlier validation losses are dropped" in said
    assert "drift values are dropped" not in said
    folder, lines = trainer.folder("run"), trainer.metrics("run")
    for name, key, steps in (("evaluation", "evaluation/loss", [4, 5]), ("drift", "evaluation/drift", [2, 4, 5])):
        assert Results(folder / f"{name}.parquet").steps() == [line["step"] for line in lines if key in line] == steps


@pytest.mark.slow
@ONE
def test_a_damaged_record_is_reported_before_the_run_goes_on(trainer, settings):
    with at_micro_batch(trainer, 3, 0, stop):
        trainer.train("run", settings)
    parquet = trainer.folder("run") / "evaluation.parquet"
    whole = parquet.read_bytes()
    for position in range(8, len(whole) - 8, len(whole) // 12):
        parquet.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        try:
            read = Results(parquet).read()
        except UserError:
            continue
        parquet.write_bytes(whole)
        assert read.equals(Results(parquet).read()), f"byte {position} changed what was read, unnoticed"
    parquet.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="evaluation.parquet is damaged .*: restore it, or remove it to evaluate again"):
        trainer.train("run", settings)
    parquet.unlink()
    assert trainer.train("run", settings) == 0
    assert Results(parquet).steps() == [4, 5]


# --- Held out of the training data ---


@pytest.fixture(scope="session")
def many(tmp_path_factory) -> Path:
    """Twelve captioned pictures."""
    return make_pictures(tmp_path_factory.mktemp("many"), 12, 11)


@ONE
@pytest.mark.slow
def test_a_share_of_the_data_is_held_out_and_never_trained_on(trainer, many, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(many, data)
    settings = {
        "data.path": str(data),
        "evaluation.held_out": 0.3,
        "evaluation.noise_samples": 4,
        "evaluation.drift_captions": [],
        "train.steps": 1,
    }
    assert trainer.train("first", settings) == 0
    report = json.loads((trainer.folder("first") / "data_report.json").read_text())
    held = report["held_out"]
    assert len(held) == 4 and not set(held) & set(report["used"]) and len(report["used"]) == 12 - len(held)
    assert trainer.plan("first")["images"] == 12 - len(held)
    assert not (trainer.folder("first") / "drift.parquet").exists()
    first = pyarrow.parquet.read_table(trainer.folder("first") / "evaluation.parquet").schema.metadata[b"set_hash"]

    # Renamed, and others next to them: the order of the images is the same, so only its end moves.
    for path in sorted(data.iterdir()):
        path.rename(data / f"renamed_{path.name}")
    for number, path in enumerate(sorted(make_pictures(tmp_path / "more", 4, 12).glob("*.png"))):
        shutil.copy(path, data / f"new{number}.png")
        (data / f"new{number}.txt").write_text("one more")
    assert trainer.train("second", settings) == 0
    report = json.loads((trainer.folder("second") / "data_report.json").read_text())
    of_old = {name for name in report["held_out"] if name.startswith("renamed_")}
    before = {f"renamed_{name}" for name in held}
    assert len(report["held_out"]) == 5 and of_old and (of_old <= before or of_old >= before)

    # Without the others, the validation set is the same.
    for path in data.glob("new*"):
        path.unlink()
    assert trainer.train("third", settings) == 0
    third = pyarrow.parquet.read_table(trainer.folder("third") / "evaluation.parquet").schema.metadata[b"set_hash"]
    assert third == first
    refuse_trained_images(trainer, data, held, tmp_path, capsys)


def refuse_trained_images(trainer: Trainer, data: Path, held: list[str], tmp_path: Path, capsys) -> None:
    """The run "first" trained on all images of `data` but `held`; other options do not hide that."""
    words = ["sd15", "--config", str(trainer.folder("first") / "config.yaml"), "--dry-run"]
    words.append(f"--adapters={json.dumps([str(trainer.folder('first'))])}")
    whole, seen = ["--evaluation.held_out", "0"], 12 - len(held)
    # Kohya's folder of repeats, another resolution and other captions.
    for path in sorted(data.iterdir()):
        copy = tmp_path / "photos/3_photos" / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes() if path.suffix == ".png" else b"another caption")
    other = ["--data.path", str(tmp_path / "photos"), "--data.resolution", "32", *whole]
    for more in (whole, other, ["--evaluation.held_out", "0.9"]):
        with pytest.raises(UserError, match="first.safetensors was trained on .* of the .* images of "):
            SCRIPT.main(SCRIPT.read([*words, *more]))
    with pytest.raises(UserError, match=f"was trained on {seen} of the 12 images of {data} "):
        SCRIPT.main(SCRIPT.read([*words, *whole]))
    capsys.readouterr()
    assert SCRIPT.main(SCRIPT.read(words)) == 0
    said = capsys.readouterr().out
    assert f"images of {data} (evaluation.held_out 0.3) x 4 noise samples" in said
    assert "trained on none of them" in said and "held-out" not in said


@ONE
@pytest.mark.slow
def test_what_cannot_be_held_out_is_one_sentence(trainer, photos):
    for changes, message in (
        ({"evaluation.held_out": 1e-9}, r"held_out is 1e-09, which holds out none of the 7 distinct images in "),
        (
            {"evaluation.held_out": 0.999999},
            r"holds out all of the 7 distinct images in .*: choose another fraction, or give .* --evaluation\.path",
        ),
        (
            {"evaluation.path": str(photos)},
            r"has images that are also trained on, .*\.png \(trained on as .*remove them",
        ),
        ({"evaluation.path": "nowhere"}, r"nowhere"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            trainer.train("refused", changes)
        assert "\n" not in str(caught.value) and not trainer.folder("refused").exists()


@ONE
@pytest.mark.slow
def test_a_copy_that_was_brightened_is_named_in_the_plan(trainer, held, photos, tmp_path):
    folder = tmp_path / "held"
    shutil.copytree(held, folder)
    picture = np.asarray(Image.open(photos / "0.png")).astype(int)
    Image.fromarray((picture * 0.97).astype(np.uint8)).save(folder / "copy.png")
    (folder / "copy.txt").write_text("a copy")
    settings = {
        "evaluation.path": str(folder),
        "evaluation.noise_samples": 4,
        "evaluation.drift_captions": [],
        "train.steps": 1,
    }
    assert trainer.train("run", settings) == 0
    plan = trainer.plan("run")["evaluation"]
    assert (
        plan["near_duplicates"] == ["the held-out image copy.png looks like the training image 0.png"]
        and plan["images"] == 4
    )


# --- Adapter files ---


def evaluate_adapters(trainer: Trainer, name: str, output: Path, adapters: list[Path], *words: str) -> dict:
    config = SCRIPT.read(
        [
            trainer.architecture,
            "--config",
            str(trainer.folder(name) / "config.yaml"),
            f"--adapters={json.dumps([str(path) for path in adapters])}",
            f"--output={output}",
            *words,
        ]
    )
    assert SCRIPT.main(config) == 0
    return json.loads((output / "evaluation.json").read_text())["results"]


@pytest.mark.parametrize("architecture", ["sd15"])
def test_prior_images_are_no_validation_images(architecture, monkeypatch):
    """Without held-out images all images are measured: those of evaluation.prior_path as prior images only."""
    samples = [Sample(f"{n}.png", f"{n:032x}", "a photo", 64, 64, 1, bytes) for n in range(5)]
    photo, *prior = [Item(sample, None, 0) for sample in samples]
    hashes = frozenset(item.sample.image_hash for item in prior[1:])
    data = Data([photo, *prior[1:]], Scan("photos"), prior=prior[:1], prior_trained=hashes)
    monkeypatch.setattr(SCRIPT, "read_data", lambda *_: data)
    found = SCRIPT.validation_data(None, None)
    assert (found.items, found.held_out, found.prior) == ([], [photo], prior)
    data = replace(data, items=prior[1:])
    config = CONFIGS[architecture](model={"base": "base"}, data={"path": "photos"}, train={"steps": 1})
    with pytest.raises(UserError, match="photos has no images but those of evaluation.prior_path"):
        SCRIPT.validation_data(SimpleNamespace(config=config), None)


@pytest.mark.slow
@SDXL
def test_a_file_is_measured_as_its_run_was(trainer, settings, tmp_path, capsys):
    """Equal bit for bit where the file holds what was trained (fp32); and in peft's naming, as another trainer writes it."""
    settings = settings | {"lora.save_dtype": "float32", "optimizer.lr": 0.02}
    assert trainer.train("run", settings) == 0
    mine = trainer.folder("run") / "run.safetensors"
    foreign = tmp_path / "foreign.safetensors"
    # peft's names have no alpha: the scale of 1/2 goes into the weights.
    master_weights = trainer.master_weights("run")
    save_file(
        {
            f"unet.{key}": (value * 0.5 if "lora_B" in key else value).contiguous()
            for key, value in master_weights.items()
        },
        foreign,
    )
    # The same in every second module with twice the alpha and half of the matrix, and elsewhere with zeros for a higher rank.
    uneven, tensors = tmp_path / "uneven.safetensors", load_file(mine)
    for number, name in enumerate(sorted({key.partition(".")[0] for key in tensors})):
        down, up, alpha = (f"{name}.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        tensors[alpha] *= 2
        if number % 2:
            tensors[up] /= 2
        else:
            tensors[down] = torch.cat([tensors[down], torch.zeros_like(tensors[down])])
            tensors[up] = torch.cat([tensors[up], torch.ones_like(tensors[up])], dim=1)
    save_file(tensors, uneven)
    output = tmp_path / "evaluations"
    lora_scales = ["--lora_scales=[0.5, 1.0]", "--sample.enabled=true", "--sample.steps=2"]
    found = evaluate_adapters(trainer, "run", output, [mine, foreign, uneven], *lora_scales)
    names = ["base", "run-scale-0.5", "run", "foreign-scale-0.5", "foreign", "uneven-scale-0.5", "uneven"]
    assert list(found) == names
    of_run = tables(trainer.folder("run"))
    for name, step in (("base", 0), ("run", 5)):
        for rows, every in zip(tables(output / name), of_run, strict=True):
            there = [row for row in every if row["step"] == step]
            for column in ("loss", "base_loss"):
                assert [row[column] for row in rows] == [row[column] for row in there]
    # The scale of 1/2 is exact in floating point, so where it is applied changes no bit.
    assert tables(output / "foreign") == tables(output / "run")
    # Zeros for a higher rank may change the order of a sum, so the last digits: 1e-6 is 8 roundings of fp32.
    for key in ("evaluation/loss", "evaluation/drift"):
        assert found["uneven"][key] == pytest.approx(found["run"][key], rel=1e-6)
    assert 0 < found["run-scale-0.5"]["evaluation/drift"] < found["run"]["evaluation/drift"]
    [entry] = json.loads((output / "foreign/provenance.json").read_text())
    assert entry["adapter"]["file"] == "foreign.safetensors" and entry["adapter"]["lora_scale"] == 1.0
    assert [path.name for path in (output / "run/samples/step-00000001").iterdir()]
    assert (output / "grid.png").is_file() and (output / "lora_scales.png").is_file()
    said = capsys.readouterr().out
    assert "| learned | kept | memorised, AUC | drift |" in said and "| run | " in said


@pytest.mark.slow
@SDXL
def test_two_processes_measure_what_one_does(trainer, settings, forked, tmp_path):
    """Three images and two captions among two processes: every loss and every drift, bit for bit."""
    assert trainer.train("run", settings | {"train.steps": 2, "evaluation.every": None, "optimizer.lr": 0.02}) == 0
    adapter = trainer.folder("run") / "run.safetensors"
    one = evaluate_adapters(trainer, "run", tmp_path / "one", [adapter])
    words = ["sdxl", "--config", trainer.folder("run") / "config.yaml", f"--adapters={json.dumps([str(adapter)])}"]
    words += ["--output", tmp_path / "two"]
    both = [forked("scripts/evaluate.py", *words, **place) for place in ranks(2, free_port())]
    assert [process.wait() for process in both] == [0, 0], both[0].err
    [entry] = json.loads((tmp_path / "two/run/provenance.json").read_text())
    assert entry["world"] == 2
    for name in ("base", "run"):
        assert tables(tmp_path / "two" / name) == tables(tmp_path / "one" / name)
    assert json.loads((tmp_path / "two/evaluation.json").read_text())["results"] == one
    assert one["run"]["evaluation/drift"] > 0


@pytest.mark.slow
@ONE
def test_an_adapter_of_the_text_encoder_is_heard(trainer, settings, tmp_path):
    """Its captions are encoded by the encoder as it changes it; the cached embeddings would leave it without effect."""
    assert trainer.train("run", settings) == 0
    prefix = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    generator = torch.Generator().manual_seed(0)
    pair = {
        f"{prefix}.lora_A.weight": torch.randn(2, 32, generator=generator),
        f"{prefix}.lora_B.weight": torch.randn(32, 2, generator=generator),
    }
    unet = {f"unet.{key}": torch.zeros_like(value) for key, value in trainer.master_weights("run").items()}
    save_file(unet | pair, tmp_path / "text.safetensors")
    save_file(unet, tmp_path / "nothing.safetensors")
    found = evaluate_adapters(
        trainer, "run", tmp_path / "out", [tmp_path / "text.safetensors", tmp_path / "nothing.safetensors"]
    )
    assert found["text"]["evaluation/drift"] > 0 == found["nothing"]["evaluation/drift"]
    assert found["text"]["evaluation/loss_over_base"] != 0 == found["nothing"]["evaluation/loss_over_base"]
    assert load_file(tmp_path / "text.safetensors").keys() > load_file(tmp_path / "nothing.safetensors").keys()


@ONE
@pytest.mark.slow
def test_without_anything_held_out_all_images_are_the_validation_set(trainer, held, tmp_path, bases, capsys):
    words = ["sd15", "--data.path", str(held), "--model.base", str(bases["sd15"]), "--train.steps", "1"]
    words += ["--data.resolution", "64", "--data.bucket_step", "32", "--cache.folder", str(tmp_path / "cache")]
    words += ["--evaluation.drift_captions", "[]", "--evaluation.noise_samples", "4", "--sample.enabled", "false"]
    assert SCRIPT.main(SCRIPT.read([*words, "--output", str(tmp_path / "out")])) == 0
    assert len(tables_of_losses := pyarrow.parquet.read_table(tmp_path / "out/base/evaluation.parquet")) == 3 * 4
    assert len(set(tables_of_losses["image"].to_pylist())) == 3
    assert f"3 images of {held} x 4 noise samples" in capsys.readouterr().out
    with pytest.raises(UserError, match="nowhere.safetensors does not exist: check the path"):
        SCRIPT.main(SCRIPT.read([*words, "--adapters", "[nowhere.safetensors]"]))
