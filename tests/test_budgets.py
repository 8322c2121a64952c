"""The rule by which a step's ops, dtype copies and saved bytes are counted, the benchmark, and how long a file may be.

What a step of the real models may cost is in the ledger (unit/benchmarking/test_ledger.py).
"""

import dataclasses
import functools
import gc
import importlib.util
import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from benchmarking import paired_timing
from benchmarking.measured_code import code_name, write_result
from benchmarking.variants import PAIRS, encode_batch, make_loader, make_unet
from sushi_research.models import loading
from sushi_research.planning import op_counts
from sushi_research.planning.op_counts import Counts

ROOT = Path(__file__).parents[1]
MAX_LINES = 420


@functools.cache
def benchmark():
    """benchmarking/__main__.py as a module."""
    spec = importlib.util.spec_from_file_location("benchmark", ROOT / "benchmarking/__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- The rule of counting ---


def count(step, parameters=()):
    return op_counts.count(step, parameters)


def test_an_op_computes_or_moves_data():
    x = torch.ones(4, 4)
    assert count(lambda: x + x) == Counts(1, 0, 0)
    assert count(lambda: torch.zeros(3)) == Counts(1, 0, 0)  # fills a buffer
    assert count(lambda: x.t().contiguous()) == Counts(1, 0, 0)  # the copy counts, the view does not
    assert count(lambda: x.add_(1)) == Counts(1, 0, 0)  # returns an alias, but of what it writes to


def test_views_and_allocations_are_no_ops():
    x = torch.ones(4, 4)
    assert count(lambda: (x.view(2, 8), x[1:], x.split(2), x.detach(), x.transpose(0, 1))) == Counts(0, 0, 0)
    assert count(lambda: (torch.empty(3), torch.empty_like(x), x.new_empty(2))) == Counts(0, 0, 0)
    assert count(lambda: torch.ops.aten._unsafe_view(x, [16])) == Counts(0, 0, 0)


def test_a_dtype_copy_does_nothing_but_change_the_dtype():
    x, low = torch.ones(4), torch.zeros(4, dtype=torch.bfloat16)
    assert count(lambda: x.bfloat16()) == Counts(1, 1, 0)
    assert count(lambda: x.float()) == Counts(0, 0, 0)  # nothing to do
    assert count(lambda: low.copy_(x)) == Counts(1, 1, 0)
    assert count(lambda: x.copy_(torch.ops.aten.alias(x))) == Counts(1, 0, 0)
    assert count(lambda: torch._foreach_copy_([low, low], [x, x])) == Counts(1, 1, 0)
    assert count(lambda: x + low) == Counts(1, 0, 0)  # converted within the kernel


def test_saved_bytes_are_whole_storages_once_and_no_parameters():
    weight = torch.ones(4, 4, requires_grad=True)
    x = torch.ones(8, 4, requires_grad=True)

    def step():
        hidden = x @ weight  # saves both
        (hidden[:4] * hidden[4:]).sum().backward()  # saves two parts of one storage

    assert count(step).saved_bytes == x.nbytes + weight.nbytes + 8 * 4 * 4
    assert count(step, [weight]).saved_bytes == x.nbytes + 8 * 4 * 4
    assert count(step, [weight[1:].detach()]).saved_bytes == x.nbytes + 8 * 4 * 4  # a view of it stands for it


def test_backward_and_optimizer_are_seen():
    weight = torch.ones(4, 4, requires_grad=True)
    assert count(lambda: (weight * weight).sum()).ops == 2
    forward_and_backward = count(lambda: (weight * weight).sum().backward()).ops
    assert forward_and_backward > 4  # at least: a one to start from, two products, their sum
    optimizer = torch.optim.AdamW([weight], foreach=True)
    optimizer.step()
    assert count(optimizer.step).ops > 5


# --- The benchmark ---


def arguments(*options):
    return benchmark().parse(list(options))


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def bench(request, tmp_path_factory):
    with ExitStack() as finish:
        settings = arguments("--batch-size", "2", "--device", "cpu")
        yield benchmark().prepare(settings, request.param, tmp_path_factory.mktemp(request.param), finish)


@pytest.mark.slow
def test_without_caches_the_batches_are_the_same_bit_for_bit(bench):
    train = bench.config.train.model_copy(update={"batch_size": 1})
    job = dataclasses.replace(bench.job, config=bench.config.model_copy(update={"train": train}))
    bench = dataclasses.replace(bench, job=job)
    vae = loading.load_vae(bench.base, bench.caches.vae_dtype, bench.device)
    text = bench.model.load_text(bench.base, bench.device)
    loader = make_loader(bench, ahead=())
    read = list(loader.step(1))
    loader.close()
    samples = bench.sampler.share(1, 1, 0, 1)
    assert len(read) == len(samples) == 2
    for batch, alone in zip(read, samples, strict=True):
        made = encode_batch(bench, vae, text, alone)
        assert (made.names, made.keys, made.seed) == (batch.names, batch.keys, batch.seed)
        assert torch.equal(made.mean, batch.mean) and made.mean.dtype == batch.mean.dtype
        assert torch.equal(made.std, batch.std) and torch.equal(made.time_ids, batch.time_ids)
        assert made.text.keys() == batch.text.keys()
        assert all(torch.equal(made.text[name], batch.text[name]) for name in batch.text)
        assert torch.equal(made.normal("noise"), batch.normal("noise"))


# That SDXL's batches are the same without caches is tested above.
TRAINED = [*(("sd15", name) for name in PAIRS), ("sdxl", "adapter")]


@pytest.mark.parametrize(("bench", "name"), TRAINED, indirect=["bench"])
@pytest.mark.slow
def test_the_variants_of_a_pair_train_alike(bench, name):
    pair = PAIRS[name]
    if pair.precision != "auto":
        bench = dataclasses.replace(bench, job=dataclasses.replace(bench.job, precision=pair.precision))
    losses = []
    for build in (pair.build_a, pair.build_b):
        step = build(bench, make_unet(bench))
        losses.append([step(index).item() for index in range(3)])
    assert len(set(losses[0])) == 3
    # Two pictures at once move the last bits of the VAE, and bf16 adapters round where fp32 ones do not (8 bits: 0.4 %).
    # Flat or single, recomputed or kept, replayed or not: the same numbers.
    tolerance = {"caches": 1e-4, "adapter": 1e-2}.get(name, 0.0)
    assert losses[0] == pytest.approx(losses[1], rel=tolerance, abs=0)


@pytest.mark.slow
def test_a_result_file_holds_everything(tmp_path, capsys, monkeypatch):
    # Garbage is collected before each of the 80 blocks, which takes half of this test's time where many tests have run.
    monkeypatch.setattr(gc, "collect", lambda: 0)
    options = ["--pair", "caches", "--pair", "same", "--model", "sd15", "--device", "cpu", "--rounds", "9"]
    settings = arguments(
        *options, "--warmup", "1", "--block-seconds", "0", "--max-pressure", "9", "--results", str(tmp_path)
    )
    assert benchmark().main(settings) == 0
    files = sorted(tmp_path.iterdir())
    assert [file.name.split("_")[:3] for file in files] == [["caches", "sd15", "tiny"], ["same", "sd15", "tiny"]]
    printed = capsys.readouterr().out
    assert "sd15: a step without caches takes" in printed and all(str(file) in printed for file in files)
    result = json.loads(files[0].read_text())
    assert [done["status"] for done in result["rounds"]] == ["warm-up"] + ["kept"] * 9
    assert result["time"]["rounds"] == result["cpu_time"]["rounds"] == 9
    ratios = sorted(done["a"] / done["b"] for done in result["rounds"][1:])
    assert (result["time"]["low"], result["time"]["ratio"], result["time"]["high"]) == (ratios[1], ratios[4], ratios[7])
    assert result["parity"] == {"steps": 4, "largest_relative_difference": 0.0}
    # Encoding is work that only A does; both train the same UNet.
    assert result["counts"]["a"]["ops"] > result["counts"]["b"]["ops"]
    assert result["counts"]["a"]["saved_bytes"] == result["counts"]["b"]["saved_bytes"]
    assert result["code"].keys() == {"version", "commit", "dirty", "hash"} and result["machine"]["threads"] == 1
    equal = json.loads(files[1].read_text())
    assert equal["counts"]["a"] == equal["counts"]["b"] and equal["parity"]["largest_relative_difference"] == 0.0
    # A second result of the same commit has a name of its own.
    before = files[0].read_bytes()
    name = files[0].stem.removesuffix(f"_{code_name(result['code'])}")
    again = write_result(tmp_path, name, result)
    assert again.name == f"{files[0].stem}_2.json" and files[0].read_bytes() == before
    benchmark().main(arguments("--table", *map(str, files)))
    assert capsys.readouterr().out.count("\n") == 4


MISTAKES = [
    (["--rounds", "7"], "--rounds must be an odd number, at least 9"),
    (["--rounds", "10"], "--rounds must be an odd number, at least 9"),
    (["--profile", "full"], "--profile full and --base FOLDER go together"),
    (["--base", "x"], "--profile full and --base FOLDER go together"),
    (["--profile", "full", "--base", "x", "--model", "sd15", "--model", "sdxl"], "give --model once"),
    (["--batch-size", "0"], "--batch-size must be at least 1"),
    (["--pairs", "caches"], "unrecognized arguments"),
    (["--round", "9"], "unrecognized arguments"),
    (["--pair", "cache"], "invalid choice: 'cache'"),
]


def test_a_mistaken_command_line_is_refused(capsys):
    for options, message in MISTAKES:
        with pytest.raises(SystemExit) as exit:
            arguments(*options)
            pytest.fail(f"{options} were accepted")
        assert (exit.value.code, message in capsys.readouterr().err) == (2, True), options


def test_without_options_both_questions_are_asked():
    found = arguments()
    assert (found.pair, found.model, found.rounds) == (["caches", "adapter"], ["sdxl"], 15)
    assert list(benchmark().QUESTIONS) == list(PAIRS)


def test_help_does_not_wait_for_torch():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['benchmarking', '--help']\n"
        "try: runpy.run_module('benchmarking', run_name='__main__')\n"
        "except SystemExit: print(sorted({'torch', 'diffusers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--block-seconds" in done.stdout and done.stdout.endswith("\n[]\n")


# --- The repository ---


def test_the_numbers_in_the_docs_are_those_measured():
    text = (ROOT / "docs/performance.md").read_text()
    rows = [line for line in text.splitlines() if line.endswith(".json` |")]
    assert rows
    for row in rows:
        file = ROOT / "benchmarks/results" / row.split("`")[-2]
        assert row == paired_timing.table_row(json.loads(file.read_text()), file.name)


def test_no_file_is_too_long_to_read():
    files = [*ROOT.glob("sushi_research/**/*.py"), *ROOT.glob("scripts/*.py")]
    assert len(files) > 30
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in files}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}
