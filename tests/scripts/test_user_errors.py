"""What a user can get wrong: one sentence on stderr, exit status 2, and nothing lost of what was there before.

Most cases run in this process, through `run_main(main, config)` as a script ends; a few as a user starts them.
"""

from __future__ import annotations

import json
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import case
from PIL import Image
from safetensors.torch import load_file, save_file
from script_runs import ROOT, Trainer

from sushi_research.config import SDXLTraining
from sushi_research.config.command_line import config_to_yaml
from sushi_research.config.process import run_main
from sushi_research.errors import UserError
from sushi_research.training import run as training

ONE = pytest.mark.parametrize("architecture", ["sd15"])  # where the scripts share every word
# A run that is as short as can be.
SHORT = {"train.steps": 1}


@pytest.fixture
def refusal(trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the script on a config that it refuses; gives its sentence."""

    def run(changes: dict[str, Any] | None = None, name: str = "refused") -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_main(trainer.script.main, trainer.config(name, changes))
        assert ended.value.code == 2
        printed = capsys.readouterr().err
        assert "Traceback" not in printed
        before, mark, sentence = printed.rpartition("error: ")
        assert mark and (before == "" or before.endswith(("\n", "\r")))
        assert sentence.endswith("\n") and sentence.count("\n") == 1, "one sentence, and nothing after it"
        return sentence.strip()

    return run


def shards(cache: Path) -> list[Path]:
    return list(cache.rglob("shard-*"))


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder; the lock, which names the process that took it last, is no result."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def save_picture(path: Path, size: tuple[int, int] = (64, 64), caption: str | None = "a cat", colour: int = 0) -> None:
    Image.new("RGB", size, (colour, 100, 200)).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 900 million pixels."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b"")]
    parts = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# --- The data ---

BAD_FILES = {
    "bomb.png": "decompression bomb: 30000x30000 pixels",
    "cut.jpg": "truncated",
    "empty.png": "the file is empty",
    "no_caption.webp": "no caption: there is no no_caption.txt",
    "small.png": "8x8 pixels is too small",
}


@pytest.fixture
def flawed(tmp_path: Path) -> Path:
    """Two good pictures, and one of each kind that cannot be used."""
    folder = tmp_path / "flawed"
    folder.mkdir()
    for number in range(2):
        save_picture(folder / f"good_{number}.png", colour=number)
    save_picture(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:-200])
    save_picture(folder / "empty.png")
    (folder / "empty.png").write_bytes(b"")
    save_picture(folder / "bomb.png")
    (folder / "bomb.png").write_bytes(bomb())
    save_picture(folder / "no_caption.webp", caption=None)
    save_picture(folder / "small.png", (8, 8))
    return folder


@ONE
def test_bad_files_stop_the_run_before_anything_is_encoded(trainer, refusal, flawed, tmp_path):
    sentence = refusal({"data.path": str(flawed), "cache.folder": str(tmp_path / "cache")})
    report = trainer.folder("refused") / "data_report.json"
    for words in ("5 problems in", *BAD_FILES, str(report), "--data.on_bad_file skip"):
        assert words in sentence
    found = json.loads(report.read_text())
    assert {problem["name"] for problem in found["problems"]} == set(BAD_FILES)
    for problem in found["problems"]:
        assert BAD_FILES[problem["name"]] in problem["reason"]
    assert found["used"] == ["good_0.png", "good_1.png"]
    assert not shards(tmp_path / "cache")
    assert content(trainer.folder("refused")).keys() == {"data_report.json"}, "the run did not begin"


@ONE
@pytest.mark.slow
def test_bad_files_may_be_skipped_by_name(trainer, flawed, capsys):
    assert trainer.train("skip", {**SHORT, "data.path": str(flawed), "data.on_bad_file": "skip"}) == 0
    plan = trainer.plan("skip")
    assert plan["images"] == 2 and {left["name"] for left in plan["skipped"]} == set(BAD_FILES)
    printed = capsys.readouterr().out
    assert "skipped      5:" in printed
    for name, reason in BAD_FILES.items():
        assert f"{name}: {reason}" in printed
    report = json.loads((trainer.folder("skip") / "data_report.json").read_text())
    assert report["used"] == ["good_0.png", "good_1.png"] and report["counts"]["problems"] == 5
    assert trainer.adapter("skip")


@ONE
def test_leaving_out_every_file_is_refused(refusal, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    save_picture(folder / "a.png", caption=None)
    sentence = refusal({"data.path": str(folder), "data.on_bad_file": "skip"})
    assert "no image in" in sentence and "can be used: a.png (no caption" in sentence and "captions.source" in sentence


@ONE
@pytest.mark.parametrize("key", ["data.path", "evaluation.path"])
def test_a_run_does_not_write_among_the_images(refusal, tmp_path, key):
    folder = tmp_path / "mine"
    folder.mkdir()
    save_picture(folder / "a.png")
    (tmp_path / "link").symlink_to(folder)
    sentence = refusal({key: f"{tmp_path}/link"}, name="mine")
    assert f"run.folder and run.name give the folder of {key}" in sentence
    assert sorted(path.name for path in folder.iterdir()) == ["a.png", "a.txt"]


@ONE
def test_a_data_folder_that_is_not_there_or_holds_no_image(refusal, photos, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    assert f"there is no {tmp_path}/fotos (there is {tmp_path}/photos)" in refusal({"data.path": f"{tmp_path}/fotos"})
    assert "holds no image" in refusal({"data.path": f"{tmp_path}/photos"})
    file = next(photos.glob("*.png"))
    assert f"{file} is a file: give a folder of images" in refusal({"data.path": str(file)})


@ONE
@pytest.mark.slow
def test_a_long_caption_is_counted_and_told(trainer, photos, tmp_path, capsys):
    folder = shutil.copytree(photos, tmp_path / "photos")
    (folder / "0.txt").write_text("x" * 90)
    (folder / "1.txt").write_text("y" * 76)
    assert trainer.train("long", {**SHORT, "data.path": str(folder)}) == 0
    # One token per byte, a start and an end token; 77 are kept.
    assert trainer.plan("long")["captions_cut"] == {"x" * 90: 15, "y" * 76: 1}
    assert "captions     2 longer than 77 tokens are cut (the longest loses 15)" in capsys.readouterr().out


# --- The base ---


@pytest.fixture
def edited_base(trainer, bases, tmp_path) -> Callable[[Callable[[Path], None]], str]:
    """A copy of the base, changed."""

    def edit(change: Callable[[Path], None]) -> str:
        shutil.rmtree(tmp_path / "base", ignore_errors=True)
        change(shutil.copytree(bases[trainer.architecture], tmp_path / "base"))
        return str(tmp_path / "base")

    return edit


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensor(path: Path, name: str, value: float) -> None:
    """Sets the first number of a tensor in a safetensors file."""
    tensors = load_file(path)
    tensors[name].view(-1)[0] = value
    save_file(tensors, path, metadata={"format": "pt"})


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_base_of_another_architecture_names_the_right_script(trainer, refusal, bases):
    other = {"sd15": "sdxl", "sdxl": "sd15"}[trainer.architecture]
    sentence = refusal({"model.base": str(bases[other])})
    assert f"scripts/train_{other}_lora.py" in sentence


def test_a_vae_of_another_architecture(trainer, refusal, bases):
    other = {"sd15": "sdxl", "sdxl": "sd15"}[trainer.architecture]
    sentence = refusal({"model.vae": str(bases[other])})
    assert f"{bases[other]}/vae/config.json has scaling_factor" in sentence and "choose a VAE of an" in sentence


@ONE
def test_a_base_that_is_not_there(refusal, tmp_path):
    (tmp_path / "base.safetensors").write_bytes(b"")
    (tmp_path / "base.ckpt").write_bytes(b"")
    for base, words in {
        f"{tmp_path}/nowhere": f"model.base: {tmp_path}/nowhere is neither a folder nor a file on this machine, nor a hub id",
        "owner/not-here": "owner/not-here is not on this machine and could not be fetched from the hub",
        f"{tmp_path}/base.safetensors": "base.safetensors is empty",
        f"{tmp_path}/base.ckpt": "base.ckpt",
        f"{tmp_path}": "is not a model in diffusers format (it has no model_index.json)",
    }.items():
        with case(base):
            assert words in refusal({"model.base": base})


UNTRAINABLE = {
    "predicts sample": lambda base: change_json(base / "scheduler/scheduler_config.json", prediction_type="sample"),
    "download the model again": lambda base: shutil.rmtree(base / "vae"),
    "has no tokenizer folder": lambda base: shutil.rmtree(base / "tokenizer"),
    "tokenizer could not be loaded": lambda base: cut_in_half(base / "tokenizer/tokenizer.json"),
    "but CLIP takes 77": lambda base: (base / "tokenizer/tokenizer_config.json").unlink(),
    "has no scheduler/scheduler_config.json": lambda base: shutil.rmtree(base / "scheduler"),
    "unet/diffusion_pytorch_model.safetensors is cut short": lambda base: cut_in_half(
        base / "unet/diffusion_pytorch_model.safetensors"
    ),
    "text_encoder/model.safetensors is ": lambda base: (base / "text_encoder/model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 492265168\n"
    ),
    "vae/diffusion_pytorch_model.safetensors is ": lambda base: (
        base / "vae/diffusion_pytorch_model.safetensors"
    ).write_text("<!DOCTYPE html><html><body>Access denied</body></html>"),
    "pickled .bin weights are not read": lambda base: (base / "text_encoder/model.safetensors").rename(
        base / "text_encoder/pytorch_model.bin"
    ),
    "do not fit its config.json": lambda base: change_json(base / "text_encoder/config.json", num_hidden_layers=4),
    "text_encoder/model.safetensors is cut short": lambda base: cut_in_half(base / "text_encoder/model.safetensors"),
    "unet/config.json is not valid JSON": lambda base: cut_in_half(base / "unet/config.json"),
}


@ONE
@pytest.mark.slow
def test_a_base_that_cannot_be_trained(trainer, refusal, edited_base, tmp_path):
    for words, change in UNTRAINABLE.items():
        with case(words):
            sentence = refusal({"model.base": edited_base(change), "cache.folder": str(tmp_path / "cache")})
            assert words in sentence and str(tmp_path / "base") in sentence
            # Refused with the plan, before anything is encoded, so --dry-run refuses it too.
            assert not shards(tmp_path / "cache") and not trainer.folder("refused").exists()


# --- The adapter and the optimizer ---


UNUSABLE = {
    "did you mean Adam?": {"optimizer.name": "torch.optim.Adm"},
    "No module named 'not_installed'": {"optimizer.name": "not_installed.Prodigy"},
    "no argument weight_decy (did you mean weight_decay?)": {"optimizer.kwargs": {"weight_decy": 0.1}},
    "refuses its arguments": {"optimizer.kwargs": {"betas": [0.9, 2.0]}},
    "schedule.warmup is 9 steps, and the run has 2: the warm-up must end within the run": {
        "train.steps": None,
        "train.epochs": 1,
        "schedule.name": "constant_with_warmup",
        "schedule.warmup": 9,
    },
    "lora.targets: the adapter target to_z fits no module of the UNet": {"lora.targets": ["to_q", "to_z"]},
    "conv_in, which cannot have an adapter": {"lora.targets": ["conv_in"]},
    "no kernel of train.attention [cudnn] computes": {"train.attention": ["cudnn"]},
    "the text encoders compute at the same time": {"train.attention": ["math"], "captions.encode": "while_training"},
}


@ONE
def test_what_cannot_be_trained_is_reported_before_anything_is_encoded(refusal, tmp_path):
    for words, changes in UNUSABLE.items():
        with case(words):
            assert words in refusal({**changes, "cache.folder": str(tmp_path / "cache")})
            assert not shards(tmp_path / "cache")


@ONE
def test_xformers_without_a_gpu(refusal, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sentence = refusal({"train.attention": "xformers"})
    assert "xformers attention cannot be used here" in sentence and "leave train.attention at sdpa" in sentence


# --- The run folder ---


@ONE
@pytest.mark.slow
def test_a_run_with_other_settings_is_left_as_it_is(trainer, refusal, photos, flawed, tmp_path, capsys, with_curves):
    assert trainer.train("mine", SHORT) == 0
    before = content(trainer.folder("mine"))
    assert {"mine.safetensors", "metrics.jsonl", "run.json", "data_report.json", "loss.png"} < before.keys()

    sentence = refusal({**SHORT, "lora.rank": 8, "optimizer.lr": 1e-4}, name="mine")
    for words in (
        "the run mine was started with other settings",
        "lora.rank was 4, is now 8",
        "optimizer.lr was 0.001",
    ):
        assert words in sentence
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for name in ("0.png", "0.txt"):
        shutil.copy(photos / name, fewer)
    assert "data (hash over every image" in refusal({**SHORT, "data.path": str(fewer)}, name="mine")
    assert "5 problems in" in refusal({**SHORT, "data.path": str(flawed)}, name="mine")
    assert content(trainer.folder("mine")) == before

    assert trainer.train("mine", SHORT) == 0
    assert "there is nothing to do" in capsys.readouterr().out
    assert content(trainer.folder("mine")) == before


@ONE
@pytest.mark.slow
def test_two_processes_on_one_run_folder(trainer, refusal):
    """The other process holds the lock as a training does, for as long as it lives."""
    holder = f"""
import pathlib
from sushi_research.runs.run_folder import open_run_folder
with open_run_folder(pathlib.Path({str(trainer.runs)!r}), "refused"):
    input()
"""
    other = subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, cwd=ROOT)
    try:
        lock = trainer.folder("refused") / ".lock"
        while not (lock.exists() and lock.read_text()):
            assert other.poll() is None
        sentence = refusal()
        assert f"is in use by process {other.pid}" in sentence and "give another --run.name" in sentence
    finally:
        other.communicate(b"\n")
    assert trainer.train("refused", SHORT) == 0


# --- While training ---


@pytest.fixture
def break_step(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[str, ...]]]:
    """Changes the prediction at one step (from 1); gives a list that will hold the file names of its micro-batches."""

    def install(step: int, change: Callable[[torch.Tensor], torch.Tensor]) -> list[tuple[str, ...]]:
        names: list[tuple[str, ...]] = []
        training_step, predict = trainer.script.training_step, trainer.script.model.predict
        broken = False

        def watch(config: Any, unet: Any, batch: Any, *rest: Any) -> None:
            nonlocal broken
            broken = int(batch.step) + 1 == step
            if broken:
                names.append(batch.names)
            training_step(config, unet, batch, *rest)

        def changed(*arguments: Any, **options: Any) -> torch.Tensor:
            prediction = predict(*arguments, **options)
            return change(prediction) if broken else prediction

        monkeypatch.setattr(trainer.script, "training_step", watch)
        monkeypatch.setattr(trainer.script.model, "predict", changed)
        return names

    return install


def test_a_loss_that_is_not_finite_stops_the_run_with_step_and_files(trainer, refusal, break_step):
    names = break_step(3, lambda prediction: prediction * float("nan"))
    sentence = refusal({**SHORT, "train.steps": 4, "train.batch_size": 2, "train.accumulation": 2})
    assert "the loss at step 3 is not finite, with " in sentence
    assert names and all(name in sentence for batch in names for name in batch)
    assert trainer.checkpoint("refused").step == 2, "the last checkpoint is whole, and from before"
    assert [line["step"] for line in trainer.metrics("refused")] == [1, 2]
    assert not (trainer.folder("refused") / "refused.safetensors").exists()


@ONE
def test_a_base_whose_weights_are_not_finite(trainer, refusal, edited_base):
    base = edited_base(
        lambda base: change_tensor(base / "unet/diffusion_pytorch_model.safetensors", "conv_out.bias", float("nan"))
    )
    assert "/unet has values that are not finite (NaN or infinity) in conv_out.bias" in refusal(
        {**SHORT, "model.base": base}
    )
    assert not (trainer.folder("refused") / "checkpoints").exists()


@ONE
def test_a_gradient_that_is_not_finite_is_not_saved(trainer, refusal, break_step):
    # The value is that of the prediction; the derivative of the square root at 0 is infinite.
    break_step(3, lambda prediction: prediction + 0 * (prediction - prediction).sqrt())
    assert "the gradient at step 3 is not finite" in refusal({**SHORT, "train.steps": 3})
    assert trainer.checkpoint("refused").step == 2
    assert not (trainer.folder("refused") / "refused.safetensors").exists()


def raise_out_of_memory(_: torch.Tensor) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has a total capacity of ...")


@ONE
def test_out_of_memory_ends_in_advice_in_an_order(trainer, refusal, break_step):
    break_step(1, raise_out_of_memory)
    sentence = refusal({"train.accumulation": 3})
    assert sentence.startswith("out of memory (CUDA out of memory. Tried to allocate 20.00 MiB.): ")
    advice = re.findall(r"--(\S+) (\S+?)[ ;.]", sentence)
    assert advice == [
        ("train.memory", "8GB"),
        ("train.gradient_checkpointing", "all"),
        ("train.batch_size", "2"),
        ("train.accumulation", "6"),
        ("optimizer.name", "adamw8bit"),
        ("model.base_storage", "int8"),
        ("lora.rank", "2"),
        ("data.resolution", "32"),
    ]


@ONE
def test_the_advice_can_be_followed(trainer):
    """What is named can be lowered, and the samples of a step stay as they are."""
    for changes, expected in (
        # Two does not go into five.
        ({"train.batch_size": 5}, {"train.batch_size": "1", "train.accumulation": "5"}),
        ({"train.batch_size": 10, "train.accumulation": 3}, {"train.batch_size": "5", "train.accumulation": "6"}),
        ({"train.batch_size": 1, "lora.rank": 1, "data.bucket_step": 64}, {}),
    ):
        config = trainer.config("any", {**changes, "train.gradient_checkpointing": True, "optimizer.name": "adamw8bit"})
        advice = str(training.out_of_memory(config, torch.OutOfMemoryError("out of memory")))
        found = dict(re.findall(r"--(\S+) (\S+?)(?=[ ;.]|$)", advice))
        assert found.pop("train.memory") == "8GB"
        assert {key: value for key, value in found.items() if key.startswith("train.")} == expected
        assert ("lora.rank" in found, "data.resolution" in found) == (changes.get("lora.rank") != 1,) * 2


@ONE
def test_a_vae_that_gives_nan_names_the_file(trainer, refusal, edited_base, tmp_path):
    base = edited_base(
        lambda base: change_tensor(base / "vae/diffusion_pytorch_model.safetensors", "quant_conv.bias", 1e30)
    )
    cache = tmp_path / "cache"
    sentence = refusal({"model.base": base, "cache.folder": str(cache)})
    assert re.search(r"the VAE gives values that are not finite for \d\.(png|jpg|webp): ", sentence)
    assert not shards(cache / "latents")


@ONE
@pytest.mark.slow
def test_a_disk_that_fills_up_while_caching(trainer, refusal, tmp_path):
    """The limit on the size of a file is what a full disk is to a writer; captions take more than latents and provenance.json."""
    cache, changes = tmp_path / "cache", {**SHORT, "cache.folder": str(tmp_path / "cache")}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN, "Python makes an error of it"
    resource.setrlimit(resource.RLIMIT_FSIZE, (38 * 1024, before[1]))
    try:
        sentence = refusal(changes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"cannot be written to the cache folder {cache}/text_sd15" in sentence and "free some space" in sentence
    left = [path for path in cache.rglob("*") if path.is_file() and path.parent not in (cache, cache / "remembered")]
    assert not left and not list(cache.rglob("*.tmp")), "no half shard"
    assert trainer.train("refused", changes) == 0, "with space again the same command goes on"


# --- As a user starts the scripts ---

COMMANDS = {
    "train_sd15_lora": ["scripts/train_sd15_lora.py"],
    "train_sdxl_lora": ["scripts/train_sdxl_lora.py"],
    "cache_dataset": ["scripts/cache_dataset.py", "sd15"],
    "sample": ["scripts/sample.py"],
}
HEAVY = ("torch", "diffusers", "transformers", "datasets", "peft", "accelerate", "wandb")


def start(command: list[str], *words: str) -> subprocess.CompletedProcess[str]:
    """Runs a script and lists what it imported on stderr, in lines that begin with "import time:"."""
    return subprocess.run(
        [sys.executable, "-X", "importtime", *command, *words], capture_output=True, text=True, cwd=ROOT
    )


def messages(ended: subprocess.CompletedProcess[str]) -> list[str]:
    """What a script said on stderr; asserts that nothing heavy was imported before."""
    lines = ended.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    assert "sushi_research.config" in imported and not imported & set(HEAVY)
    return [line for line in lines if not line.startswith("import time:")]


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.slow
def test_help_and_the_config_come_without_torch(command):
    helped = start(command, "--help")
    assert (helped.returncode, messages(helped)) == (0, [])
    required = ["base", "prompts"] if "sample" in command[0] else ["model.base", "data.path"]
    assert all(f"--{key}" in helped.stdout for key in required)

    refused = start(command, "--lora.ran", "8", "--bse", "x", "stray")
    assert refused.returncode == 2 and refused.stdout == ""
    first, *lines = messages(refused)
    assert first.startswith("error: ") and "problems in the configuration:" in first
    assert [line for line in lines if "unknown key lora.ran on the command line" in line]
    assert [line for line in lines if "unknown key bse on the command line: did you mean" in line]
    assert [line for line in lines if 'unexpected word "stray" on the command line' in line]
    assert all(line.startswith("  ") for line in lines), "one line per problem"


def test_without_arguments_five_lines_say_how_to_begin():
    for name in ("train_sd15_lora", "cache_dataset", "inspect_data", "sample"):
        ended = start([f"scripts/{name}.py"])
        assert (ended.returncode, messages(ended)) == (0, []), name
        lines = ended.stdout.splitlines()
        assert len(lines) == 5, name
        # What they name is there.
        for path in re.findall(r"\b(?:configs|scripts)/\S+?\.(?:py|yaml)", ended.stdout):
            assert (ROOT / path).is_file(), path


@pytest.mark.slow
def test_the_printed_config_is_read_back(tmp_path):
    command = COMMANDS["train_sdxl_lora"]
    printed = start(command, "--config", "configs/sdxl_lora.yaml", "--data.path", "photos", "--print_config")
    assert (printed.returncode, messages(printed)) == (0, [])
    sections = [line.partition(":")[0] for line in printed.stdout.splitlines() if line[0] not in " -"]
    assert sections == list(SDXLTraining.model_fields)
    (tmp_path / "printed.yaml").write_text(printed.stdout)
    again = start(command, "--config", str(tmp_path / "printed.yaml"), "--print_config")
    assert again.stdout == printed.stdout


def test_a_config_file_with_a_mistake_names_file_and_key(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("lora:\n  rnk: 8\n")
    ended = start(
        COMMANDS["train_sd15_lora"], "--config", "configs/sd15_lora.yaml", "--config", str(file), "--data.path", "x"
    )
    assert ended.returncode == 2
    assert messages(ended) == [f"error: unknown key lora.rnk in {file}: did you mean lora.rank?"]
    file.write_text("lora:\n  rank: 8\n  rank: 9\n")
    [line] = messages(start(COMMANDS["train_sd15_lora"], "--config", str(file)))
    assert line.startswith("error: ") and "rank" in line and str(file) in line


def test_an_architecture_that_is_none():
    ended = start(["scripts/cache_dataset.py"], "sd3", "--data.path", "x")
    assert ended.returncode == 2
    assert messages(ended)[0].startswith("error: sd3 is not an architecture: begin with sd15 or sdxl")


@pytest.mark.slow
@ONE
def test_a_mistake_as_the_user_sees_it(trainer, bases, flawed, forked, tmp_path):
    for changes, words in (
        ({"data.path": str(tmp_path / "nowhere")}, "data.path: there is no"),
        ({"data.path": str(flawed)}, "5 problems in"),
        ({"model.base": str(bases["sdxl"])}, "train it with scripts/train_sdxl_lora.py"),
        ({"optimizer.name": "not_installed.Prodigy"}, "the optimizer not_installed.Prodigy cannot be imported"),
    ):
        file = tmp_path / "config.yaml"
        file.write_text(config_to_yaml(trainer.config("refused", changes)))
        process = forked("scripts/train_sd15_lora.py", "--config", file)
        assert process.wait() == 2, words
        lines = [line for line in re.split("[\r\n]+", process.err) if line and not line.startswith("checking images")]
        assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0], lines


# --- Asking for the plan alone ---


def test_a_dry_run_prints_the_plan_and_begins_no_run(trainer, capsys, tmp_path):
    changes = {"train.accumulation": 2, "lora.targets": "attention", "cache.folder": str(tmp_path / "cache")}
    config = trainer.config("dry", changes).model_copy(update={"dry_run": True})
    assert trainer.script.main(config) == 0
    assert content(trainer.folder("dry")).keys() == {"dry_run/plan.json", "dry_run/data_report.json"}
    assert not shards(tmp_path / "cache")
    lines = capsys.readouterr().out.splitlines()
    printed = dict(line.split(maxsplit=1) for line in lines if not line.startswith(" "))
    modules = {"sd15": 128, "sdxl": 136}[trainer.architecture]
    expected = {
        "base": f": {trainer.architecture}, predicts epsilon",
        "images": "7 (7 per epoch with repeats)",
        "buckets": "2: 96x32 (1), 64x64 (6)",
        "step": "8 samples = batch 4 x accumulation 2 x processes 1; micro-batches 67% full",
        "recording": "eager: a CPU has no CUDA graphs",
        "length": "3 optimizer steps = 24 samples = 3.43 epochs; each image 3.4 times",
        "adapter": f"{modules} modules, ",
        "optimizer": "adamw (torch.optim.AdamW): state ",
        "compute": "FLOP per step",
        "memory": " GiB in tensors",
        "precision": "fp32 (the config says fp32): float32 weights and activations, float32 adapter master weights",
        "cache": "7 of 7 image entries to encode (7 KiB in all), 8 of 8 captions",
        "disk": "cache ",
        "evaluation": "none: --evaluation.held_out 0.1, or --evaluation.path",
        "device": " GiB, ",
        "samples": "none: sample.enabled is false",
        "checkpoints": "3: every step; the latest 2 are kept",
        "adapters": "NAME.safetensors",
        "metadata": "full: the words of the captions",
        "speed": "not known: no run in ",
        "notes": "4 images lose more than 20% to the crop that fits a bucket: 3.png (38%, to 96x32), 1.jpg (33%, to 64x64), ",
        "files": str(trainer.folder("dry") / "dry_run" / "plan.json"),
    }
    assert printed.keys() == expected.keys()
    for key, words in expected.items():
        assert words in printed[key]


@pytest.mark.parametrize("architecture", ["sdxl"])
@pytest.mark.slow
def test_out_of_memory_next_to_the_training_has_advice_of_its_own(trainer, tmp_path, monkeypatch):
    def out_of_memory(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr("sushi_research.sampling.pipeline.generate_each", out_of_memory)
        with pytest.raises(UserError, match=r"while generating the samples of step 0: .*--sample\.enabled false"):
            trainer.train("sampling", {"sample.enabled": True, "sample.prompts": ["a plate"]})
    with monkeypatch.context() as patch:
        patch.setattr("sushi_research.caches.encoding.encode_images", out_of_memory)
        with pytest.raises(UserError, match=r"while encoding the images: .*--data\.resolution"):
            trainer.train("encoding", {"cache.folder": str(tmp_path / "own_cache")})
