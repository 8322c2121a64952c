"""Which precision a run has, which dtype each tensor has, and that the master weights are what an fp32 reference makes them."""

import io
import math

import pytest
import torch
from torch import nn

from sushi_research.adapters import lora
from sushi_research.adapters.settings import AdapterSettings
from sushi_research.errors import UserError
from sushi_research.precision import COMPUTE_DTYPES, dtype_policy, make_scaler, resolve_precision
from sushi_research.training import optim
from sushi_research.training.master_weights import MasterWeights
from testing.real_configs import NARROW_UNETS

CPU, GPU = torch.device("cpu"), torch.device("cuda")


PRECISIONS = [
    ("auto", None, CPU, True, "fp32"),
    ("auto", "no", CPU, True, "fp32"),
    ("auto", "no", GPU, True, "bf16"),
    ("auto", "no", GPU, False, "fp16"),
    ("bf16", None, CPU, True, "bf16"),
    ("fp16", "no", GPU, True, "fp16"),
    ("fp32", "no", GPU, True, "fp32"),
    ("fp32", "bf16", GPU, True, "bf16"),
    ("auto", "fp16", GPU, True, "fp16"),
    ("auto", "bf16", CPU, True, "bf16"),
]


def test_the_launcher_wins_unless_it_says_no(monkeypatch):
    for configured, launcher, device, native_bf16, expected in PRECISIONS:
        # An older GPU emulates bf16: asked without this argument, torch says yes.
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True, native=native_bf16: native or including_emulation,
        )
        case = (configured, launcher, device.type, native_bf16)
        assert resolve_precision(configured, launcher, device).name == expected, case


def test_fp8_is_refused():
    with pytest.raises(UserError, match="the launcher's mixed precision is fp8, .* --mixed_precision bf16, fp16 or no"):
        resolve_precision("auto", "fp8", GPU)


def policy_of(precision, optimizer="adamw8bit", numbers=100_000, vae=torch.float32, **kwargs):
    return dtype_policy(precision, optimizer=optimizer, optimizer_kwargs=kwargs, numbers=[numbers], vae=vae)


def test_the_policy_in_words():
    words = policy_of("bf16").describe()
    assert words == {
        "frozen UNet weights": "bfloat16",
        "activations": "bfloat16",
        "adapter, working copy": "bfloat16",
        "adapter, master weights": "float32",
        "adapter gradients, summed": "float32",
        "optimizer state": "uint8",
        "loss": "float32",
        "VAE": "float32",
        "text encoders": "float32",
    }
    assert policy_of("fp16", "adamw", vae=torch.float16).describe()["VAE"] == "float16"
    assert policy_of("fp16", "torch.optim.SGD").optimizer_state == "as torch.optim.SGD keeps it"
    assert policy_of("fp16", numbers=4095).optimizer_state == "float32"
    sizes = [4096, 4095]
    of_groups = dtype_policy("fp16", optimizer="adamw8bit", optimizer_kwargs={}, numbers=sizes, vae=torch.float32)
    assert of_groups.optimizer_state == "uint8, float32 for groups below 4096 numbers"
    of_tensors = policy_of("fp16", min_8bit_size=16384).optimizer_state
    assert of_tensors == "uint8, float32 for tensors below 16384 numbers"


# --- a training step has the policy's dtypes ---


