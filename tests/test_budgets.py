"""Budgets in whole numbers: what a step may cost in ops, dtype copies and saved bytes, and how long a file may be.

They hold on UNets with every module of the real ones, a few channels wide, so counts of ops and copies are those of the real
models; bytes are not. A number that goes up is a regression; one that goes down is a gain, and lowers its budget here.
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
from accelerate import Accelerator

from benchmarking import paired_timing
from benchmarking.measured_code import code_name, write_result
from benchmarking.variants import PAIRS, Bench, as_peft, encode_batch, make_loader, make_unet, with_master_weights
from sushi_research import models
from sushi_research.adapters.lora import resolve_targets
from sushi_research.fast.batch import Batch
from sushi_research.models import loading
from sushi_research.models.diffusers_folder import FolderPart
from sushi_research.models.prediction import Prediction
from sushi_research.planning import op_counts
from sushi_research.planning.op_counts import Counts
from sushi_research.runs.job import Job
from testing.real_configs import NARROW_UNETS

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


# --- A step on the whole structure ---


def narrow_bench(architecture, folder):
    """A bench whose base is a narrow UNet alone, and a batch of one sample for it."""
    from diffusers import UNet2DConditionModel

    settings, device = NARROW_UNETS[architecture], torch.device("cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        UNet2DConditionModel.from_config(settings).save_pretrained(folder / "unet")
    script = benchmark()
    model, config_class = models.load(architecture), models.ARCHITECTURES[architecture].config_class()
    config = config_class(
        model={"base": str(folder)}, data={"path": "none"}, train={"steps": 1}, optimizer={"name": "adamw"}
    )
    bench = Bench(
        job=Job(config, model, Accelerator(cpu=True), "bf16"),
        script=script.load_script(architecture),
        base=loading.Base(
            source=str(folder),
            revision=None,
            vae_source=None,
            architecture=architecture,
            prediction=Prediction(),
            scheduler={},
            force_zeros=False,
            parts={"unet": FolderPart("unet", folder / "unet", None)},
            tokenizers={},
            ignored={},
        ),
        items=[],
        sampler=None,
        caches=None,
        finish=ExitStack(),
    )
    text = {"hidden": torch.ones(1, 77, settings["cross_attention_dim"], dtype=torch.half)}
    if architecture == "sdxl":
        pooled = settings["projection_class_embeddings_input_dim"] - 6 * settings["addition_time_embed_dim"]
        text["pooled"] = torch.ones(1, pooled, dtype=torch.half)
    batch = Batch(
        mean=torch.zeros(1, 4, 8, 8, dtype=torch.half),
        std=torch.ones(1, 4, 8, 8, dtype=torch.half),
        text=text,
        time_ids=torch.tensor([[64.0, 64, 0, 0, 64, 64]]),
        loss_weights=torch.ones(1),
        names=("picture",),
        keys=((0, "picture", 0),),
        seed=0,
        device=device,
        prefetched={},
    )
    return bench, batch


def second_step(build, bench, unet, batch):
    """Counts of the second step; the first makes the optimizer's state."""
    step = build(bench, unet, lambda index: [batch])
    assert step(0).isfinite()
    return op_counts.count(lambda: step(1), unet.parameters())


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def counted(request, tmp_path_factory):
    """(architecture, counts of our step, of the same step on fp32 adapters, and on those that peft itself makes)."""
    from peft import LoraConfig, get_peft_model

    bench, batch = narrow_bench(request.param, tmp_path_factory.mktemp(request.param))
    ours = second_step(with_master_weights, bench, make_unet(bench), batch)
    fp32_adapters = second_step(as_peft, bench, make_unet(bench), batch)
    lora = bench.config.lora
    settings = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=resolve_targets(lora.targets))
    unet = get_peft_model(loading.load_unet(bench.base, torch.bfloat16, bench.device), settings)
    unet.train()
    # as_peft takes the adapter's parameters from the wrapped UNet too: same layers, and fp32 by peft's own default.
    by_peft = second_step(as_peft, bench, unet, batch)
    return request.param, ours, fp32_adapters, by_peft


# Of one whole step with its optimizer (AdamW, foreach), attention adapters of rank 16, one sample of 8 x 8 latents.
# As measured with torch 2.13, diffusers 0.42 and peft 0.21 on a CPU: our step may never cost more.
BUDGETS = {"sd15": Counts(2_632, 6, 553_184), "sdxl": Counts(9_070, 8, 1_381_108)}


@pytest.mark.slow
def test_our_step_keeps_to_its_budget(counted):
    architecture, ours, _, _ = counted
    budget = BUDGETS[architecture]
    assert ours.dtype_copies <= budget.dtype_copies
    assert ours.ops <= budget.ops
    assert ours.saved_bytes <= budget.saved_bytes


def test_fp32_adapters_copy_in_every_layer(counted):
    architecture, ours, fp32_adapters, _ = counted
    modules = {"sd15": 128, "sdxl": 560}[architecture]
    # Five in a layer: the input and back the result; backward, the gradients of the result, the base's output and the input.
    # Three in a layer whose input needs no gradient, as that of the text does not.
    assert fp32_adapters.dtype_copies > 4 * modules > 50 * ours.dtype_copies
    assert fp32_adapters.ops > 1.15 * ours.ops
    assert fp32_adapters.saved_bytes > 1.7 * ours.saved_bytes


def test_what_the_benchmark_calls_peft_s_way_is_what_peft_does(counted):
    _, _, fp32_adapters, by_peft = counted
    assert fp32_adapters == by_peft


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
    for budget in BUDGETS.values():
        assert all(f"| {number:,} |" in text for number in dataclasses.astuple(budget)[:3])
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
