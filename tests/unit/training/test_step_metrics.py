"""A step's numbers: sums over micro-batches and processes, and what stops a run."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sushi_research.config import SDXLTraining
from sushi_research.errors import NotFinite, UserError
from sushi_research.models import sdxl
from sushi_research.runs.job import Job
from sushi_research.training import step_metrics
from sushi_research.training.master_weights import MasterWeights
from sushi_research.training.step_metrics import StepMetrics

CONFIG = SDXLTraining(model={"base": "x"}, data={"path": "x"}, train={"steps": 1, "batch_size": 3})
PLAN = SimpleNamespace(global_batch_size=4, items_per_epoch=10)


def job(world: int = 1, rank: int = 0, precision: str = "fp32", reduce=None) -> Job:
    device = torch.device("cpu")
    accelerator = SimpleNamespace(num_processes=world, process_index=rank, device=device, reduce=reduce)
    return Job(CONFIG, sdxl, accelerator, precision)


def master_weights() -> MasterWeights:
    return MasterWeights({"a.lora_A.weight": nn.Parameter(torch.zeros(2, 3))}, torch.float32)


def micro_batch(metrics: StepMetrics, losses: list[float], bins: list[int], names: tuple[str, ...], share: float = 1.0):
    losses = torch.tensor(losses)
    metrics.add(losses.sum() * share / 4, losses, torch.tensor(bins))
    metrics.record(names, None)


def two_micro_batches(**options) -> StepMetrics:
    metrics = StepMetrics(job(**options))
    micro_batch(metrics, [1.0, 3.0, 5.0], [0, 3, 3], ("a.png", "b.png", "c.png"))
    micro_batch(metrics, [7.0], [1], ("d.png",), share=0.5)
    return metrics


def test_the_numbers_of_a_step():
    metrics = two_micro_batches()
    assert metrics.sum_over_processes(master_weights(), stop=0, waited=0.0) is False
    values = metrics.values(PLAN, 6, 1e-4, 0.5)
    # The loss is what was minimised, weights included; the quarters are means of the plain losses.
    assert values["loss"] == (1 + 3 + 5) / 4 + 7 / 8
    assert [values[f"loss_by_timestep/{timestep_bin}"] for timestep_bin in range(4)] == [1.0, 7.0, None, 4.0]
    assert (values["lr"], values["grad_norm"]) == (1e-4, 0.5)
    assert (values["samples_seen"], values["epoch"]) == (24, 2.4)
    assert values["images_per_second"] > 0 and values["data_wait_share"] == 0.0 and values["peak_memory_gib"] > 0
    assert values["cpu_seconds"] > 0 and len(values) == 13


def test_losses_of_regularisation_images_are_apart():
    sets = [{"path": "cats"}, {"path": "animals", "role": "regularisation"}]
    config = SDXLTraining(model={"base": "x"}, data={"sets": sets}, train={"steps": 1, "batch_size": 3})
    metrics = StepMetrics(replace(job(), config=config))
    for losses, roles in (([1.0, 3.0, 5.0], [0, 1, 1]), ([7.0], [0])):
        metrics.add(torch.tensor(0.0), torch.tensor(losses), torch.zeros(len(losses), dtype=torch.int64))
        metrics.record(("a.png",) * len(losses), torch.tensor(roles))
    metrics.sum_over_processes(master_weights(), stop=0, waited=0.0)
    values = metrics.values(PLAN, 6, 1e-4, 0.5)
    assert (values["loss_by_role/train"], values["loss_by_role/regularisation"]) == (4.0, 4.0)
    assert values["peak_memory_gib"] > 0 and values["cpu_seconds"] > 0 and len(values) == 15


@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_folder_that_is_lost_ends_all_processes_at_the_same_step(rank):
    """The main process says it in the one message of the step: it ends with the sentence, the others without a word."""
    error = UserError("lost")
    run = SimpleNamespace(lost=lambda: error if rank == 0 else None)
    both = job(world=2, rank=rank, reduce=lambda flat, _: flat + (flat * 0).index_fill(0, torch.tensor([-5]), rank))
    metrics = StepMetrics(replace(both, run=run))
    with pytest.raises(UserError if rank == 0 else SystemExit) as ended:
        metrics.sum_over_processes(master_weights(), stop=0, waited=0.0)
    assert ended.value is error if rank == 0 else ended.value.code == 2


def test_sums_over_the_processes():
    """A process of three, the others with the same losses; one of the others has been asked to stop."""
    sent = []

    def reduce(flat: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        sent.append(flat.clone())
        total = 3 * flat
        # What the others add next to the sums: a stop request, and their own peaks of memory.
        total[-19 + 9] = 1
        total[-6:] = torch.tensor([0.25, 7.0, *flat[-4:-2], 99.0, 5.0])
        return total

    metrics = two_micro_batches(world=3, rank=1, reduce=reduce)
    working = master_weights()
    working.parameters()[0].grad.fill_(2.0)
    assert metrics.sum_over_processes(working, stop=0, waited=0.25) is True
    assert len(sent) == 1, "a step has one message"
    assert not sent[0][-6:-4].any() and not sent[0][-2:].any() and sent[0][-4:-2].all(), (
        "a process fills its own places"
    )
    assert torch.equal(working.parameters()[0].grad, torch.full((2, 3), 6.0))
    values = metrics.values(PLAN, 1, 1e-4, 0.5)
    assert values["loss"] == 3 * ((1 + 3 + 5) / 4 + 7 / 8)
    assert [values[f"loss_by_timestep/{timestep_bin}"] for timestep_bin in range(4)] == [1.0, 7.0, None, 4.0]
    assert values["data_wait_share"] > 0
    assert values["peak_memory_gib"] == 99.0
    assert 7.0 <= values["cpu_seconds"] < 8.0, "that of the slowest process, and what this one did after the reduction"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_the_step_and_the_files_once(bad):
    metrics = two_micro_batches()
    micro_batch(metrics, [1.0, bad, 1.0], [2, 2, 2], ("e.png", "f.png", "e.png"))
    metrics.sum_over_processes(master_weights(), stop=0, waited=0.0)
    with pytest.raises(NotFinite, match=r"the loss at step 9 is not finite, with e\.png, f\.png: ") as caught:
        metrics.require_finite_loss(9)
    assert "\n" not in str(caught.value)


def test_a_loss_that_is_not_finite_elsewhere_stops_this_process_too():
    metrics = two_micro_batches(world=2, reduce=lambda flat, _: flat + float("nan"))
    metrics.sum_over_processes(master_weights(), stop=0, waited=0.0)
    with pytest.raises(NotFinite, match="not finite, in another process: "):
        metrics.require_finite_loss(9)


def test_a_step_begins_at_zero_in_the_same_buffers():
    metrics = two_micro_batches()
    before = [metrics._sums.data_ptr(), metrics._losses.data_ptr()]
    metrics.start()
    micro_batch(metrics, [2.0], [1], ("e.png",))
    metrics.sum_over_processes(master_weights(), stop=0, waited=0.0)
    assert metrics.values(PLAN, 1, 1e-4, 0.5)["loss"] == 0.5
    assert [metrics._sums.data_ptr(), metrics._losses.data_ptr()] == before


def test_a_finite_loss_passes():
    metrics = two_micro_batches()
    metrics.sum_over_processes(master_weights(), stop=0, waited=0.0)
    metrics.require_finite_loss(9)


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_all_but_fp16(norm):
    metrics = two_micro_batches()
    metrics.sum_over_processes(master_weights(), stop=0, waited=0.0)
    with pytest.raises(NotFinite, match="the gradient at step 9 is not finite: "):
        metrics.values(PLAN, 9, 1e-4, norm)
    in_fp16 = two_micro_batches(precision="fp16")
    in_fp16.sum_over_processes(master_weights(), stop=0, waited=0.0)
    assert in_fp16.values(PLAN, 9, 1e-4, norm)["grad_norm"] is None


def test_peak_memory_is_that_of_the_device_in_use(monkeypatch):
    # A GPU that is there but not trained on does not count.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    # What Python and torch take at least, and less than any machine that runs the tests has.
    assert 0.05 < step_metrics.peak_memory_gib(torch.device("cpu")) < 64
    assert step_metrics.peak_memory_gib(torch.device("cuda")) == 3


def test_the_time_of_a_gpu_is_between_the_events_of_a_step_without_waiting_for_data(monkeypatch):
    """No event is read before the norm is, which waits for the end of the step."""
    order = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("record")

        def elapsed_time(self, other):
            order.append("read")
            return 1500.0

    class Norm:
        def __float__(self):
            order.append("wait")
            return 0.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    for make in (torch.zeros, torch.arange):
        monkeypatch.setattr(torch, make.__name__, lambda *size, device=None, make=make: make(*size))
    on_gpu = job()
    on_gpu.accelerator.device = torch.device("cuda")
    metrics = StepMetrics(on_gpu)
    order.clear()
    metrics.start()
    micro_batch(metrics, [1.0, 3.0, 5.0], [0, 3, 3], ("a.png", "b.png", "c.png"))
    metrics.sum_over_processes(master_weights(), stop=0, waited=0.25)
    values = metrics.values(PLAN, 1, 1e-4, Norm())
    assert order == ["record", "record", "wait", "read"]
    assert values["gpu_seconds"] == 1.25 and "cpu_seconds" not in values
