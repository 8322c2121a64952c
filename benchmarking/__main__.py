"""Times two variants of a training step against each other, prints the result and writes it as JSON.

    python -m benchmarking                                       # caches and adapter, on a tiny SDXL base
    python -m benchmarking --pair caches --model sd15
    python -m benchmarking --commits main HEAD                   # the step of two commits, each with its own files
    python -m benchmarking --profile full --base FOLDER --model sdxl --device cuda
    python -m benchmarking --table benchmarks/results/*.json     # print results as the rows of docs/performance.md

The pairs are in benchmarking/variants.py; docs/performance.md describes the protocol.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from sushi_research import models

# The question of each pair. benchmarking/variants.py builds A and B, but importing it takes too long for --help.
QUESTIONS = {
    "caches": "how much time do the caches save per step? A decodes and encodes its images and captions, B reads the caches",
    "adapter": "what does the adapter's dtype cost? A is fp32 with peft's casts in every layer, B is our bf16 working copy",
    "same": "how precise are timings on this machine? A and B are the same variant, so the interval should contain 1",
    "optimizer": "what does one flat tensor save the optimizer? A gives it single tensors, as to those that are not elementwise",
    "recorded": "what does a recording save? A is launched by Python, B is a CUDA graph (a CPU has none: batches are only copied)",
    "feed_forward": "what does recomputing the feed-forward layers cost? A recomputes them, B keeps all activations",
    "checkpointing": "what does recomputing all blocks cost? A recomputes them, B keeps all activations",
}
RESULTS = "benchmarks/results"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parses the command line before torch is imported, so that --help and a mistyped option answer at once."""
    parser = argparse.ArgumentParser(
        description="Times two variants of a training step against each other.",
        epilog="pairs: " + "; ".join(f"{name}: {question}" for name, question in QUESTIONS.items()) + ".",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--pair", action="append", choices=QUESTIONS, help="pair to time; repeatable; default: caches and adapter")
    add("--commits", nargs=2, metavar=("A", "B"), help="time the steps of two commits instead of a pair")
    add("--model", action="append", choices=tuple(models.ARCHITECTURES), help="architecture; repeatable; default: sdxl")
    profile_help = "tiny: a temporary base with random weights; full: --base, at its default resolution"
    add("--profile", choices=("tiny", "full"), default="tiny", help=profile_help)
    add("--base", metavar="FOLDER", help="a base in the diffusers format, for --profile full")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if available")
    add("--batch-size", type=int, default=1, help="samples per step (default: 1)")
    add("--rounds", type=int, default=15, help="rounds that count: an odd number, at least 9 (default: 15)")
    add("--warmup", type=int, default=2, help="rounds before these that do not count (default: 2)")
    add(
        "--block-seconds", type=float, default=0.15, help="length of a block, of which a round has four (default: 0.15)"
    )
    add(
        "--limit",
        type=float,
        default=120.0,
        help="maximum seconds for all rounds together (default: 120)",
    )
    pressure_help = "skip a round if tasks waited for a CPU for more than this share of it (default: 0.5)"
    add("--max-pressure", type=float, default=0.5, help=pressure_help)
    add("--results", metavar="FOLDER", default=RESULTS, help=f"folder for the JSON files (default: {RESULTS})")
    add("--table", nargs="+", metavar="FILE", help="only print these results as a Markdown table")
    found = parser.parse_args(arguments)
    if found.rounds < 9 or found.rounds % 2 == 0:
        parser.error("--rounds must be an odd number, at least 9: the interval is computed for those only")
    bounds = {"batch_size": (1, 4096), "rounds": (9, 10_001), "warmup": (0, 10_000)}
    # Linux adds to the pressure every two seconds, so that of a short round can be above 1.
    bounds |= {"block_seconds": (0, 3600), "limit": (0, 1_000_000), "max_pressure": (0, 1000)}
    for name, (least, most) in bounds.items():
        if not least <= getattr(found, name) <= most:  # NaN is within no bounds
            parser.error(f"--{name.replace('_', '-')} must be at least {least} and at most {most}")
    if (found.profile == "full") != (found.base is not None):
        parser.error("--profile full and --base FOLDER go together: give both or neither")
    if found.commits and found.pair:
        parser.error("--commits and --pair are two measurements: give one of them")
    found.pair, found.model = found.pair or ["caches", "adapter"], found.model or ["sdxl"]
    if found.base is not None and len(found.model) > 1:
        parser.error("--base has one architecture: give --model once")
    return found


if __name__ == "__main__":
    # Before the imports below: on a shared machine a thread pool is slower than one thread, and its times vary widely.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    ARGUMENTS = parse(sys.argv[1:])

import tempfile
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from benchmarking import commits, paired_timing
from benchmarking.measured_code import code_state, load_script, write_result
from benchmarking.results import PARITY_STEPS, circumstances, parity, settings, timings
from benchmarking.variants import PAIRS, Bench, Step, make_unet
from sushi_research import randomness
from sushi_research.caches.caches import open_caches, open_hash_cache, open_remembered
from sushi_research.caches.inputs import Inputs, fill_caches
from sushi_research.config.process import run_main
from sushi_research.data.training_data import read_data
from sushi_research.errors import UserError
from sushi_research.models.loading import find_base
from sushi_research.planning import op_counts
from sushi_research.precision import resolve_precision
from sushi_research.progress import progress
from sushi_research.runs.job import Job
from sushi_research.training import run
from sushi_research.training.sampler import Sampler
from sushi_research.user_files import parse_json, read_regular
from testing.tiny_base import save_tiny_base

IMAGES = 8
assert list(PAIRS) == list(QUESTIONS)


def main(arguments: argparse.Namespace) -> int:
    """Times the pairs for each architecture, prints the results, and writes one file per result."""
    if arguments.table:
        print(paired_timing.TABLE_HEAD)
        for file in map(Path, arguments.table):
            print(paired_timing.table_row(parse_json(read_regular(file), str(file)), file.name))
        return 0
    run.quiet_libraries()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch finds no CUDA device: omit the option, or install torch for CUDA.")
    for architecture in arguments.model if arguments.commits else ():
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            report(arguments, run_commits(arguments, architecture, Path(folder)))
    for architecture in () if arguments.commits else arguments.model:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder, ExitStack() as finish:
            bench = prepare(arguments, architecture, Path(folder), finish)
            for name in arguments.pair:
                report(arguments, run_pair(arguments, bench, name))
    return 0


def report(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    """Writes a result to a file of its own and prints it."""
    name = f"{result['pair']}_{result['model']}_{result['profile']}"
    path = write_result(Path(arguments.results), name, result)
    print(f"{paired_timing.sentence(result)}\n  written to {path}", flush=True)


def prepare(arguments: argparse.Namespace, architecture: str, folder: Path, finish: ExitStack) -> Bench:
    """Makes the base, eight images with captions, and complete caches of them in `folder`."""
    model, config_class = models.load(architecture), models.ARCHITECTURES[architecture].config_class()
    data_section = config_class.model_fields["data"].annotation
    resolution = 128 if arguments.profile == "tiny" else data_section.model_fields["resolution"].default
    base = arguments.base or str(save_tiny_base(folder / "base", architecture, sample_size=resolution // 8))
    make_images(folder / "images", resolution * 3 // 2)
    config = config_class(
        model={"base": base},
        data={"path": str(folder / "images"), "resolution": resolution},
        cache={"folder": str(folder / "cache")},
        # The same optimizer for every variant; it needs no extra library.
        optimizer={"name": "adamw"},
        train={"steps": 1, "batch_size": arguments.batch_size},
    )
    accelerator = Accelerator(mixed_precision="no", cpu=arguments.device == "cpu" or not torch.cuda.is_available())
    hash_cache = open_hash_cache(config)
    job = Job(config, model, accelerator, resolve_precision("auto", None, accelerator.device).name)
    found = find_base(config, model)
    data = read_data(job, open_remembered(config))
    items = data.items
    caches = open_caches(job, found, hash_cache)
    fill_caches(job, Inputs(config, found, data, caches, hash_cache))
    return Bench(
        job=job,
        script=load_script(architecture),
        base=found,
        items=items,
        sampler=Sampler(items.bucket_ids, arguments.batch_size, config.train.seed),
        caches=caches,
        finish=finish,
    )


def make_images(folder: Path, side: int) -> None:
    """Writes square JPEG files with soft shapes and grain, which take about as long to decode as photographs."""
    folder.mkdir()
    for number in range(IMAGES):
        rng = randomness.key(0, "benchmark-picture", number)
        shapes = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(
            (side, side), Image.Resampling.BICUBIC
        )
        grain = rng.normal(0, 6, (side, side, 3))
        pixels = (np.asarray(shapes) + grain).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=92)
        (folder / f"{number}.txt").write_text(f"picture number {number}, soft shapes of many colours\n")


def run_pair(arguments: argparse.Namespace, bench: Bench, name: str) -> dict[str, Any]:
    """Builds both variants, compares their losses, times them alternately, counts ops; returns the result file's content."""
    pair = PAIRS[name]
    if pair.precision != "auto":
        bench = replace(bench, job=replace(bench.job, precision=pair.precision))
    cuda = bench.device.type == "cuda"
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    steps, unets, held, losses = {}, {}, {}, {}
    for variant, build in {"a": pair.build_a, "b": pair.build_b}.items():
        before = torch.cuda.memory_allocated() if cuda else 0
        unets[variant] = make_unet(bench)
        steps[variant] = build(bench, unets[variant])
        losses[variant] = [steps[variant](index).item() for index in range(PARITY_STEPS)]
        held[variant] = torch.cuda.memory_allocated() - before if cuda else 0
    if not np.isfinite([losses["a"], losses["b"]]).all():
        raise UserError(f"the pair {name} gives a loss that is not finite, so it is not timed.")
    rounds, calls, index = time_both(arguments, f"{bench.model.NAME} {name}", steps["a"], steps["b"], synchronize)
    counts, memory = {}, {}
    for variant, step in steps.items():
        if cuda:
            memory[variant] = held[variant] + memory_of_a_step(step, index)
        counts[variant] = asdict(op_counts.count(lambda step=step: step(index + 1), unets[variant].parameters()))
    return {
        "pair": name,
        "question": QUESTIONS[name],
        "variants": {"a": pair.a, "b": pair.b},
        "model": bench.model.NAME,
        "profile": arguments.profile,
        **timings(rounds),
        "parity": parity(losses["a"], losses["b"]),
        "counts": counts,
        "memory": memory or None,
        "config": {
            "base": bench.config.model.base if arguments.base else "testing.tiny_base, seed 0",
            "resolution": bench.config.data.resolution,
            "batch_size": bench.config.train.batch_size,
            "precision": bench.job.precision,
            "lora": {"targets": bench.config.lora.targets, "rank": bench.config.lora.rank},
            "optimizer": bench.config.optimizer.name,
            **settings(arguments, calls),
        },
        "code": code_state(),
        **circumstances(str(bench.device), rounds),
    }


def run_commits(arguments: argparse.Namespace, architecture: str, folder: Path) -> dict[str, Any]:
    """`run_pair` for the steps of two commits. Their processes take turns: while one works, the other waits to be asked."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if arguments.device == "auto" else arguments.device
    words = ["--model", architecture, "--device", device, "--batch-size", str(arguments.batch_size)]
    words += [
        "--profile",
        arguments.profile,
        *(["--base", str(Path(arguments.base).resolve())] if arguments.base else []),
    ]
    with commits.workers(arguments.commits, words, folder) as (a, b):
        losses = [[worker(index) for index in range(PARITY_STEPS)] for worker in (a, b)]
        clocks = paired_timing.Clocks(cpu=lambda: a.cpu_seconds + b.cpu_seconds)
        title = f"{architecture}, two commits"
        rounds, calls, index = time_both(arguments, title, a, b, lambda: None, clocks)
        counts = {"a": a.counts(index), "b": b.counts(index)}
    names = [commits.full_name(commit) for commit in arguments.commits]
    return {
        "pair": "commits",
        "question": "does a step of commit A take longer than one of commit B?",
        "variants": {letter: f"of {commit[:10]}" for letter, commit in zip("ab", names, strict=True)},
        "commits": names,
        "model": architecture,
        "profile": arguments.profile,
        **timings(rounds),
        "parity": parity(*losses),
        "counts": counts,
        "memory": None,
        "config": {
            "base": arguments.base or "testing.tiny_base, seed 0",
            "batch_size": arguments.batch_size,
            "precision": a.facts["precision"],
            **settings(arguments, calls),
        },
        "code": code_state(),
        **circumstances(device, rounds),
    }


def time_both(
    arguments: argparse.Namespace,
    title: str,
    a: paired_timing.Step,
    b: paired_timing.Step,
    synchronize: Callable[[], None],
    clocks: paired_timing.Clocks = paired_timing.Clocks(),  # noqa: B008  frozen
) -> tuple[list[paired_timing.Round], int, int]:
    """(rounds, calls in a block, the first index that is free) of two steps. UserError if too few rounds could be kept."""
    calls = paired_timing.calls_per_block(a, b, arguments.block_seconds, first=PARITY_STEPS, synchronize=synchronize)
    first = PARITY_STEPS + 2
    rounds: list[paired_timing.Round] = []
    with progress(total=arguments.rounds, description=title, unit="round") as bar:
        for done in paired_timing.alternate(
            a,
            b,
            rounds=arguments.rounds,
            warmup=arguments.warmup,
            calls=calls,
            max_pressure=arguments.max_pressure,
            limit=arguments.limit,
            first=first,
            synchronize=synchronize,
            clocks=clocks,
        ):
            rounds.append(done)
            bar.update(done.status == "kept")
    kept = sum(done.status == "kept" for done in rounds)
    if kept < arguments.rounds:
        raise UserError(
            f"only {kept} of {len(rounds)} rounds could be kept within {arguments.limit:g} seconds: run it again when "
            "the machine is less busy, or raise --limit or --max-pressure."
        )
    return rounds, calls, first + 2 * calls * len(rounds)


def memory_of_a_step(step: Step, index: int) -> int:
    """The peak of the bytes that a step allocates on the GPU, beyond those allocated before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(index)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


if __name__ == "__main__":
    run_main(main, ARGUMENTS)
