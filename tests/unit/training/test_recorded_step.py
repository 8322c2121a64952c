"""The trial of the largest micro-batch: all processes take the path that each of them can take."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sushi_research.fast.decision import RECORDED
from sushi_research.precision import make_scaler
from sushi_research.training.recorded_step import FITS, TOO_LARGE, UNRECORDED, try_out


class Trial:
    """A recorder whose trial ends as told."""

    def __init__(self, why=None, error=None) -> None:
        self.why, self.error, self.stopped = why, error, False

    def try_out(self, batch):
        if self.error is not None:
            raise self.error
        return self.why

    def stop(self):
        self.stopped = True


def job_of(other, lines):
    """A job of process 0 of 2, of which the other one found `other`."""

    def reduce(mine, how):
        assert how == "sum" and mine.shape == (2,)
        return mine + torch.tensor([0.0, other])

    device = torch.device("cpu")
    return SimpleNamespace(
        device=device,
        world=2,
        rank=0,
        scaler=make_scaler("fp16", device),
        accelerator=SimpleNamespace(reduce=reduce),
        say=lines.append,
    )


@pytest.mark.parametrize(
    ("mine", "other"), [(None, FITS), (None, UNRECORDED), ("why so", FITS), ("why so", UNRECORDED)]
)
def test_the_step_is_recorded_if_every_process_can(mine, other):
    trial, lines = Trial(why=mine), []
    path = try_out(job_of(other, lines), trial, None, RECORDED)
    assert trial.stopped != path.is_recorded == (mine is None and other == FITS)
    assert path.is_recorded or [path.why in line for line in lines] == [True]
    assert path.why == ("" if path.is_recorded else mine or "another process cannot record it")


def test_a_process_without_the_memory_ends_all():
    with pytest.raises(SystemExit) as ended:
        try_out(job_of(TOO_LARGE, []), Trial(), None, RECORDED)
    assert ended.value.code == 2
    with pytest.raises(torch.OutOfMemoryError):
        try_out(job_of(FITS, []), Trial(error=torch.OutOfMemoryError("CUDA out of memory")), None, RECORDED)


def test_the_loss_scale_is_made_before_the_recording():
    job = job_of(FITS, [])
    assert job.scaler._scale is None
    try_out(job, Trial(), None, RECORDED)
    assert job.scaler._scale is not None
