"""The largest norm of a module's change: of every kind, against the whole matrix and against kohya's formula."""

import pytest
import torch
from torch.nn import functional

from sushi_research.adapters.entries import Hadamard, Kronecker, LowRank, delta
from sushi_research.training import max_norm
from sushi_research.training.max_norm import MaxNorm

LIMIT = 0.75
# fp32 sums of up to 5,000 products, in another order than those of the whole matrix.
CLOSE = {"rtol": 1e-5, "atol": 0.0}

# Kind and rank: the parts' shapes for a layer [48, 40] or [48, 40, 3, 3], and the change as entries.py has it.
LORA = {"lora_A.weight": (4, 40), "lora_B.weight": (48, 4)}
DORA = LORA | {"magnitude": (40,)}
WIDE = {"lora_A.weight": (64, 40), "lora_B.weight": (48, 64)}
CONVOLUTION = {"lora_A.weight": (4, 40, 3, 3), "lora_B.weight": (48, 4, 1, 1)}
LOHA = {"hada_w1_a": (48, 3), "hada_w1_b": (3, 40), "hada_w2_a": (48, 3), "hada_w2_b": (3, 40)}
WIDE_LOHA = {"hada_w1_a": (48, 9), "hada_w1_b": (9, 360), "hada_w2_a": (48, 9), "hada_w2_b": (9, 360)}
LOKR = {"lokr_w1": (6, 5), "lokr_w2_a": (8, 4), "lokr_w2_b": (4, 8)}
LOKR_SPLIT = {"lokr_w1_a": (6, 2), "lokr_w1_b": (2, 5), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 72)}
LOKR_WHOLE = {"lokr_w1": (6, 5), "lokr_w2": (8, 8, 3, 3)}
KINDS = {
    "lora": LORA,
    "dora": DORA,
    "wide lora": WIDE,
    "convolution": CONVOLUTION,
    "loha": LOHA,
    "wide loha": WIDE_LOHA,
    "lokr": LOKR,
    "lokr, both split": LOKR_SPLIT,
    "lokr, both whole": LOKR_WHOLE,
}


def made(shapes, size, seed):
    """Tensors by part, fp32, of about this size."""
    generator = torch.Generator().manual_seed(seed)
    return {part: torch.randn(shape, generator=generator) * size for part, shape in shapes.items()}


def change(parts, scale):
    """The change of the layer, computed from an entry."""
    if "lora_A.weight" in parts:
        down, up = parts["lora_A.weight"], parts["lora_B.weight"]
        return delta(LowRank("", down, up, scale), (48, 40, *down.shape[2:]))
    cut = {part.partition("_")[2]: tensor for part, tensor in parts.items()}
    if "w1_b" in cut and "hada_w1_b" in parts:
        kernel = (3, 3) if cut["w1_b"].shape[1] > 40 else ()
        return delta(Hadamard("", **cut, scale=scale), (48, 40, *kernel))
    kernel = (3, 3) if cut.get("w2", cut.get("w2_b", torch.zeros(1, 8))).numel() > 72 else ()
    if "w2_b" in cut and kernel:
        cut["w2_b"] = cut["w2_b"].reshape(2, 8, 3, 3)
    return delta(Kronecker("", **cut, scale=scale), (48, 40, *kernel))


def named(modules):
    return {f"{module}.{part}": tensor for module, parts in modules.items() for part, tensor in parts.items()}


