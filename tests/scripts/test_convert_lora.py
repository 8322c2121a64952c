"""What convert_lora.py writes changes each weight as it should, also where other programs do not, and nonsense writes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from cases import case
from PIL import Image
from safetensors.torch import load_file, save_file
from script_runs import script
from single_files import narrow_base, write_single_file

from sushi_research.adapters import parts
from sushi_research.adapters.entries import Difference, Hadamard, Kronecker, LowRank, changed_weight, delta
from sushi_research.adapters.formats.writing import write_entries
from sushi_research.adapters.matching import layers_of
from sushi_research.adapters.tools import history, verifying
from sushi_research.adapters.tools.base_weights import Weights, open_base
from sushi_research.adapters.tools.located import each_entry, open_adapter
from sushi_research.adapters.trained_images import trained_on
from sushi_research.config.process import run_main
from sushi_research.models.header import read_header
from sushi_research.models.loading import load_unet, resolve_base

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def opened(bases):
    """The tiny base of each architecture."""
    return {name: open_base(str(folder)) for name, folder in bases.items()}


@pytest.fixture
def convert(tmp_path, monkeypatch, capsys):
    """Runs the script in an empty folder: (its exit status, what it prints)."""
    monkeypatch.chdir(tmp_path)
    module = script("convert_lora")

    def run(*words: object) -> tuple[int, str]:
        capsys.readouterr()
        status = 0
        try:
            run_main(module.main, module.parse([str(word) for word in words]))
        except SystemExit as ended:
            status = ended.code
        found = capsys.readouterr()
        return status, found.out + found.err

    return run


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(shape, seed, rank=3, scale=0.5):
    """A low-rank pair for a layer of this shape."""
    ones = (1,) * (len(shape) - 2)
    return LowRank("x", random(rank, *shape[1:], seed=seed), random(shape[0], rank, *ones, seed=seed + 1), scale)


def hadamard(shape, seed):
    out, into = shape[0], torch.Size(shape[1:]).numel()
    sizes = ((out, 2), (2, into)) * 2
    return Hadamard("x", *(random(*size, seed=seed + place) for place, size in enumerate(sizes)), scale=0.5)


def kronecker(shape, seed):
    if shape[0] % 2 or shape[1] % 2:
        return pair(shape, seed)
    return Kronecker(
        "x", w1=random(2, 2, seed=seed), w2=random(shape[0] // 2, shape[1] // 2, *shape[2:], seed=seed + 1)
    )


def full(shape, seed):
    """With a change of the bias where every layer has one."""
    bias = random(shape[0], seed=seed + 1) if len(shape) == 4 else None
    return Difference("x", random(*shape, seed=seed), bias)


def dora(axis):
    """Pairs with a magnitude of each output (0) or input (1)."""

    def make(shape, seed):
        size = [each if place == axis else 1 for place, each in enumerate(shape)]
        entry = pair(shape, seed)
        return LowRank("x", entry.down, entry.up, 0.5, magnitude=random(*size, seed=seed + 2).abs() + 0.5)

    return make


def write(path, base, make, *, dtype=torch.float32, every=1, metadata=None):
    """Writes an adapter with `make(shape, seed)` for each `every`th linear or convolutional layer of a base."""
    found = [
        (name, path, layer.shape)
        for name, each in base.components.items()
        for path, layer in layers_of(each.model).items()
        if len(layer.shape) > 1
    ]
    matches: dict = {}
    for number, (component, layer, shape) in enumerate(found[::every]):
        matches.setdefault(component, {})[layer] = make(shape, 1000 * number + len(str(path)))
    file = {"layout": "kohya", "dtype": dtype, "metadata": metadata or {}, "layers_per_block": base.layers_per_block}
    write_entries(Path(path), base.architecture, matches, **file)


def deltas(path, base):
    """(component, layer) -> the change of the weight that a file makes, fp64; of a DoRA too."""
    located, found = open_adapter(path, base), {}
    with Weights(base) as weights:
        for component, layer, entry in each_entry(located.matches):
            if getattr(entry, "magnitude", None) is None:
                found[component, layer] = delta(entry, located.shapes[component][layer]).double()
            else:
                weight = weights.get(component, f"{layer}.weight")
                found[component, layer] = (changed_weight(entry, weight) - weight).double()
    return found


def added(*parts):
    """The sum of changes, each times a number."""
    keys = {key for changes, _ in parts for key in changes}
    return {key: sum(changes[key] * weight for changes, weight in parts if key in changes) for key in keys}


def norm(changes):
    return sum(float(each.square().sum()) for each in changes.values()) ** 0.5


def far(found, expected):
    """The norm of all differences over that of all changes, and the same for the worst layer."""
    assert found.keys() == expected.keys()
    missed = added((found, 1), (expected, -1))
    return norm(missed) / norm(expected), max(float(missed[key].norm() / expected[key].norm()) for key in expected)


def refused(run, words, *, says):
    """Runs a command that must end with one sentence, status 2 and nothing written."""
    before = sorted(Path().rglob("*"))
    status, said = run(*words)
    assert status == 2 and said.startswith("error: ") and said.count("\n") == 1 and says in said, said
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    "scale, dtype, most", [(0.5, torch.float16, 0.0), (0.3, torch.float16, 2**-11), (0.3, torch.float32, 2**-22)]
)
def test_there_and_back_is_exact_or_says_the_error(convert, opened, bases, architecture, scale, dtype, most):
    base, options = opened[architecture], ("--base", bases[architecture])
    write("a.safetensors", base, lambda shape, seed: pair(shape, seed, scale=scale), dtype=dtype, every=5)
    there = convert("convert", "a.safetensors", "--to", "peft", "--output", "b.safetensors", *options)
    back = convert("convert", "b.safetensors", "--output", "c.safetensors", *options)
    assert (there[0], back[0]) == (0, 0), there[1] + back[1]
    assert {key.rpartition(".lora_")[2] for key in load_file("b.safetensors")} == {"A.weight", "B.weight"}
    assert far(*(deltas(f"{path}.safetensors", base) for path in "ca"))[1] <= most
    assert ("none: all" in there[1]) == (most == 0) and "none: all" in back[1]
    assert {tensor.dtype for key, tensor in load_file("c.safetensors").items() if "alpha" not in key} == {dtype}


def test_other_kinds_stay_exact_in_kohyas_layout_and_need_a_rank_in_pefts(convert, opened, bases):
    base, options = opened["sd15"], ("--base", bases["sd15"])
    for name, make in (("loha", hadamard), ("lokr", kronecker), ("full", full)):
        with case(name):
            write(f"{name}.safetensors", base, make, every=9)
            source = deltas(f"{name}.safetensors", base)
            status, said = convert("convert", f"{name}.safetensors", "--output", f"{name}_2.safetensors", *options)
            assert status == 0 and "none: all" in said and far(deltas(f"{name}_2.safetensors", base), source)[1] == 0
            peft = ("convert", f"{name}.safetensors", "--to", "peft", *options, "--output")
            refused(convert, (*peft, "3.safetensors"), says="--rank")
            status, said = convert(*peft, f"{name}_4.safetensors", "--rank", 400)
            assert status == 0 and far(deltas(f"{name}_4.safetensors", base), source)[1] < 1e-5
            status, said = convert(*peft, f"{name}_5.safetensors", "--rank", 2)
            missed, worst = far(deltas(f"{name}_5.safetensors", base), source)
            assert status == 0 and f"{missed:.3g} of the norm of the change (largest in a layer: {worst:.3g}" in said
    biases = [entry.bias for _, _, entry in each_entry(open_adapter("full_5.safetensors", base).matches)]
    assert any(bias is not None for bias in biases)


def test_a_dora_becomes_pairs_with_its_base_and_keeps_its_magnitude_without(convert, opened, bases):
    base = opened["sd15"]
    for axis in (0, 1):
        with case(axis):
            write(f"a{axis}.safetensors", base, dora(axis), every=9)
            source = deltas(f"a{axis}.safetensors", base)
            words = ("convert", f"a{axis}.safetensors", "--output")
            options = ("--base", bases["sd15"])
            status, said = convert(*words, f"c{axis}.safetensors", *options)
            assert status == 0 and "none: all" in said, said
            assert far(deltas(f"c{axis}.safetensors", base), source)[1] == 0
            status, said = convert(*words, f"d{axis}.safetensors", *options, "--rank", 400, "--dtype", "fp32")
            assert status == 0 and far(deltas(f"d{axis}.safetensors", base), source)[1] < 1e-5
            assert not any("dora" in key for key in load_file(f"d{axis}.safetensors"))


def test_a_sum_is_that_of_the_changes_and_its_scale_is_right(convert, opened, bases, architecture):
    """kohya's merge adds the matrices (74 % off) and, where it concatenates them, keeps the alpha at the doubled rank."""
    base, options = opened[architecture], ("--base", bases[architecture])
    write("a.safetensors", base, pair, every=3)
    write("bb.safetensors", base, lambda shape, seed: pair(shape, seed, rank=2, scale=2.0), every=2)
    a, b = deltas("a.safetensors", base), deltas("bb.safetensors", base)
    words = ("merge", "a.safetensors", "bb.safetensors", *options, "--output")
    for name, weights, expected in (
        ("c", (), added((a, 1), (b, 1))),
        ("d", ("--weights", 0.5, -0.25), added((a, 0.5), (b, -0.25))),
    ):
        with case(name):
            status, said = convert(*words, f"{name}.safetensors", *weights)
            assert status == 0 and far(deltas(f"{name}.safetensors", base), expected)[1] < 1e-6, said
            assert not any(key.endswith("alpha") for key in load_file(f"{name}.safetensors"))
    ranks = {entry.rank for *_, entry in each_entry(open_adapter("c.safetensors", base).matches)}
    assert ranks == {2, 3, 5}
    status, said = convert(*words, "e.safetensors", "--rank", 4)
    missed, worst = far(deltas("e.safetensors", base), added((a, 1), (b, 1)))
    assert status == 0 and f"{missed:.3g} of the norm" in said and worst < 0.5
    best = max(
        float(torch.linalg.svdvals(each.flatten(1))[4:].norm() / each.norm()) for each in added((a, 1), (b, 1)).values()
    )
    assert worst == pytest.approx(best, rel=1e-3)


