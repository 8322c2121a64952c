"""A base in 8 or 4 bits on a GPU: a run trains and resumes, a layer's forward and backward pass can be recorded, and loading takes
little more than what is stored."""

import pytest
import torch
from script_runs import Trainer, assert_equal
from single_files import narrow_base
from torch import nn

from sushi_research.models import loading, storage

STORAGES = ["int8", "fp8", "nf4"]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize(("architecture", "held"), [("sd15", "int8"), ("sdxl", "fp8"), ("sdxl", "nf4")])
def test_a_run_trains_and_resumes_exactly(architecture, held, bases, photos, tmp_path):
    trainer = Trainer(architecture, bases[architecture], photos, tmp_path / "runs", tmp_path / "cache")
    changes = {"model.base_storage": held, "train.deterministic": True, "train.precision": "auto", "train.steps": 4}
    assert trainer.train("whole", changes) == 0
    assert trainer.train("parts", changes | {"train.steps": 2}) == 0
    assert trainer.train("parts", changes) == 0
    assert_equal(trainer.master_weights("parts"), trainer.master_weights("whole"))
    assert trainer.plan("whole")["base"]["weights"]["storage"] == held


@pytest.mark.parametrize(("held", "kind"), [("int8", "linear"), ("fp8", "linear"), ("nf4", "linear"), ("int8", "conv")])
def test_forward_and_backward_can_be_recorded(held, kind):
    """Nothing in it waits for the device or copies from the host: a capture would fail."""
    torch.manual_seed(0)
    plain, shape = (
        (nn.Linear(640, 1280), (4, 77, 640)) if kind == "linear" else (nn.Conv2d(64, 128, 3), (2, 64, 16, 16))
    )
    plain = plain.to("cuda", torch.bfloat16).requires_grad_(False)
    stored = storage.stored_layer(plain, plain.weight, held)
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def step():
        out = stored(x)
        [gradient] = torch.autograd.grad(out, x, torch.ones_like(out))
        return out.detach(), gradient

    expected = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # the libraries allocate their workspaces
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for tensor in found:
        tensor.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for mine, other in zip(found, expected, strict=True):
        # The kernels of a replay may be chosen for another workspace; the restored weight is the same.
        assert (mine - other).float().norm() <= 1e-2 * other.float().norm()


@pytest.mark.parametrize("held", STORAGES)
def test_a_weight_is_stored_and_restored_as_on_a_cpu(held):
    torch.manual_seed(0)
    plain = nn.Linear(640, 1280, dtype=torch.bfloat16).requires_grad_(False)
    here = storage.stored_layer(plain, plain.weight, held).restored()
    plain = plain.to("cuda")
    there = storage.stored_layer(plain, plain.weight, held).restored().cpu()
    # bitsandbytes' kernels may choose the other neighbour of a number half-way; the others compute the same.
    if held == "nf4":
        assert (there - here).float().norm() <= 0.02 * here.float().norm()
    else:
        assert torch.equal(there, here)


@pytest.mark.parametrize("held", STORAGES)
def test_loading_needs_little_more_than_is_kept(held, tmp_path):
    base = loading.resolve_base(str(narrow_base(tmp_path / "base", "sdxl")))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    unet = loading.load_unet(base, torch.bfloat16, torch.device("cuda"), storage=held)
    kept, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    layers = [layer for layer in unet.modules() if isinstance(layer, storage.StoredLinear | storage.StoredConv2d)]
    largest = max(layer.restored().numel() for layer in layers)
    # One weight in the compute dtype and in fp32, with what storing it takes beside it.
    assert peak - kept < 24 * largest
