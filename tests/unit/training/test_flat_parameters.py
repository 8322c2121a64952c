"""One flat parameter per parameter group: the same weights as from single tensors, in a number of ops that does not grow."""

import importlib
import math

import pytest
import torch
from torch import nn

from sushi_research.planning import op_counts
from sushi_research.precision import make_scaler
from sushi_research.training import optim, optimizer_classes
from sushi_research.training.master_weights import MasterWeights

# Multiples of 256 of at least 4,096 numbers each: then no block of 256 crosses two tensors, and every state has 8 bits where it
# can.
SHAPES = {"a.A": (4, 1024), "a.B": (640, 8), "b.A": (16, 32, 3, 3), "b.B": (128, 32, 1, 1)}
ARGUMENTS = {"bitsandbytes.optim.SGD": {"momentum": 0.9}, "torch.optim.SGD": {"momentum": 0.9}}
STEPS = 8  # RAdamScheduleFree changes nothing in its first five


def listed():
    """The import paths of all listed optimizers that there are in the installed versions."""
    found = []
    for package, names in optimizer_classes.ELEMENTWISE.items():
        path = package if package == "schedulefree" else f"{package}.optim"
        module = importlib.import_module(path)
        found += [f"{path}.{name}" for name in sorted(names) if hasattr(module, name)]
    return found


def master_weights_of(shapes=SHAPES, groups=None):
    torch.manual_seed(0)
    # Of different sizes, because some optimizers scale a step by the size of a tensor.
    working = {
        name: nn.Parameter(torch.randn(shape) * 10.0 ** (1 - number))
        for number, (name, shape) in enumerate(shapes.items())
    }
    return MasterWeights(working, torch.float32, groups)


def trained(name, kwargs, flat):
    """The weights after a few steps of the optimizer on the flat or on the single tensors."""
    master_weights = master_weights_of()
    parameters = master_weights.flat_parameters() if flat else master_weights.parameters()
    optimizer = optim.make_optimizer(name, parameters, 0.1, kwargs)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        for parameter in master_weights.parameters():
            parameter.grad.copy_(torch.randn(parameter.shape, generator=generator))
        optim.set_learning_rate(optimizer, 0.1 / (step + 1))
        optimizer.step()
        assert master_weights.are_views()
    return torch.cat([tensor.flatten() for tensor in master_weights.named_state().values()])


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_a_listed_optimizer_gives_the_same_weights_from_one_flat_tensor():
    paths = listed()
    assert {"torch.optim.AdamW", "bitsandbytes.optim.AdamW8bit", "bitsandbytes.optim.PagedLion8bit"} <= set(paths)
    start = torch.cat([tensor.flatten() for tensor in master_weights_of().named_state().values()])
    for path in paths:
        kwargs = {"weight_decay": 0.1} if "Rprop" not in path else {}
        kwargs |= next((value for prefix, value in ARGUMENTS.items() if path.startswith(prefix)), {})
        assert optimizer_classes.is_elementwise(path, kwargs), path
        flat, single = (trained(path, kwargs, flat) for flat in (True, False))
        assert not torch.equal(flat, start), path
        assert torch.equal(flat, single), path


NOT_ELEMENTWISE = [
    ("torch.optim.Adafactor", {}),
    ("adafactor", {}),
    ("came", {}),
    ("bitsandbytes.optim.LAMB", {}),
    ("bitsandbytes.optim.LAMB32bit", {}),
    ("bitsandbytes.optim.LARS", {"momentum": 0.9}),
]


def test_an_optimizer_that_looks_at_whole_tensors_would_not():
    for name, kwargs in NOT_ELEMENTWISE:
        assert not optimizer_classes.is_elementwise(name, kwargs), name
        assert not torch.allclose(trained(name, kwargs, True), trained(name, kwargs, False), atol=1e-3), name


def test_prodigy_estimates_the_same_from_one_flat_tensor():
    """Its sums over all numbers have another order, so the weights are equal up to rounding."""
    flat, single = (trained("prodigy", {"d0": 1e-3, "weight_decay": 0.1}, flat) for flat in (True, False))
    torch.testing.assert_close(flat, single, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "kwargs", "expected"),
    [
        ("adamw", {"betas": [0.9, 0.99]}, True),
        ("adamw_schedulefree", {}, True),
        ("lion8bit", {}, True),
        ("prodigy", {"slice_p": 1}, True),
        ("prodigy", {"slice_p": 11}, False),
        ("muon", {}, False),
        ("stableadamw", {}, False),
        ("adamw8bit", {"weight_decay": 0.1}, True),
        ("bitsandbytes.optim.adamw.AdamW8bit", {}, True),
        ("adamw8bit", {"percentile_clipping": 100, "block_wise": True}, True),  # bitsandbytes 0.48 has these
        ("adamw8bit", {"percentile_clipping": 5}, False),
        ("adamw8bit", {"block_wise": False}, False),
        ("adamw8bit", {"min_8bit_size": 4096}, False),
        ("bitsandbytes.optim.AdamW", {"max_unorm": 1.0}, False),
        ("bitsandbytes.optim.AdEMAMix32bit", {}, False),
        ("torch.optim.Muon", {}, False),
        ("prodigyopt.Prodigy", {}, False),
        ("my_optimizers.AdamW", {}, False),
        ("torch.AdamW.Mine", {}, False),
    ],
)
def test_what_is_elementwise_follows_from_the_name_and_the_arguments(name, kwargs, expected):
    assert optimizer_classes.is_elementwise(name, kwargs) is expected