@pytest.mark.parametrize("chunk", [2**24, 9000])
def test_changes_above_the_limit_get_its_norm_and_others_keep_their_bits(chunk, monkeypatch):
    monkeypatch.setattr(max_norm, "CHUNK", chunk)
    modules, scales = {}, {}
    for number, (kind, shapes) in enumerate(KINDS.items()):
        for size in (1.0, 0.05, 0.0):
            name = f"text_encoder.{kind}.{size}"
            modules[name], scales[name] = made(shapes, size, number), 0.5 + number
    before = {name: {part: tensor.clone() for part, tensor in parts.items()} for name, parts in modules.items()}
    norms = {name: change(parts, scales[name]).norm() for name, parts in before.items()}
    held = MaxNorm(LIMIT, named(modules), scales)
    assert set(held.metrics().values()) == {None}
    held.apply()

    scaled = 0
    for name, parts in modules.items():
        found, whole = change(parts, scales[name]), change(before[name], scales[name])
        if norms[name] <= LIMIT:
            assert all(torch.equal(tensor, before[name][part]) for part, tensor in parts.items()), name
            continue
        scaled += 1
        torch.testing.assert_close(found.norm(), torch.tensor(LIMIT), **CLOSE)
        torch.testing.assert_close(found, whole * (LIMIT / norms[name]), rtol=1e-4, atol=1e-6)
        ratios = {float((tensor / before[name][part]).mean()) for part, tensor in parts.items() if part != "magnitude"}
        assert max(ratios) - min(ratios) < 1e-6, "the factor is not the same for all"
    assert len(KINDS) <= scaled < len(modules)
    after = [min(float(norm), LIMIT) for norm in norms.values()]
    assert held.metrics() == {
        "max_norm/scaled": scaled,
        "max_norm/mean": pytest.approx(sum(after) / len(after), rel=1e-5),
        "max_norm/largest": pytest.approx(LIMIT, rel=1e-5),
    }


def kohya(down, up, alpha, limit):
    """What sd-scripts computes for a module (networks/lora.py, apply_max_norm_regularization): the new norm and both matrices."""
    if down.ndim == 4:
        whole = functional.conv2d(down.permute(1, 0, 2, 3), up).permute(1, 0, 2, 3)
    else:
        whole = up @ down
    norm = (whole * (alpha / down.shape[0])).norm()
    ratio = norm.clamp(min=limit / 2).clamp(max=limit) / norm.clamp(min=limit / 2)
    return norm * ratio, down * ratio**0.5, up * ratio**0.5


@pytest.mark.parametrize("shapes", [LORA, CONVOLUTION], ids=["linear", "convolution"])
def test_it_is_what_kohya_does_after_each_step(shapes):
    """Over twenty steps, of which each starts from what the one before has left: both in fp32, sums in another order."""
    modules = {f"layer.{number}": made(shapes, 0.2 + 0.1 * number, number) for number in range(5)}
    theirs = {name: {part: tensor.clone() for part, tensor in parts.items()} for name, parts in modules.items()}
    held = MaxNorm(LIMIT, named(modules), dict.fromkeys(modules, 2.0 / 4))
    for step in range(20):
        norms, scaled = [], 0
        for number, name in enumerate(modules):
            for part, change_of_step in made(shapes, 0.01, 100 * step + number).items():
                modules[name][part] += change_of_step
                theirs[name][part] += change_of_step
            down, up = theirs[name].values()
            norm, new_down, new_up = kohya(down, up, 2.0, LIMIT)
            norms.append(float(norm))
            scaled += not torch.equal(new_down, down)
            down.copy_(new_down), up.copy_(new_up)
        held.apply()
        found = held.metrics()
        assert found["max_norm/scaled"] == scaled > 0
        assert [found["max_norm/mean"], found["max_norm/largest"]] == pytest.approx([sum(norms) / 5, max(norms)], 1e-5)
    for name, parts in modules.items():
        for part, tensor in parts.items():
            torch.testing.assert_close(tensor, theirs[name][part], rtol=1e-4, atol=1e-6)


def test_tensors_that_are_frozen_are_left_alone():
    modules = {name: made(LORA, 1.0, 0) for name in ("a", "b")}
    held = MaxNorm(LIMIT, named(modules), {"a": 1.0, "b": 1.0})
    held.leave({"b.lora_A.weight", "b.lora_B.weight"})
    held.apply()
    assert held.metrics()["max_norm/scaled"] == 1
    assert torch.equal(modules["b"]["lora_A.weight"], made(LORA, 1.0, 0)["lora_A.weight"])
