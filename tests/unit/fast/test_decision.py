"""Which settings and devices a step is recorded with."""

import pytest
import torch

from sushi_research.config import SD15Training
from sushi_research.fast.decision import RECORDED, decide

GPU = torch.device("cuda:0")


def config(lora=None, **train):
    return SD15Training(model={"base": "base"}, data={"path": "photos"}, lora=lora or {}, train={"steps": 1, **train})


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({}, None),
        ({"gradient_checkpointing": "all"}, None),
        ({"attention": ["flash", "math"]}, None),
        ({"precision": "fp16", "accumulation": 4, "deterministic": True}, None),
        ({"lora": {"dropout": 0.1}}, None),
        ({"lora": {"dropout": 0.1}, "gradient_checkpointing": "feed_forward"}, "lora.dropout"),
        ({"lora": {"kind": "lokr", "rank_dropout": 0.1, "module_dropout": 0.1}}, None),
        ({"lora": {"rank_dropout": 0.1}, "gradient_checkpointing": "all"}, "lora.rank_dropout"),
        ({"lora": {"module_dropout": 0.1}, "gradient_checkpointing": "all"}, "lora.module_dropout"),
        ({"record_step": False}, "train.record_step is false"),
        ({"attention": "xformers"}, "xformers"),
    ],
)
def test_what_is_recorded_on_a_gpu(settings, why):
    found = decide(config(**settings), GPU)
    if why is None:
        assert found == RECORDED and found.describe().startswith("recorded: ")
    else:
        assert not found.is_recorded and why in found.why and found.describe() == f"eager: {found.why}"


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_only_a_gpu_has_graphs(device):
    assert decide(config(), torch.device(device)).describe() == f"eager: a {device.upper()} has no CUDA graphs"