def test_the_optimizer_holds_one_flat_tensor_or_the_single_ones():
    groups = [["a.A", "a.B"], ["b.A", "b.B"]]
    for name, kwargs, sizes in [("adamw8bit", {}, [1, 1]), ("adamw8bit", {"min_8bit_size": 4096}, [2, 2])]:
        master_weights = master_weights_of(groups=groups)
        optimizer = optim.build_optimizer(name, master_weights, 0.1, kwargs)
        assert [len(group["params"]) for group in optimizer.param_groups] == sizes
    optimizer.param_groups[0]["lr"] = 0.0
    before = master_weights.named_state()
    for parameter in master_weights.parameters():
        parameter.grad.fill_(1.0)
    optimizer.step()
    changed = {name for name, tensor in master_weights.named_state().items() if not torch.equal(tensor, before[name])}
    assert changed == set(groups[1])


def test_flat_parameters_are_ranges_of_the_buffers():
    groups = [["b.A"], ["a.B", "a.A", "b.B"]]
    master_weights = master_weights_of(groups=groups)
    flat = master_weights.flat_parameters()
    single = dict(zip(master_weights.shapes(), master_weights.parameters(), strict=True))
    assert [parameter.shape for parameter in flat] == [(4608,), (4096 + 5120 + 4096,)]
    for parameter, names in zip(flat, groups, strict=True):
        assert torch.equal(parameter, torch.cat([single[name].flatten() for name in names]))
        assert parameter.is_contiguous() and parameter.grad.is_contiguous()
    flat[1].grad[0] = 7.0
    assert single["a.B"].grad[0, 0] == 7.0
    with pytest.raises(AssertionError, match="every tensor once"):
        master_weights_of(groups=groups[:1])


def test_replaced_tensors_are_noticed():
    for replace in (
        lambda parameter: setattr(parameter, "data", parameter.data.clone()),
        lambda parameter: setattr(parameter, "grad", parameter.grad.clone()),
        lambda parameter: setattr(parameter, "grad", None),
    ):
        for parameters in (MasterWeights.parameters, MasterWeights.flat_parameters):
            master_weights = master_weights_of()
            master_weights.require_in_place()
            assert master_weights.are_views()
            replace(parameters(master_weights)[0])
            assert not master_weights.are_views()
            with pytest.raises(AssertionError, match="was moved|was removed"):
                master_weights.require_in_place()


@pytest.mark.parametrize("name", ["adamw", "torch.optim.Adafactor"])
def test_nothing_moves_in_a_run(name):
    """A recorded step (a CUDA graph) reads and writes these addresses."""
    working = {name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}
    master_weights = MasterWeights(working, torch.bfloat16)
    optimizer = optim.build_optimizer(name, master_weights, 1e-3, {})
    parameters = [*master_weights.parameters(), *master_weights.flat_parameters()]

    def addresses():
        return [tensor.data_ptr() for each in parameters for tensor in (each, each.grad)], [
            parameter.data_ptr() for parameter in working.values()
        ]

    before, state = addresses(), master_weights.named_state()
    for parameter in working.values():
        parameter.grad = torch.ones_like(parameter)
    master_weights.accumulate()
    master_weights.reduce(lambda vector: 2 * vector, torch.zeros(3))
    nn.utils.clip_grad_norm_(master_weights.flat_parameters(), 1.0)
    optimizer.step()
    master_weights.refresh()
    master_weights.zero_grad()
    with master_weights.preserved():
        master_weights.load(state)
    assert addresses() == before
    master_weights.require_in_place()


def tail_ops(name, layers):
    """The ops from the last gradient to the next step, of an adapter with so many layers, and those of `accumulate`."""
    shapes = {f"{layer}.{side}": (16, 8) for layer in range(layers) for side in "AB"}
    working = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    master_weights, scaler = MasterWeights(working, torch.bfloat16), make_scaler("fp16", torch.device("cpu"))
    optimizer = optim.build_optimizer(name, master_weights, 1e-3, {})
    scaler.scale(torch.ones(()))

    def accumulate():
        for parameter in working.values():
            parameter.grad = gradients[math.prod(parameter.shape)].view(parameter.shape)
        master_weights.accumulate()

    def tail():
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(master_weights.flat_parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        master_weights.refresh()
        master_weights.zero_grad()

    gradients = {128: torch.ones(128, dtype=torch.bfloat16)}
    accumulate()
    tail()  # makes the optimizer's state
    return op_counts.count(accumulate, []).ops, op_counts.count(tail, []).ops


def test_the_ops_after_the_backward_pass_do_not_grow_with_the_number_of_tensors():
    """A concatenation and a sum after each backward pass; clip, step, refresh and zeroing are of the flat tensors."""
    for name in ("adamw", "adamw8bit"):
        few, many = tail_ops(name, 20), tail_ops(name, 200)
        assert few == many and few[0] == 2, name
    assert tail_ops("torch.optim.Adafactor", 4)[1] < tail_ops("torch.optim.Adafactor", 8)[1]