def test_merging_equal_scales_keeps_the_bits_and_the_other_kinds_need_a_rank(convert, opened, bases):
    base, options = opened["sd15"], ("--base", bases["sd15"])
    write("a.safetensors", base, pair, dtype=torch.float16, every=9)
    write("bb.safetensors", base, pair, dtype=torch.float16, every=9)
    status, said = convert("merge", "a.safetensors", "bb.safetensors", *options, "--output", "c.safetensors")
    assert status == 0 and "none: all" in said
    alphas = {tensor.item() for key, tensor in load_file("c.safetensors").items() if key.endswith("alpha")}
    assert alphas == {3.0}  # 0.5 x the rank 6
    write("loha.safetensors", base, hadamard, every=9)
    words = ("merge", "a.safetensors", "loha.safetensors", *options, "--output")
    refused(convert, (*words, "d.safetensors"), says="give a rank (--rank)")
    status, said = convert(*words, "e.safetensors", "--rank", 400, "--dtype", "fp32")
    expected = added((deltas("a.safetensors", base), 1), (deltas("loha.safetensors", base), 1))
    assert status == 0 and far(deltas("e.safetensors", base), expected)[1] < 1e-5
    for name in ("f", "gg"):
        write(f"{name}.safetensors", base, full, every=9)
    status, said = convert("merge", "f.safetensors", "gg.safetensors", *options, "--output", "h.safetensors")
    expected = added((deltas("f.safetensors", base), 1), (deltas("gg.safetensors", base), 1))
    assert status == 0 and far(deltas("h.safetensors", base), expected)[1] < 1e-6


