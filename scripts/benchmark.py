"""Times two variants of a training step against each other, and writes what it found as JSON.

    python scripts/benchmark.py                                        # every pair on a tiny SDXL base: seconds to minutes
    python scripts/benchmark.py --pair caches --model sd15
    python scripts/benchmark.py --profile full --base FOLDER --model sdxl --device cuda
    python scripts/benchmark.py --table benchmarks/results/*.json      # results as the rows of docs/performance.md

A pair is two functions that build a step: add them to PAIRS, and the rest is done. docs/performance.md has the protocol.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

# What each pair asks. The variants are in PAIRS below.
QUESTIONS = {
    "caches": "what do the caches save a step? A decodes, resizes and encodes its pictures and captions, B reads them",
    "adapter": "what does the adapter's dtype cost? A is fp32 with peft's casts in every layer, B our bf16 working copy",
    "same": "how well does this machine measure? A and B are the same: the interval should hold 1",
}
RESULTS = "benchmarks/results"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line. Light: --help and a mistyped option do not wait for torch."""
    parser = argparse.ArgumentParser(
        description="Times two variants of a training step against each other.",
        epilog="pairs: " + "; ".join(f"{name}: {question}" for name, question in QUESTIONS.items()),
        allow_abbrev=False,
    )
    parser.add_argument("--pair", action="append", choices=QUESTIONS, help="repeatable; default: caches and adapter")
    parser.add_argument("--model", action="append", choices=("sdxl", "sd15"), help="repeatable; default: sdxl")
    parser.add_argument("--profile", choices=("tiny", "full"), default="tiny", help="tiny: a base with random weights, "
                        "made for the occasion; full: the base given by --base at its own resolution")  # fmt: skip
    parser.add_argument("--base", metavar="FOLDER", help="base in the diffusers format, for --profile full")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--batch-size", type=int, default=1, help="samples of a step (default 1)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds that count, at least 9 (default 9)")
    parser.add_argument("--warmup", type=int, default=2, help="rounds dropped before them (default 2)")
    parser.add_argument("--block-seconds", type=float, default=0.5, help="length of a quarter of a round (default 0.5)")
    parser.add_argument("--max-pressure", type=float, default=0.5, help="a round in which tasks waited for a CPU for more "
                        "than this share of the time is left out and another one done (default 0.5)")  # fmt: skip
    parser.add_argument("--results", metavar="FOLDER", default=RESULTS, help=f"default {RESULTS}")
    parser.add_argument("--table", nargs="+", metavar="FILE", help="print these results as a Markdown table, and stop")
    found = parser.parse_args(arguments)
    if found.rounds < 9:
        parser.error("--rounds is below 9: fewer give no interval worth the name")
    if found.batch_size < 1 or found.warmup < 0 or found.block_seconds < 0:
        parser.error("--batch-size is at least 1, --warmup and --block-seconds at least 0")
    if (found.profile == "full") != (found.base is not None):
        parser.error("--profile full and --base FOLDER go together: give both or neither")
    if found.base is not None and len(found.model or ["sdxl"]) != 1:
        parser.error("--base is a base of one architecture: give --model once")
    found.pair, found.model = found.pair or ["caches", "adapter"], found.model or ["sdxl"]
    return found


if __name__ == "__main__":
    # Before the imports below: a pool of threads on a shared machine costs more than it gives, and varies wildly.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    ARGUMENTS = parse(sys.argv[1:])

import importlib.util
import json
import platform
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

import sushi_research
from sushi_research import adapter, conditioning, diffusion, images, op_counts, optim, performance, preparation
from sushi_research import provenance, randomness, training  # fmt: skip
from sushi_research.command_line import run_main
from sushi_research.config import SD15Training, SDXLTraining, TrainingConfig
from sushi_research.errors import UserError
from sushi_research.files import write_json
from sushi_research.fingerprints import FileMemo, folder_hash
from sushi_research.items import Item
from sushi_research.loader import Batch, Loader
from sushi_research.models import loading, sd15, sdxl
from sushi_research.precision import COMPUTE_DTYPES, Masters, make_scaler, resolve_precision
from sushi_research.progress import progress
from sushi_research.sampler import Draw, Sampler
from sushi_research.tiny import save_tiny_base

