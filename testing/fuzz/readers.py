"""The readers that are fuzzed: each makes a small folder of real files and reads one of them, which may be damaged."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sushi_research.errors import UserError
from testing.fuzz import adapter_files, image_files

ROOT = Path(__file__).parents[2]
MIB = 2**20


@dataclass(frozen=True)
class Reader:
    """`make` writes sound files into a new folder; `read` reads the one of a name, and raises `refuses` if it is no good.

    `files` are patterns of those that are damaged; `memory` is how much more than before the reading may take, in bytes.
    """

    name: str
    files: tuple[str, ...]
    make: Callable[[Path], None]
    read: Callable[[Path, str], object]
    refuses: Callable[[], tuple[type[BaseException], ...]] = lambda: ()
    memory: int = 512 * MIB


def make_configs(folder: Path) -> None:
    for pattern in ("*_lora.yaml", "demo_*.yaml", "demo/*.yaml", "overlays/*.yaml"):
        for path in sorted((ROOT / "configs").glob(pattern)):
            shutil.copy(path, folder / f"{path.parent.name}-{path.name}")


def read_config(folder: Path, name: str) -> object:
    base = [] if name.startswith("configs-") else ["--config", "configs/demo_sdxl.yaml"]
    # The last layer's data.path would take the place of data.sets.
    path = [] if "subject" in name else ["--data.path", "photos"]
    return _load([*base, "--config", str(folder / name), *path, "--train.steps", "900"], sd15="sd15" in name)


def make_experiments(folder: Path) -> None:
    shutil.copy(ROOT / "configs/experiments/rank.yaml", folder)


def read_experiment(folder: Path, name: str) -> object:
    from sushi_research.config.command_line import load_config
    from sushi_research.experiments.experiment import Experiment, plan

    return plan(load_config(Experiment, ["--config", str(folder / name)], script="x", intro="1\n2\n3\n4\n5"))


def make_command_lines(folder: Path) -> None:
    """One word a line."""
    lines = {
        "a": "--config configs/sdxl_lora.yaml --data.path photos --lora.rank 16 --optimizer.lr=1e-4 --dry_run true",
        "b": "--config configs/demo_sdxl.yaml --optimizer.kwargs {eps:1e-8} --sample.prompts [one,two] --dry-run",
        "c": "--data.path x --config configs/sdxl_lora.yaml --run.name x --train.steps 700 --print_config",
    }
    for name, line in lines.items():
        (folder / f"{name}.words").write_text(line.replace(" ", "\n"))


def read_command_line(folder: Path, name: str) -> object:
    # No operating system hands over a zero byte; bytes that are not UTF-8 come as halves of surrogate pairs.
    words = (folder / name).read_bytes().replace(b"\0", b"").decode("utf-8", "surrogateescape").split("\n")
    return _load(words, sd15=False)


def _load(words: list[str], sd15: bool) -> object:
    from sushi_research.config import SD15Training, SDXLTraining
    from sushi_research.config.command_line import load_config

    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        return load_config(SD15Training if sd15 else SDXLTraining, words, script="x", intro="1\n2\n3\n4\n5")


def make_prompts(folder: Path) -> None:
    (folder / "lines.txt").write_text("# of a user\n\na cat, 1girl --w 64 --h 96 --s 8 --l 6.5 --d 7 --n dark\na dog\n")
    entry = "{prompt: a dog, negative_prompt: '', seed: 3, width: 64, height: 96, steps: 8, guidance: 6.5, scale: -0.5}"
    (folder / "list.yaml").write_text(f"- a cat\n- {entry}\n")


def read_prompts(folder: Path, name: str) -> object:
    from sushi_research.config import prompts
    from sushi_research.sampling.prompts import expand

    defaults = {"negative_prompt": "", "width": 64, "height": 64, "steps": 25, "guidance": 5.0}
    return expand(prompts.read_prompts(str(folder / name), "sample.prompts_file"), [0, 1], defaults)


def make_weights(folder: Path) -> None:
    """Adapter files in three formats, and the beginning of a base."""
    import numpy
    from safetensors.numpy import save_file

    down, up = numpy.ones((4, 8), numpy.float32), numpy.ones((8, 4), numpy.float32)
    block = "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    kohya = {f"lora_unet_{block}.{key}": value for key, value in (("lora_down.weight", down), ("lora_up.weight", up))}
    alpha = {f"lora_unet_{block}.alpha": numpy.array(4.0, numpy.float32)}
    save_file(kohya | alpha, folder / "kohya.safetensors", metadata={"ss_network_dim": "4", "ss_network_args": "{}"})
    layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}, folder / "diffusers.safetensors")
    name = f"lycoris_{block}"
    factors = {
        "lokr_w1": down[:2, :2],
        "lokr_w2_a": up[:, :2],
        "lokr_w2_b": down[:2],
        "alpha": numpy.array(1.0, numpy.float32),
    }
    loha = {
        f"{name}_0.hada_{part}": each for part, each in (("w1_a", up), ("w1_b", down), ("w2_a", up), ("w2_b", down))
    }
    others = {f"{name}.{part}": numpy.ascontiguousarray(each) for part, each in factors.items()}
    plain = {f"{name}_1.diff": up, f"{name}_2.w_norm": up[0], f"{name}_1.diff_b": up[:, 0].copy()}
    save_file(loha | others | plain, folder / "lycoris.safetensors")
    names = (
        "model.diffusion_model.input_blocks.0.0.weight",
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
    )
    save_file(
        dict.fromkeys(names, down) | {"first_stage_model.decoder.conv_in.weight": up}, folder / "base.safetensors"
    )


def read_weights(folder: Path, name: str) -> object:
    from sushi_research.adapters.module_names import locate
    from sushi_research.adapters.reading import read_adapter
    from sushi_research.models.inspection import describe

    with contextlib.suppress(UserError):
        list(describe(folder / name, name))
    if name == "base.safetensors":
        return None
    adapter = read_adapter(folder / name)
    with contextlib.suppress(UserError):
        locate(adapter)
    return adapter


def make_run(folder: Path) -> None:
    from fake_runs import fake_run  # of the tests

    from sushi_research.runs.checkpoint import save_checkpoint

    fake_run(folder / "run")
    import torch

    save_checkpoint(folder / "run/checkpoints", 20, {"value": torch.ones(4)}, {"samples_seen": 80}, 2)


def read_run(folder: Path, name: str) -> object:
    from sushi_research.reports.run_record import read_record
    from sushi_research.runs.checkpoint import latest_checkpoint
    from sushi_research.runs.metrics_file import MetricsFile
    from sushi_research.runs.run_folder import open_run_folder

    read_record(folder / "run")
    run = open_run_folder(folder, "run", writer=False)
    run.record()
    MetricsFile(run.path / "metrics.jsonl").read()
    found = latest_checkpoint(folder / "run/checkpoints")
    return found.load() if found else None


def make_scores(folder: Path) -> None:
    """Of a run, with what the command that made them left next to them."""
    (folder / "run").mkdir()
    scores = {
        "concept": {"values": {"one egg maki": 1, "two tuna maki": 0.5}, "better": "lower", "about": "learned"},
        "sharpness": {"one egg maki": 0.3, "two tuna maki": -4e-3},
        "votes": 17,
    }
    (folder / "run/scores.json").write_text(json.dumps(scores, indent=2))
    source = {"command": "python judge.py {run}", "adapter": "a" * 64, "step": 20, "complete": True}
    (folder / "run/scores_source.json").write_text(json.dumps(source))


def read_scores(folder: Path, name: str) -> object:
    from sushi_research.reports.scores import scores_of_run

    found = scores_of_run(folder / "run", 20, "correct it")
    numbers = [value for score in found.values() for value in score.values.values()]
    assert numbers and all(isinstance(value, float) and abs(value) < 1e100 for value in numbers)
    return found


def make_cache(folder: Path) -> None:
    import torch
    from PIL import Image

    from sushi_research.caches.store import Store
    from sushi_research.fingerprints import HashCache, file_state

    with Store.open(folder / "store", ("mean",), repair=True).writer() as writer:
        for number in range(3):
            writer.add(f"{number:032x}", {"mean": torch.full((4, 2, 2), number)}, {"caption": f"tuna {number}"})
    (folder / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "photos/a.png")
    (folder / "photos/a.txt").write_text("tuna")
    cache = HashCache(folder / "files.json")
    cache.put(folder / "photos/a.png", {"hash": "0" * 32}, file_state(folder / "photos/a.png"))
    cache.save()
    _remembered(folder, write=True)


def _remembered(folder: Path, write: bool = False) -> None:
    """What is remembered comes back as it was written, or not at all."""
    import numpy
    import pyarrow

    from sushi_research.remembered import Remembered

    columns = {"sizes": numpy.arange(50), "names": pyarrow.array(["a.png", "b.png"])}
    if write:
        Remembered(folder / "known").put("rows", "0" * 32, columns)
    found = Remembered(folder / "known").find("rows", "0" * 32)
    assert found is None or (found["names"].equals(columns["names"]) and (found["sizes"] == columns["sizes"]).all())


def _scan(folder: Path) -> object:
    from sushi_research.data.dataset import scan
    from sushi_research.remembered import Remembered

    options = {"split": "train", "image_column": "image", "caption_column": "text", "revision": None}
    remembered = Remembered(folder / "remembered")
    return scan(folder / "photos", **options, remembered=remembered, show_progress=False)  # type: ignore[arg-type]


def read_cache(folder: Path, name: str) -> object:
    from sushi_research.caches.store import Store
    from sushi_research.fingerprints import HashCache

    HashCache(folder / "files.json")
    _remembered(folder)
    (sample,) = _scan(folder).samples
    sample.read()
    assert (sample.name, sample.caption, sample.width, sample.height) == ("a.png", "tuna", 8, 8), (
        "another row than was written"
    )
    store = Store.open(folder / "store", ("mean",), repair=True)
    for number in range(3):
        key = f"{number:032x}"
        if key in store:  # an entry is that of its key, or is not there
            assert store.get(key)["mean"].eq(number).all() and store.metadata(key) == {"caption": f"tuna {number}"}
    assert len(store) == sum(f"{number:032x}" in store for number in range(3)), "a row that nobody wrote"
    if store.damaged:
        raise UserError(f"damaged: {store.damaged}")
    return store


def make_base(folder: Path) -> None:
    from testing.tiny_base import save_tiny_base

    save_tiny_base(folder / "base", "sd15")


def read_base(folder: Path, name: str) -> object:
    from sushi_research.models.inspection import describe
    from sushi_research.models.loading import resolve_base

    list(describe(folder / "base", str(folder / "base")))
    base = resolve_base(str(folder / "base"))
    return [tokenizer.load() for tokenizer in base.tokenizers.values()]


TABLES = ("*/train.*", "*/README.md", "*/.huggingface.yaml", "saved/dataset_dict.json", "saved/train/*")
BASES = ("base/*.json", "base/*/*.json", "base/*/*.txt", "base/vae/*")
READERS = [
    Reader("images", ("*",), image_files.make_images, image_files.read_image, image_files.bad_image, 1536 * MIB),
    Reader("photos", ("*",), image_files.make_photos, image_files.read_photo, image_files.bad_image, 1536 * MIB),
    Reader("masks", ("*",), image_files.make_masks, image_files.read_mask, image_files.bad_image, 1536 * MIB),
    Reader(
        "captions",
        ("*.txt", "*.caption", "sub/metadata.jsonl"),
        image_files.make_captions,
        image_files.read_captions,
    ),
    Reader("configs", ("*.yaml",), make_configs, read_config),
    Reader("command lines", ("*.words",), make_command_lines, read_command_line),
    Reader("prompts", ("*.txt", "*.yaml"), make_prompts, read_prompts),
    Reader("experiments", ("*.yaml",), make_experiments, read_experiment),
    Reader("tables", TABLES, image_files.make_tables, image_files.read_table),
    Reader("weights", ("*.safetensors",), make_weights, read_weights),
    Reader(
        "adapters", ("*.safetensors",), adapter_files.make_adapters, adapter_files.read_adapter_file, memory=256 * MIB
    ),
    Reader("runs", ("run/*.*", "run/checkpoints/*/*"), make_run, read_run),
    Reader("scores", ("run/scores*.json",), make_scores, read_scores),
    Reader("caches", ("files.json", "known/*", "store/*"), make_cache, read_cache),
    Reader("bases", BASES, make_base, read_base),
]