def parameters(base):
    """(component, parameter) -> value, fp64."""
    with Weights(base) as weights:
        return {
            (name, parameter): weights.get(name, parameter).double()
            for name, each in base.components.items()
            for parameter in each.places
        }


def assert_merged(before, after, changes, weight, dtype):
    """That every weight is the one before plus `weight` times its change, rounded once, and the others are as they were."""
    assert before.keys() == after.keys()
    for (component, parameter), value in before.items():
        change = changes.get((component, parameter.removesuffix(".weight")))
        if change is None or not parameter.endswith(".weight"):
            assert torch.equal(after[component, parameter], value), parameter
        else:
            expected = value + weight * change.reshape(value.shape)
            torch.testing.assert_close(after[component, parameter], expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


def in_shards(folder):
    """The base in a folder with its UNet in two shards, and weights of other programs next to them; the folder."""
    unet = folder / "unet"
    tensors = load_file(unet / "diffusion_pytorch_model.safetensors")
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    (unet / "diffusion_pytorch_model.bin").write_bytes(b"old weights")
    names = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    places = {key: names[number % 2] for number, key in enumerate(sorted(tensors))}
    for name in names:
        save_file({key: tensors[key] for key, place in places.items() if place == name}, unet / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_a_base_in_a_folder_gets_the_change_times_the_weight_once(convert, opened, bases):
    """kohya's merge applies the ratio twice, so 0.5 becomes 0.25."""
    base = opened["sd15"]
    sharded = in_shards(shutil.copytree(bases["sd15"], Path("sharded")))
    for name, make, folder in (("a", pair, bases["sd15"]), ("b", dora(1), sharded), ("c", hadamard, bases["sd15"])):
        with case(name):
            write(f"{name}.safetensors", base, make, every=7)
            words = ("merge", f"{name}.safetensors", "--weights", 0.5, "--into", folder, "--output", f"merged_{name}")
            status, said = convert(*words)
            assert status == 0, said
            merged = open_base(f"merged_{name}")
            assert_merged(parameters(base), parameters(merged), deltas(f"{name}.safetensors", base), 0.5, torch.float32)
    for name in "abc":
        resolve_base(f"merged_{name}").require_loadable()
    assert not any(path.suffix == ".bin" for path in Path("merged_b").rglob("*"))
    assert (Path("merged_a/vae/diffusion_pytorch_model.safetensors").read_bytes()) == (
        bases["sd15"] / "vae/diffusion_pytorch_model.safetensors"
    ).read_bytes()
    [made] = history.steps_of(read_header(Path("merged_a/unet/diffusion_pytorch_model.safetensors")))
    assert made["from"][1]["name"] == "a.safetensors" and made["settings"] == {"weights": [0.5]}
    refused(
        convert,
        ("merge", "a.safetensors", "--into", bases["sd15"], "--output", "x.safetensors"),
        says="a folder is written",
    )


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A single file of each architecture, fp16, with all of a published file's tensors, and the folder it is made from."""
    made = {}
    for name in ("sd15", "sdxl"):
        folder = narrow_base(tmp_path_factory.mktemp("narrow") / name, name)
        made[name] = write_single_file(folder, folder.parent / f"{name}.safetensors", name), folder
    return made


def test_a_single_file_keeps_its_layout(convert, single, architecture):
    file, folder = single[architecture]
    base = open_base(str(file))
    write("a.safetensors", base, lambda shape, seed: pair(shape, seed, scale=0.01), every=7)
    words = ("merge", "a.safetensors", "--weights", 0.5, "--into", file, "--output", "merged.safetensors")
    status, said = convert(*words)
    assert status == 0, said
    changes = deltas("a.safetensors", base)
    assert_merged(parameters(base), parameters(open_base("merged.safetensors")), changes, 0.5, torch.float16)
    before, after = load_file(file), load_file("merged.safetensors")
    assert [*read_header(Path("merged.safetensors")).tensors] == [*read_header(file).tensors]
    assert all(after[key].dtype == value.dtype for key, value in before.items())
    same = [key for key, value in before.items() if torch.equal(value, after[key])]
    assert any(key.startswith("first_stage_model.") for key in same) and len(same) < len(before)
    load_unet(resolve_base("merged.safetensors", tokenizers=str(folder)), torch.float32, CPU)
    # Back again. The merged weights were rounded to fp16, by up to 2**-12 of weights that are ten times as large as the change.
    status, said = convert("extract", file, "merged.safetensors", "--rank", 3, "--output", "b.safetensors")
    found, expected = deltas("b.safetensors", base), {key: each / 2 for key, each in changes.items()}
    assert status == 0 and far(found, expected)[0] < 0.01, said


def test_a_value_that_the_base_cannot_hold_leaves_nothing(convert, single, opened):
    file, _ = single["sd15"]
    base = open_base(str(file))
    write("a.safetensors", base, lambda shape, seed: pair(shape, seed, scale=1e5), every=50)
    refused(
        convert, ("merge", "a.safetensors", "--into", file, "--output", "b.safetensors"), says="float16 cannot hold"
    )
    status, said = convert("verify", "a.safetensors", "--base", file)
    assert (
        status == 2
        and said.splitlines()[-1].startswith("error: a.safetensors: with it ")
        and "float16 cannot hold" in said
    )
    tensors = load_file(file)
    name = "model.diffusion_model.input_blocks.0.0.weight"
    save_file(tensors | {name: torch.full_like(tensors[name], torch.nan)}, "nan.safetensors")
    write("c.safetensors", base, pair)
    words = ("merge", "c.safetensors", "--into", "nan.safetensors", "--output", "b.safetensors")
    refused(convert, words, says="not finite (NaN or infinity) in")


def test_an_exactly_low_rank_difference_is_found_exactly(convert, opened, bases):
    """kohya's clamp of large values costs 13 % of it."""
    base, folder = opened["sd15"], bases["sd15"]
    write("a.safetensors", base, lambda shape, seed: pair(shape, seed, scale=0.01), every=7)
    assert convert("merge", "a.safetensors", "--into", folder, "--output", "tuned")[0] == 0
    words = ("extract", folder, "tuned", "--output")
    status, said = convert(*words, "b.safetensors", "--rank", 3, "--dtype", "fp32")
    source = deltas("a.safetensors", base)
    # The weights are near 1 and in fp32: their difference has an error of 1e-7.
    assert status == 0 and far(deltas("b.safetensors", base), source)[0] < 1e-4, said
    status, said = convert(*words, "c.safetensors", "--kept", 0.9999, "--conv-rank", 0, "--unet-only")
    found = deltas("c.safetensors", base)
    assert status == 0 and "left out" in said and "convolutions" in said
    assert found.keys() == {key for key, each in source.items() if key[0] == "unet" and each.shape[2:].numel() == 1}
    assert far(found, {key: source[key] for key in found})[0] < 1e-2
    refused(convert, ("extract", folder, folder, "--rank", 2, "--output", "d.safetensors"), says="differ in no layer")


def test_resizing_is_the_best_approximation_for_every_kind_of_layer(convert, opened, bases):
    """kohya's resize gives 1x1 convolutions another rank (43 % of their effect)."""
    base, options = opened["sd15"], ("--base", bases["sd15"])
    write("a.safetensors", base, lambda shape, seed: pair(shape, seed, rank=6), every=2)
    source = deltas("a.safetensors", base)
    shapes = {tuple(each.shape[2:]) for each in source.values()}
    assert shapes == {(), (1, 1), (3, 3)}
    status, said = convert("resize", "a.safetensors", "--rank", 2, "--output", "b.safetensors", *options)
    found = deltas("b.safetensors", base)
    assert status == 0
    for key, whole in source.items():
        with case((key, tuple(whole.shape))):
            lost = torch.linalg.svdvals(whole.flatten(1))[2:].norm()
            assert float((found[key] - whole).norm()) == pytest.approx(float(lost), rel=1e-3, abs=1e-4)
    status, said = convert("resize", "a.safetensors", "--kept", 0.8, "--output", "c.safetensors", *options)
    assert status == 0 and far(deltas("c.safetensors", base), source)[1] ** 2 < 0.2 + 1e-6
    refused(
        convert,
        ("resize", "a.safetensors", "--rank", 6, "--output", "d.safetensors", *options),
        says="the largest is 6",
    )
    for words in (("--rank", 0), ("--kept", 1.5), ("--conv-rank", 2), ()):
        with case(words):
            assert convert("resize", "a.safetensors", "--output", "d.safetensors", *words)[0] == 2


def test_nonsense_is_one_sentence_and_writes_nothing(convert, opened, bases):
    write("a.safetensors", opened["sd15"], pair, every=9)
    write("b.safetensors", opened["sdxl"], pair, every=9)
    save_file({"lora_unet_x.lora_down.weight": torch.ones(2, 4)}, "broken.safetensors")
    new = ("--output", "new.safetensors")
    for words, says in (
        (("merge", "a.safetensors", "b.safetensors", *new, "--base", bases["sd15"]), "not found in this SD1.5 base"),
        (("merge", "a.safetensors", "--into", bases["sdxl"], "--output", "new"), "not found in this SDXL base"),
        (("verify", "b.safetensors", "--base", bases["sd15"]), "not found in this SD1.5 base"),
        (("extract", bases["sd15"], bases["sdxl"], "--rank", 4, *new), "two models of one kind"),
        (("convert", "broken.safetensors", *new), "without the up matrix"),
        (("convert", "nowhere.safetensors", *new), "does not exist"),
        (("convert", "a.safetensors", "--output", "b.safetensors"), "exists already"),
        (("convert", "a.safetensors", "--output", "new.ckpt"), "does not end in .safetensors"),
        (("convert", "a.safetensors", "--output", "nowhere/new.safetensors"), "is not a folder"),
        (("verify", "a.safetensors", "--base", "a.safetensors"), "is a LoRA (adapter) file"),
        (("merge", "a.safetensors", "--weights", 1e-45, *new, "--base", bases["sd15"]), "float32 cannot hold"),
        (("merge", "a.safetensors", "--weights", 1e300, *new, "--base", bases["sd15"]), "give weights nearer to 1"),
    ):
        with case(words):
            refused(convert, words, says=says)


def test_a_file_that_cannot_be_read_again_is_not_left(convert, opened, bases, monkeypatch):
    write("a.safetensors", opened["sd15"], pair, every=9)
    monkeypatch.setattr(parts, "MOST_NUMBERS", max(each.numel() for each in load_file("a.safetensors").values()))
    words = ("merge", "a.safetensors", "a.safetensors", "--output", "new.safetensors", "--base", bases["sd15"])
    refused(convert, words, says="more numbers than an adapter of any layer needs")


def test_without_a_base_the_published_models_are_the_measure(convert):
    query = {
        "sd15": ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", 320),
        "sdxl": ("down_blocks.2.attentions.0.transformer_blocks.5.attn1.to_q", 1280),
    }
    for name, (path, width) in query.items():
        for kind, make in (("lora", pair), ("dora", dora(1))):
            matches = {"unet": {path: make((width, width), 0)}}
            write_entries(Path(f"{kind}_{name}.safetensors"), name, matches, layout="kohya", dtype=None, metadata={})
        status, said = convert(
            "convert", f"lora_{name}.safetensors", "--to", "peft", "--output", f"peft_{name}.safetensors"
        )
        assert status == 0 and "none: all 1 layers" in said, said
        assert f"unet.{path}.lora_A.weight" in load_file(f"peft_{name}.safetensors")
        status, said = convert("inspect", f"peft_{name}.safetensors")
        assert status == 0 and "3 of 3 in the middle" in said, said
        words = ("convert", f"dora_{name}.safetensors", "--output")
        assert "none: all" in convert(*words, f"dora_2_{name}.safetensors")[1]
        refused(
            convert,
            (*words, "new.safetensors", "--rank", 4),
            says="depends on the weights of the base: give it (--base)",
        )
        source, keys = f"lora_{name}.safetensors", ["clip_l"] if name == "sd15" else ["clip_l", "clip_g"]
        tokens = {f"a.{key}": random(1, width, seed=1) for key, width in zip(keys, (768, 1280), strict=False)}
        with_tokens("tokens.safetensors", source, tokens)
        status, said = convert("convert", "tokens.safetensors", "--output", f"tokens_{name}.safetensors")
        assert status == 0 and [*tokens_in(f"tokens_{name}.safetensors")] == (
            ["a.string_to_param.*"] if name == "sd15" else ["a.clip_g", "a.clip_l"]
        )
        with_tokens("tokens.safetensors", source, {"a.clip_l": random(1, 768 if name == "sdxl" else 1024, seed=1)})
        words = ("convert", "tokens.safetensors", "--output", "new.safetensors")
        refused(convert, words, says="the vectors of the new token a have")
    words = ("merge", "lora_sd15.safetensors", "lora_sdxl.safetensors", "--output", "new.safetensors")
    refused(convert, words, says="is for SD1.5 and lora_sdxl.safetensors for SDXL")


def test_the_metadata_tell_the_base_the_images_and_the_history(convert, opened, bases):
    base, options = opened["sdxl"], ("--base", bases["sdxl"])
    images = {
        "sushi_research.images": "a" * 12,
        "ss_tag_frequency": "{}",
        "ss_network_dim": "99",
        "modelspec.title": "old",
    }
    write("a.safetensors", base, pair, every=9, metadata=images)
    write(
        "bb.safetensors",
        base,
        pair,
        every=9,
        metadata={"sushi_research.images": "b" * 12, "lora_adapter_metadata": "{}"},
    )
    assert convert("resize", "a.safetensors", "--rank", 2, "--output", "c.safetensors", *options)[0] == 0
    found = read_header(Path("c.safetensors")).metadata
    assert found["ss_network_dim"] == "2" and found["ss_tag_frequency"] == "{}" and found["modelspec.title"] == "c"
    assert found["ss_base_model_version"] == "sdxl_base_v1-0" and found["format"] == "pt"
    status, said = convert("merge", "c.safetensors", "bb.safetensors", *options, "--output", "d.safetensors")
    assert status == 0, said
    header = read_header(Path("d.safetensors"))
    assert "ss_tag_frequency" not in header.metadata and "lora_adapter_metadata" not in header.metadata
    seen = trained_on(Path("d.safetensors"))
    assert seen.images == {"a" * 12, "b" * 12} and seen.is_complete
    steps = history.steps_of(header)
    assert [each["operation"] for each in steps] == ["resize", "merge"]
    assert [each["name"] for each in steps[1]["from"]] == ["c.safetensors", "bb.safetensors"]
    assert steps[1]["from"][0]["hash"] == found["sshs_model_hash"]
    assert "resize of a.safetensors, rank 2, as c.safetensors" in convert("inspect", "d.safetensors", *options)[1]
    long = [{"operation": "x" * 1000}] * 200
    kept = json.loads(history.text_of(long))
    assert 0 < len(kept) <= history.MOST_STEPS and len(history.text_of(long)) <= history.MOST_LETTERS


def test_inspecting_shows_norms_and_ranks_and_verifying_says_what_fits(convert, opened, bases):
    base, folder = opened["sd15"], bases["sd15"]
    write("a.safetensors", base, pair, every=2)
    status, said = convert("inspect", "a.safetensors", "--base", folder, "--picture", "norms.png")
    source = deltas("a.safetensors", base)
    whole = {key: each for key, each in source.items() if key[0] == "unet"}
    assert status == 0 and f"norm {norm(whole):.4g}" in said
    for word in ("rank for 90%", "UNet down 0.0", "UNet mid", "text layer 0", "largest singular value"):
        assert word in said, word
    with Image.open("norms.png") as image:
        assert image.width > 300
    largest = max(float(torch.linalg.svdvals(each.flatten(1))[0]) for each in source.values())
    assert f"{largest:.4g}" in said
    status, said = convert("verify", "a.safetensors", "--base", folder)
    assert (
        status == 0 and "layers of the UNet of this SD1.5 base" in said and "as the hash in the metadata says" in said
    )
    data = bytearray(Path("a.safetensors").read_bytes())
    data[-1] ^= 1
    Path("b.safetensors").write_bytes(data)
    refused(convert, ("verify", "b.safetensors", "--base", folder), says="is damaged")
    write("xl.safetensors", opened["sdxl"], pair, every=9)
    said = convert("inspect", "xl.safetensors", "--base", bases["sdxl"])[1]
    assert "change, text encoder 2 norm" in said


def test_changes_that_cancel_are_said_to_be_zero(convert, opened, bases):
    options = ("--base", bases["sd15"])
    write("a.safetensors", opened["sd15"], pair, every=9)
    for weights, dtype in (((1, -1), "fp16"), ((0.3, -0.3), "fp32")):
        words = (
            "merge",
            "a.safetensors",
            "a.safetensors",
            *options,
            "--dtype",
            dtype,
            "--weights",
            *weights,
            "--output",
        )
        status, said = convert(*words, f"zero_{dtype}.safetensors")
        assert status == 0 and "none, but the result is zero: it changes none of its" in said, said
    # Of a sum that is not zero in the file's dtype, the error is relative to what cancels.
    words = ("merge", *["a.safetensors"] * 3, *options, "--dtype", "fp16", "--weights", 0.3, 0.4, -0.7, "--output")
    said = convert(*words, "rest.safetensors")[1]
    assert 0 < float(said.split("error")[1].split()[0]) < 1e-3, said


def test_a_parameter_that_is_zero_in_the_base_has_no_relative_change(opened, tmp_path):
    base = opened["sd15"]
    file = tmp_path / "f.safetensors"
    write(file, base, full, every=3)
    with Weights(base) as weights:

        class Zeros:
            def __init__(self, ending):
                self.base, self.ending = base, ending

            def get(self, component, parameter):
                return weights.get(component, parameter) * (not parameter.endswith(self.ending))

        found = dict(verifying.verify(open_adapter(file, base), Zeros(".bias")))
        assert "inf" not in found["change of weights"] and ".weight)" in found["change of weights"]
        assert (
            "of what it changes, up to a norm of" in found["zero in the base"] and ".bias)" in found["zero in the base"]
        )
        found = dict(verifying.verify(open_adapter(file, base), Zeros("")))
        assert "zero in the base" in found and "change of weights" not in found


def with_tokens(name, source, tokens):
    save_file(load_file(source) | {f"bundle_emb.{key}": vectors.clone() for key, vectors in tokens.items()}, name)


def tokens_in(name):
    return {key.removeprefix("bundle_emb."): each for key, each in load_file(name).items() if "bundle_emb" in key}


def test_new_tokens_stay_as_they_are_or_are_refused(convert, opened, bases, architecture):
    base, options = opened[architecture], ("--base", bases[architecture])
    keys = {"sd15": ["string_to_param.*"], "sdxl": ["clip_l", "clip_g"]}[architecture]
    encoders = [each.model.config for name, each in base.components.items() if name != "unet"]
    one, two = (
        {f"{token}.{key}": random(2, each.hidden_size, seed=seed) for key, each in zip(keys, encoders, strict=True)}
        for token, seed in (("<a>", 1), ("my.cat", 2))
    )
    write("plain.safetensors", base, pair, every=9)
    with_tokens("a.safetensors", "plain.safetensors", one)
    with_tokens("b.safetensors", "plain.safetensors", {key: each.half() for key, each in two.items()})

    def written(*words):
        status, said = convert(*words, *options, "--output", "new.safetensors")
        assert status == 0 and "2 vectors" in said, said
        found = tokens_in("new.safetensors")
        Path("new.safetensors").unlink()
        return found

    for words in (("convert", "a.safetensors"), ("resize", "a.safetensors", "--rank", 1)):
        found = written(*words)
        assert found.keys() == one.keys() and all(torch.equal(found[key], one[key]) for key in one)
    found = written("convert", "a.safetensors", "--dtype", "bf16")
    assert all(torch.equal(found[key], one[key].bfloat16()) for key in one)
    found = written("merge", "a.safetensors", "b.safetensors", "a.safetensors", "plain.safetensors")
    both = one | {key: each.half() for key, each in two.items()}
    assert found.keys() == both.keys() and all(torch.equal(found[key], both[key]) for key in both)
    for command in ("inspect", "verify"):
        status, said = convert(command, "a.safetensors", *options)
        assert status == 0 and "<a>" in said and "2 vectors" in said and "not computed" not in said, said

    other = {key.replace("<a>", "<A>"): each + 1 for key, each in one.items()}
    with_tokens("c.safetensors", "plain.safetensors", other)
    with_tokens("wide.safetensors", "plain.safetensors", {key: random(2, 5, seed=3) for key in one})
    output = ("--output", "new.safetensors", *options)
    for words, says in (
        (
            ("convert", "a.safetensors", "--to", "peft", *output),
            "peft's layout has no place: write kohya's layout, or convert",
        ),
        (("merge", "a.safetensors", "c.safetensors", *output), "hold different vectors of the new token <a>, and"),
        (
            ("merge", "a.safetensors", "--into", bases[architecture], "--output", "new"),
            "for which a base has no place: merge a copy",
        ),
        (("verify", "wide.safetensors", *options), "of the new token <a> have 5"),
    ):
        refused(convert, words, says=says)


def test_norms_are_read_written_measured_and_merged(convert, opened, bases):
    """A norm's weight is a list, of which no matrix can be made by its shape alone."""
    base, options = opened["sd15"], ("--base", bases["sd15"])
    layers = layers_of(base.components["unet"].model)
    norms = {path: layer.shape for path, layer in layers.items() if len(layer.shape) == 1}
    assert norms
    first = next(path for path, layer in layers.items() if path.endswith("attn1.to_q"))
    matches = {
        "unet": {
            **{path: Difference("x", random(*shape, seed=1), random(*shape, seed=2)) for path, shape in norms.items()},
            first: pair(layers[first].shape, 3),
        }
    }
    file = {"layout": "kohya", "dtype": None, "metadata": {}, "layers_per_block": base.layers_per_block}
    write_entries(Path("a.safetensors"), "sd15", matches, **file)
    for words in (("inspect", "a.safetensors"), ("verify", "a.safetensors")):
        status, said = convert(*words, *options)
        assert status == 0, said
    once, twice = deltas("a.safetensors", base), added((deltas("a.safetensors", base), 2))
    for name, words, expected in (
        ("b", ("convert", "a.safetensors"), once),
        ("c", ("resize", "a.safetensors", "--rank", 2), None),
        ("d", ("merge", "a.safetensors", "a.safetensors"), twice),
        ("e", ("merge", "a.safetensors", "a.safetensors", "--rank", 6), twice),
        ("f", ("merge", "a.safetensors", "a.safetensors", "--kept", 1), twice),
    ):
        with case(name):
            status, said = convert(*words, "--output", f"{name}.safetensors", *options)
            assert status == 0, said
            found = deltas(f"{name}.safetensors", base)
            if expected is None:
                found.pop(("unet", first))
                expected = {key: value for key, value in once.items() if key[1] != first}
            assert far(found, expected)[1] < 1e-6


ONE_LAYER = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
OTHER_LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


def test_what_is_written_is_read_again_as_what_it_is(convert):
    """A file of the first text encoder in PEFT's layout fits both architectures, and a DoRA that is kept needs no base."""

    def save(name, stem, **more):
        tensors = {
            "lora_down.weight": torch.ones(2, 768),
            "lora_up.weight": torch.ones(768 if "te_" in stem else 320, 2),
        }
        save_file({f"{stem}.{part}": tensor for part, tensor in (tensors | more).items()}, name, {"format": "pt"})

    save("text.safetensors", ONE_LAYER)
    save("dora.safetensors", OTHER_LAYER, dora_scale=torch.ones(1, 768))
    for words in (
        ("convert", "text.safetensors", "--to", "peft", "--output", "a.safetensors"),
        ("merge", "text.safetensors", "dora.safetensors", "--output", "b.safetensors"),
    ):
        status, said = convert(*words)
        assert status == 0 and "none: all" in said, said
    metadata = read_header(Path("b.safetensors")).metadata
    assert metadata["ss_network_module"] == "lycoris.kohya"
    assert "dora_scale" in str(load_file("b.safetensors").keys())


def test_the_facts_of_kohyas_layout_name_the_kind(convert, opened, bases):
    for name, make, arguments in (
        ("loha", hadamard, {"algo": "loha"}),
        ("lokr", kronecker, {"algo": "lokr"}),
        ("dora_in", dora(1), {"algo": "lora", "dora_wd": "True", "wd_on_output": "False"}),
        ("dora_out", dora(0), {"algo": "lora", "dora_wd": "True", "wd_on_output": "True"}),
    ):
        with case(name):
            write(f"{name}.safetensors", opened["sd15"], make, every=9)
            status, said = convert(
                "convert", f"{name}.safetensors", "--base", bases["sd15"], "--output", f"{name}_2.safetensors"
            )
            metadata = read_header(Path(f"{name}_2.safetensors")).metadata
            assert status == 0 and metadata["ss_network_module"] == "lycoris.kohya", said
            assert {
                key: value for key, value in json.loads(metadata["ss_network_args"]).items() if "conv" not in key
            } == arguments


def test_an_output_within_the_base_is_refused(convert, opened, bases):
    """A folder that is copied into itself never ends."""
    folder = shutil.copytree(bases["sd15"], Path("base"))
    write("a.safetensors", opened["sd15"], pair, every=30)
    for place in (folder / "merged", folder / "vae" / "merged"):
        refused(convert, ("merge", "a.safetensors", "--into", folder, "--output", place), says="within the base")


def test_a_command_line_of_nothing_is_told_the_commands(convert):
    status, said = convert()
    assert status == 2
    assert "give a command, one of convert, merge, extract, resize, inspect, verify: --help describes them" in said


def test_a_base_without_the_text_encoder_that_an_adapter_changes(convert, single):
    file, _ = single["sd15"]
    write("a.safetensors", open_base(str(file)), pair, every=9)
    save_file({name: value for name, value in load_file(file).items() if name.startswith("model.")}, "unet.safetensors")
    says = "changes the text encoder (lora_te_text_model_encoder_layers_0"
    refused(convert, ("merge", "a.safetensors", "--into", "unet.safetensors", "--output", "b.safetensors"), says=says)


def test_the_base_of_verify_is_not_shown_as_optional(convert):
    status, said = convert("verify", "--help")
    assert status == 0 and "[--base" not in said and "--base BASE" in said
    assert convert("verify", "a.safetensors")[0] == 2
    assert "[--base BASE]" in convert("inspect", "--help")[1]