ROOT = Path(sushi_research.__file__).parents[1]
MODELS: dict[str, tuple[ModuleType, type[TrainingConfig]]] = {"sd15": (sd15, SD15Training), "sdxl": (sdxl, SDXLTraining)}
RESOLUTIONS = {("tiny", "sd15"): 128, ("tiny", "sdxl"): 128, ("full", "sd15"): 512, ("full", "sdxl"): 1024}
PICTURES = 8
PARITY_STEPS = 4

# A step takes its index, which decides its samples, and returns its loss (a tensor on the device).
Step = Callable[[int], torch.Tensor]


@dataclass(frozen=True)
class Bench:
    """What the variants of one architecture share. `finish` closes what a variant opened."""

    config: TrainingConfig
    model: ModuleType
    script: ModuleType
    base: loading.Base
    items: list[Item]
    sampler: Sampler
    caches: preparation.Caches
    device: torch.device
    precision: str
    finish: ExitStack


class LossSum:
    """Stands where the script has its Tally: adds up the loss on the device, and waits for nothing."""

    def __init__(self) -> None:
        self.loss = torch.zeros(())

    def add(self, loss: torch.Tensor, losses: torch.Tensor, quarters: torch.Tensor, names: tuple[str, ...]) -> None:
        self.loss = self.loss.to(loss.device) + loss.detach()


# --- The variants ---