def forward(unet, architecture):
    width, dtype = NARROW_UNETS[architecture]["cross_attention_dim"], unet.dtype
    added = {"text_embeds": torch.randn(2, 16, dtype=dtype), "time_ids": torch.rand(2, 6)}
    noisy, hidden = torch.randn(2, 4, 8, 8, dtype=dtype), torch.randn(2, 5, width, dtype=dtype)
    return unet(noisy, torch.tensor([3, 700]), hidden, added_cond_kwargs=added).sample


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_every_tensor_of_a_step_has_its_dtype(precision):
    from diffusers import UNet2DConditionModel

    policy = policy_of(precision)
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(NARROW_UNETS["sd15"]).to(policy.weights)
    lora.attach(unet, AdapterSettings(targets="kohya_conv", rank=64, alpha=1.0, dropout=0.1, init="default", seed=0))
    master_weights = MasterWeights(lora.adapter_parameters({"unet": unet}), policy.adapter)
    optimizer = optim.build_optimizer("adamw8bit", master_weights, 1e-4, {})
    scaler = make_scaler(precision, CPU)
    seen = set()
    for module in unet.modules():
        module.register_forward_hook(lambda module, inputs, output: seen.add(getattr(output, "dtype", None)))
    working = lora.adapter_parameters({"unet": unet}).values()

    loss = (forward(unet.train(), "sd15").float() ** 2).mean()
    scaler.scale(loss).backward()
    assert loss.dtype == policy.loss
    assert {parameter.grad.dtype for parameter in working} == {policy.adapter}
    master_weights.accumulate()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    master_weights.refresh()

    # The sinusoidal embedding of the timestep (and of SDXL's sizes) is made in fp32; modules that return a tuple have none.
    assert seen - {None} - {torch.float32} <= {policy.activations} and policy.activations in seen
    tensors = [module for module in unet.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    assert {module.weight.dtype for module in tensors} == {policy.weights} == {policy.adapter}
    assert {parameter.dtype for parameter in master_weights.parameters()} == {policy.master_weights}
    assert {parameter.grad.dtype for parameter in master_weights.parameters()} == {policy.gradients}
    (flat,) = master_weights.flat_parameters()
    assert optimizer.state[flat]["state1"].dtype == optimizer.state[flat]["state2"].dtype == torch.uint8
    assert min(parameter.numel() for parameter in master_weights.parameters()) < 4096  # small tensors are part of it


def test_only_the_embeddings_of_numbers_are_fp32():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(NARROW_UNETS["sdxl"]).to(torch.bfloat16)
    fp32 = []
    for path, module in unet.named_modules():
        module.register_forward_hook(
            lambda module, inputs, output, path=path: (
                fp32.append(path) if isinstance(output, torch.Tensor) and output.dtype == torch.float32 else None
            )
        )
    with torch.no_grad():
        forward(unet, "sdxl")
    assert fp32 == ["time_proj", "add_time_proj"]


# --- master weights ---


class Net(nn.Module):
    """Two layers whose weights play the working copy, in fp32 until MasterWeights takes them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(24, 40, bias=False), nn.Linear(40, 8, bias=False)

    def forward(self, x):
        return self.second(torch.nn.functional.silu(self.first(x)))


def batches(steps, micro_batches):
    generator = torch.Generator().manual_seed(4)
    return torch.randn(steps, micro_batches, 5, 24, generator=generator)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_master_weights_follow_an_fp32_reference_bit_for_bit(dtype, name):
    steps, micro_batches = 8, 3
    net = Net()
    master_weights = MasterWeights(dict(net.named_parameters()), dtype)
    optimizer = optim.build_optimizer(name, master_weights, 1e-3, {})

    # The reference: an fp32 vector of all weights, gradients cast one by one, a model made afresh from it for every batch.
    shapes = [weight.shape for weight in Net().parameters()]
    flat = nn.Parameter(nn.utils.parameters_to_vector(Net().parameters()).detach())
    reference_optimizer = optim.make_optimizer(name, [flat], 1e-3, {})

    def reference():
        pieces = flat.detach().split([math.prod(shape) for shape in shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    for step, data in enumerate(batches(steps, micro_batches)):
        for group in (*optimizer.param_groups, *reference_optimizer.param_groups):
            group["lr"] = 1e-3 * (step + 1)
        for x in data:
            net(x.to(dtype)).float().square().sum().backward()
            master_weights.accumulate()
        norm = nn.utils.clip_grad_norm_(master_weights.flat_parameters(), 1.0)
        optimizer.step()
        master_weights.refresh()
        master_weights.zero_grad()

        sums = [torch.zeros(shape) for shape in shapes]
        for x in data:
            first, second = (weight.to(dtype, copy=True).requires_grad_() for weight in reference())
            hidden = nn.functional.silu(nn.functional.linear(x.to(dtype), first))
            nn.functional.linear(hidden, second).float().square().sum().backward()
            sums = [total + weight.grad.to(torch.float32) for total, weight in zip(sums, (first, second), strict=True)]
        flat.grad = torch.cat([total.flatten() for total in sums])
        reference_norm = nn.utils.clip_grad_norm_([flat], 1.0)
        reference_optimizer.step()

        assert torch.equal(norm, reference_norm) and norm > 1  # clipping was at work
        for master_weight, weight, working in zip(
            master_weights.parameters(), reference(), net.parameters(), strict=True
        ):
            assert torch.equal(master_weight, weight)
            assert working.dtype == dtype and torch.equal(working, weight.to(dtype))
    assert not any(torch.equal(weight, start) for weight, start in zip(reference(), Net().parameters(), strict=True))


def test_gradients_add_up_in_fp32():
    weight = nn.Parameter(torch.zeros(2))
    master_weights = MasterWeights({"w": weight}, torch.bfloat16)
    for value in (1.0, 2**-9, 2**-9):
        weight.grad = torch.full((2,), value, dtype=torch.bfloat16)
        master_weights.accumulate()
    assert weight.grad is None
    # bf16 has 8 bits: 1 + 2**-9 is 1 there, and the two small ones would be lost.
    assert master_weights.parameters()[0].grad.tolist() == [1 + 2**-8] * 2
    master_weights.zero_grad()
    assert master_weights.parameters()[0].grad.tolist() == [0.0] * 2


def test_a_small_step_moves_the_master_weight_even_where_the_copy_stays():
    weight = nn.Parameter(torch.ones(2))
    master_weights = MasterWeights({"w": weight}, torch.bfloat16)
    for _ in range(3):
        master_weights.parameters()[0].data += 2**-9
        master_weights.refresh()
    assert master_weights.parameters()[0].tolist() == [1 + 3 * 2**-9] * 2
    assert weight.tolist() == [1 + 2**-7] * 2  # the nearest bf16


def test_a_parameter_without_a_gradient_is_named():
    net = Net()
    master_weights = MasterWeights(dict(net.named_parameters()), torch.float32)
    net.first(torch.ones(1, 24)).sum().backward()
    with pytest.raises(AssertionError, match=r"second\.weight got no gradient"):
        master_weights.accumulate()


def test_state_goes_out_and_back():
    net, other = Net(), Net()
    master_weights, others = (
        MasterWeights(dict(net.named_parameters()), torch.bfloat16),
        MasterWeights(dict(other.named_parameters()), torch.bfloat16),
    )
    for parameter in master_weights.parameters():
        parameter.data.mul_(1.001)
    state = master_weights.named_state()
    assert list(state) == ["first.weight", "second.weight"]
    assert all(type(tensor) is torch.Tensor and tensor.dtype == torch.float32 for tensor in state.values())
    others.load(state)
    master_weights.parameters()[0].data.zero_()  # the state is a copy
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, state[name].to(torch.bfloat16))
    assert all(torch.equal(a, b) for a, b in zip(others.parameters(), state.values(), strict=True))
    with pytest.raises(AssertionError, match="the state is not that of this adapter"):
        others.load({"first.weight": state["first.weight"]})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_working_copy_is_not_the_master_weights(dtype):
    net = Net()
    master_weights = MasterWeights(dict(net.named_parameters()), dtype)
    master_weights.parameters()[0].data.zero_()
    assert net.first.weight.any()
    master_weights.refresh()
    assert not net.first.weight.any()


def test_parting_the_tensors_from_their_buffers_is_noticed():
    net = Net()
    master_weights = MasterWeights(dict(net.named_parameters()), torch.bfloat16)
    net(torch.ones(1, 24, dtype=torch.bfloat16)).sum().backward()
    net.to(torch.float16)
    with pytest.raises(AssertionError, match="moved after MasterWeights was made"):
        master_weights.refresh()
    net = Net()
    master_weights = MasterWeights(dict(net.named_parameters()), torch.float32)
    optim.build_optimizer("adamw", master_weights, 1e-3, {}).zero_grad()
    net(torch.ones(1, 24)).sum().backward()
    with pytest.raises(AssertionError, match="use MasterWeights.zero_grad"):
        master_weights.accumulate()


# --- one reduction over the processes ---


def test_two_processes_reduce_gradients_and_extras_in_one_message():
    data = batches(2, 1)[:, 0]
    processes = []
    for x in data:
        net = Net()
        master_weights = MasterWeights(dict(net.named_parameters()), torch.float32)
        net(x).square().sum().backward()
        master_weights.accumulate()
        processes.append(master_weights)
    gradients = [[parameter.grad.clone() for parameter in master_weights.parameters()] for master_weights in processes]
    messages = []
    for master_weights, extras in zip(processes, ([1.0, 10.0, 0.5], [2.0, 20.0, 0.25]), strict=True):
        master_weights.reduce(lambda vector: messages.append(vector.clone()) or vector, torch.tensor(extras))
    assert [message.shape for message in messages] == [(24 * 40 + 40 * 8 + 3,)] * 2

    for master_weights in processes:
        total = master_weights.reduce(lambda vector: messages[0] + messages[1], torch.zeros(3))
        assert total.tolist() == [3.0, 30.0, 0.75]
        for parameter, first, second in zip(master_weights.parameters(), *gradients, strict=True):
            assert torch.equal(parameter.grad, first + second)
    # A later step is not disturbed by what the extras point to.
    assert total.untyped_storage().nbytes() == 3 * 4


def test_one_process_reduces_nothing():
    net = Net()
    master_weights = MasterWeights(dict(net.named_parameters()), torch.float32)
    net(torch.ones(1, 24)).sum().backward()
    master_weights.accumulate()
    before = [parameter.grad.clone() for parameter in master_weights.parameters()]
    extras = torch.tensor([1.0])
    assert master_weights.reduce(None, extras) is extras
    assert all(
        torch.equal(parameter.grad, old) for parameter, old in zip(master_weights.parameters(), before, strict=True)
    )


# --- the loss scaler ---


@pytest.mark.parametrize(
    ("name", "bad"), [("adamw", float("nan")), ("adamw8bit", float("inf"))], ids=["adamw", "adamw8bit"]
)
def test_an_fp16_step_with_an_infinity_changes_nothing_but_the_scale(name, bad):
    net = Net()
    master_weights = MasterWeights(dict(net.named_parameters()), torch.float16)
    optimizer = optim.build_optimizer(name, master_weights, 1e-3, {"weight_decay": 0.1})
    scaler = make_scaler("fp16", CPU)

    def step(poison):
        loss = net(torch.ones(1, 24, dtype=torch.float16)).float().square().mean()
        scaler.scale(loss).backward()
        if poison is not None:
            net.second.weight.grad[0, 0] = poison
        master_weights.accumulate()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        master_weights.refresh()
        master_weights.zero_grad()

    def snapshot():
        buffer = io.BytesIO()
        torch.save([master_weights.named_state(), optimizer.state_dict(), dict(net.state_dict())], buffer)
        return buffer.getvalue()

    step(None)
    before, scale = snapshot(), scaler.get_scale()
    step(bad)
    assert snapshot() == before
    assert scaler.get_scale() == scale / 2
    step(None)
    assert snapshot() != before
    assert scaler.get_scale() == scale / 2


def test_scaling_cancels():
    gradients = []
    for scaler in (make_scaler("fp16", CPU), make_scaler("bf16", CPU)):
        net = Net()
        master_weights = MasterWeights(dict(net.named_parameters()), torch.float32)
        optimizer = optim.build_optimizer("adamw", master_weights, 1e-3, {})
        scaler.scale(net(torch.ones(1, 24)).square().mean()).backward()
        master_weights.accumulate()
        scaler.unscale_(optimizer)
        gradients.append([parameter.grad.clone() for parameter in master_weights.parameters()])
    assert all(
        torch.equal(scaled, plain) for scaled, plain in zip(*gradients, strict=True)
    )  # the scale is a power of 2


def test_the_scaler_is_at_work_for_fp16_alone_and_its_state_is_plain():
    assert [make_scaler(precision, CPU).is_enabled() for precision in COMPUTE_DTYPES] == [False, True, False]
    scaler, other = make_scaler("fp16", CPU), make_scaler("fp16", CPU)
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler.scale(weight.sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    buffer = io.BytesIO()
    torch.save(scaler.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert other.state_dict() == scaler.state_dict()
    assert other.get_scale() == 2**15