def with_masters(bench: Bench, unet: torch.nn.Module, batches: Callable[[int], Any]) -> Step:
    """The step of the training script: fp32 masters, a working copy in the compute dtype."""
    config, abar = bench.config, diffusion.alphas_cumprod().to(bench.device)
    masters = Masters(adapter.adapter_parameters(unet), COMPUTE_DTYPES[bench.precision])
    optimizer = optim.build_optimizer(config.optimizer.name, masters.parameters(), config.optimizer.lr, {})
    scaler = make_scaler(bench.precision, bench.device)

    def step(index: int) -> torch.Tensor:
        tally = LossSum()
        for batch in batches(index):
            bench.script.training_step(config, unet, batch, index, config.train.batch_size, abar, scaler, tally)
            masters.accumulate()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(masters.parameters(), config.train.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        masters.refresh()
        masters.zero_grad()
        return tally.loss

    return step


def as_peft(bench: Bench, unet: torch.nn.Module, batches: Callable[[int], Any]) -> Step:
    """The same step on adapters as peft's `get_peft_model` makes them on a bf16 UNet: in fp32, with casts in each layer."""
    config, abar = bench.config, diffusion.alphas_cumprod().to(bench.device)
    parameters = list(adapter.adapter_parameters(unet).values())
    optimizer = optim.build_optimizer(config.optimizer.name, parameters, config.optimizer.lr, {})
    scaler = make_scaler(bench.precision, bench.device)

    def step(index: int) -> torch.Tensor:
        tally = LossSum()
        for batch in batches(index):
            bench.script.training_step(config, unet, batch, index, config.train.batch_size, abar, scaler, tally)
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, config.train.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return tally.loss

    return step


def with_caches(bench: Bench, unet: torch.nn.Module) -> Step:
    """Reads its batches from the caches, with the loader of the training script."""
    size = bench.config.train.batch_size
    # No noise is drawn ahead: both variants draw it within the step, and differ in the caches alone.
    loader = Loader(
        bench.items, bench.sampler, bench.caches, batch_size=size, rank=0, world=1, device=bench.device, ahead=()
    )
    bench.finish.callback(loader.close)
    return with_masters(bench, unet, loader.step)


def without_caches(bench: Bench, unet: torch.nn.Module) -> Step:
    """Makes the same batches from the picture files and captions, within the step."""
    vae = loading.load_vae(bench.base, bench.caches.vae_dtype, bench.device)
    text = bench.model.load_text(bench.base, bench.device)

    def batches(index: int) -> Iterator[Batch]:
        for draws in bench.sampler.share(index, bench.config.train.batch_size, 0, 1):
            yield encode_batch(bench, vae, text, draws)

    return with_masters(bench, unet, batches)


@torch.no_grad()
def encode_batch(bench: Bench, vae: Any, text: Any, draws: Sequence[Draw]) -> Batch:
    """The batch that the loader reads for these draws (without flips), encoded here and now.

    The pictures go through the VAE together; the caches encode each alone, which for more than one moves last bits.
    """
    items = [bench.items[draw.index] for draw in draws]
    pixels = [images.resize_and_crop(images.decode(item.sample.load()), item.placement, False) for item in items]
    pictures = torch.from_numpy(np.stack(pixels)).to(bench.device).permute(0, 3, 1, 2).to(vae.dtype) / 127.5 - 1.0
    posterior = vae.encode(pictures).latent_dist
    rows = [bench.model.encode_caption(text, i.sample.caption, **bench.caches.text_settings)[0] for i in items]
    return Batch(
        mean=posterior.mean.half(),
        std=posterior.std.half(),
        text={name: torch.stack([row[name].half() for row in rows]) for name in rows[0]},
        time_ids=conditioning.time_ids([i.placement.time_ids(False, "image") for i in items]).to(bench.device),
        names=tuple(item.sample.name for item in items),
        keys=tuple((draw.epoch, *item.identity) for draw, item in zip(draws, items, strict=True)),
        seed=bench.sampler.seed,
        device=bench.device,
        drawn={},
    )


def in_memory(bench: Bench) -> Callable[[int], list[Batch]]:
    """Batches read once, before the timing, and used over and over: for pairs that are not about data."""
    loader = Loader(bench.items, bench.sampler, bench.caches, batch_size=bench.config.train.batch_size, rank=0, world=1,
                    device=bench.device, ahead=("posterior", "noise"))  # fmt: skip
    ready = [list(loader.step(index)) for index in range(PICTURES)]
    loader.close()
    return lambda index: ready[index % len(ready)]


@dataclass(frozen=True)
class Pair:
    """Two variants, each with the words that stand for it in "A a step takes 1.5 times as long as B", and the precision."""

    a: str
    build_a: Callable[[Bench, torch.nn.Module], Step]
    b: str
    build_b: Callable[[Bench, torch.nn.Module], Step]
    precision: str = "auto"


PAIRS = {
    "caches": Pair("without caches", without_caches, "with them", with_caches),
    "adapter": Pair(
        "with fp32 adapters as peft makes them",
        lambda bench, unet: as_peft(bench, unet, in_memory(bench)),
        "with fp32 masters and a bf16 working copy",
        lambda bench, unet: with_masters(bench, unet, in_memory(bench)),
        precision="bf16",
    ),
    "same": Pair(
        "in the first of two equal variants",
        lambda bench, unet: with_masters(bench, unet, in_memory(bench)),
        "in the second",
        lambda bench, unet: with_masters(bench, unet, in_memory(bench)),
    ),
}
assert list(PAIRS) == list(QUESTIONS)


# --- The order of events ---


def main(arguments: argparse.Namespace) -> int:
    """Runs the pairs for each architecture, prints what they found, and writes one file per result."""
    if arguments.table:
        print(performance.TABLE_HEAD)
        for file in map(Path, arguments.table):
            print(performance.table_row(json.loads(file.read_text()), file.name))
        return 0
    training.quiet_libraries()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch finds no CUDA device: leave it out, or install torch for CUDA.")
    for architecture in arguments.model:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder, ExitStack() as finish:
            bench = prepare(arguments, architecture, Path(folder), finish)
            for name in arguments.pair:
                result = run_pair(arguments, bench, name)
                path = write_result(Path(arguments.results), result)
                print(f"{performance.sentence(result)}\n  written to {path}", flush=True)
    return 0


def prepare(arguments: argparse.Namespace, architecture: str, folder: Path, finish: ExitStack) -> Bench:
    """The base, eight pictures with captions, and full caches of them, below `folder`."""
    model, config_class = MODELS[architecture]
    resolution = RESOLUTIONS[arguments.profile, architecture]
    base = arguments.base or str(save_tiny_base(folder / "base", architecture, sample_size=resolution // 8))
    draw_pictures(folder / "pictures", resolution * 3 // 2)
    config = config_class(
        model={"base": base},
        data={"path": str(folder / "pictures"), "resolution": resolution},
        cache={"folder": str(folder / "cache")},
        # One optimizer for every variant, of the kind that needs no library of its own.
        optimizer={"name": "adamw"},
        train={"steps": 1, "batch_size": arguments.batch_size},
    )
    accelerator = Accelerator(mixed_precision="no", cpu=arguments.device == "cpu" or not torch.cuda.is_available())
    memo = preparation.open_memo(config)
    found = preparation.find_base(config, model)
    items = preparation.read_data(config, memo, None, accelerator).items
    caches = preparation.open_caches(config, found, model, memo, accelerator)
    preparation.fill_caches(caches, items, preparation.captions_of(config, items, ()), found, model, accelerator)
    return Bench(
        config=config,
        model=model,
        script=load_script(architecture),
        base=found,
        items=items,
        sampler=Sampler(tuple(item.bucket for item in items), arguments.batch_size, config.train.seed),
        caches=caches,
        device=accelerator.device,
        precision=resolve_precision("auto", None, accelerator.device),
        finish=finish,
    )


def load_script(architecture: str) -> ModuleType:
    """The training script as a module: what is timed is the step that trains, as it stands, not a copy of it."""
    path = ROOT / f"scripts/train_{architecture}_lora.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def draw_pictures(folder: Path, side: int) -> None:
    """Square JPEG files with soft shapes and grain, so that they take about as long to decode as photographs do."""
    folder.mkdir()
    for number in range(PICTURES):
        rng = randomness.key(0, "benchmark-picture", number)
        shapes = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
        grain = rng.normal(0, 6, (side, side, 3))
        pixels = (np.asarray(shapes) + grain).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=92)
        (folder / f"{number}.txt").write_text(f"picture number {number}, soft shapes of many colours\n")


def run_pair(arguments: argparse.Namespace, bench: Bench, name: str) -> dict[str, Any]:
    """Builds both variants, compares their losses, times them in alternation, counts; returns the result file's content."""
    pair = PAIRS[name]
    if pair.precision != "auto":
        bench = replace(bench, precision=pair.precision)
    cuda = bench.device.type == "cuda"
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    steps, unets, held = {}, {}, {}
    for variant, build in {"a": pair.build_a, "b": pair.build_b}.items():
        before = torch.cuda.memory_allocated() if cuda else 0
        unets[variant] = make_unet(bench)
        steps[variant] = build(bench, unets[variant])
        held[variant] = torch.cuda.memory_allocated() - before if cuda else 0

    # Both variants see the same indices all along, so they stay in the same state as far as their arithmetic is the same.
    losses = [[steps[variant](index).item() for variant in "ab"] for index in range(PARITY_STEPS)]
    if not np.isfinite(losses).all():
        raise UserError(f"the pair {name} gives a loss that is not finite: there is no point in timing it.")
    index, a, b = PARITY_STEPS, steps["a"], steps["b"]
    calls = performance.calls_per_block(a, b, arguments.block_seconds, first=index, synchronize=synchronize)
    index += 2
    rounds: list[performance.Round] = []
    with progress(total=arguments.rounds, description=f"{bench.model.NAME} {name}", unit="round") as bar:
        for done in performance.alternate(a, b, rounds=arguments.rounds, warmup=arguments.warmup, calls=calls,
                                          max_pressure=arguments.max_pressure, first=index, synchronize=synchronize):  # fmt: skip
            rounds.append(done)
            bar.update(done.status == "kept")
    index += 2 * calls * len(rounds)
    kept = [done for done in rounds if done.status == "kept"]
    if len(kept) < arguments.rounds:
        raise UserError(
            f"the machine was busy in all but {len(kept)} of {len(rounds)} rounds (--max-pressure {arguments.max_pressure}): "
            "run it again when less else is running, or raise --max-pressure."
        )
    counts, memory = {}, {}
    for variant, step in steps.items():
        if cuda:
            memory[variant] = held[variant] + memory_of_a_step(step, index)
        counts[variant] = asdict(op_counts.count(lambda step=step: step(index + 1), unets[variant].parameters()))
    found = performance.compare([done.a for done in kept], [done.b for done in kept])
    return {
        "pair": name,
        "question": QUESTIONS[name],
        "variants": {"a": pair.a, "b": pair.b},
        "model": bench.model.NAME,
        "profile": arguments.profile,
        "result": {
            **asdict(found),
            "discarded": sum(done.status == "busy" for done in rounds),
            "seconds_per_step": {"a": median(done.a for done in kept), "b": median(done.b for done in kept)},
        },
        "parity": {
            "steps": PARITY_STEPS,
            "largest_relative_difference": max(abs(one - other) / abs(one) for one, other in losses),
        },
        "counts": counts,
        "memory": memory or None,
        "config": {
            "base": bench.config.model.base if arguments.base else "sushi_research.tiny, seed 0",
            "resolution": bench.config.data.resolution,
            "batch_size": bench.config.train.batch_size,
            "precision": bench.precision,
            "lora": {"targets": bench.config.lora.targets, "rank": bench.config.lora.rank},
            "optimizer": bench.config.optimizer.name,
            "warmup": arguments.warmup,
            "calls_per_block": calls,
            "block_seconds": arguments.block_seconds,
            "max_pressure": arguments.max_pressure,
        },
        "code": code_state(),
        "libraries": provenance.library_versions(),
        "python": platform.python_version(),
        "machine": {
            "device": provenance.device_name(str(bench.device)),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "platform": platform.platform(),
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rounds": [asdict(done) for done in rounds],
    }


def make_unet(bench: Bench) -> torch.nn.Module:
    """The frozen UNet in the compute dtype with the adapter in fp32, as the training script makes it."""
    unet = loading.load_unet(bench.base, COMPUTE_DTYPES[bench.precision], bench.device)
    lora = bench.config.lora
    adapter.attach(unet, targets=lora.targets, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, init=lora.init,
                   seed=bench.config.train.seed)  # fmt: skip
    return unet.train()


def memory_of_a_step(step: Step, index: int) -> int:
    """The most bytes that a step allocates on the GPU beyond what stands there before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(index)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def code_state() -> dict[str, Any]:
    """The commit, whether tracked files differ from it, and the hash of the code that was timed."""
    sources = [*ROOT.glob("sushi_research/**/*.py"), *ROOT.glob("scripts/*.py")]
    with tempfile.TemporaryDirectory() as folder:
        digest = folder_hash(sources, FileMemo(Path(folder) / "memo.json"))
    return {"version": sushi_research.__version__, **provenance.git_state(), "hash": digest}


def write_result(folder: Path, result: dict[str, Any]) -> Path:
    """Writes a new file, named by what was measured and the commit; earlier results stay as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    code = result["code"]
    state = f"{code['commit'][:10]}{'-dirty' if code['dirty'] else ''}" if code["commit"] else f"code-{code['hash'][:10]}"
    stem = f"{result['pair']}_{result['model']}_{result['profile']}_{state}"
    names = (f"{stem}{f'_{number}' if number > 1 else ''}.json" for number in range(1, 1000))
    path = next(folder / name for name in names if not (folder / name).exists())
    write_json(path, result)
    return path


if __name__ == "__main__":
    run_main(main, ARGUMENTS)
