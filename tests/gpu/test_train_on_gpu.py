"""What only a GPU can show: the precision that auto comes to, real fp16, and a resumed run that is exact there too."""

import json
import os
import signal

import pytest
import torch
from script_runs import assert_equal

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_auto_is_the_best_that_the_gpu_computes_in(gpu_trainer):
    assert gpu_trainer.train("auto", {"train.precision": "auto"}) == 0
    expected = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    assert gpu_trainer.plan("auto")["dtypes"]["frozen UNet weights"] == expected


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_every_precision_trains(gpu_trainer, precision):
    assert gpu_trainer.train("run", {"train.precision": precision, "train.steps": 4}) == 0
    losses = [line["loss"] for line in gpu_trainer.metrics("run")]
    # A random base predicts noise of about unit size against noise of unit size.
    assert len(losses) == 4 and all(0.2 < loss < 5 for loss in losses)
    assert {tensor.dtype for tensor in gpu_trainer.master_weights("run").values()} == {torch.float32}


def test_resume_is_exact_with_deterministic_kernels(gpu_trainer, monkeypatch):
    changes = {"train.precision": "bf16", "train.deterministic": True, "train.steps": 6, "optimizer.name": "adamw8bit"}
    assert gpu_trainer.train("whole", changes) == 0
    log = gpu_trainer.script.tracking.log

    def stop_at_three(accelerator, metrics, values, step):
        log(accelerator, metrics, values, step)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(gpu_trainer.script.tracking, "log", stop_at_three)
        assert gpu_trainer.train("parts", changes) == 128 + signal.SIGTERM
    assert gpu_trainer.train("parts", changes) == 0
    assert_equal(gpu_trainer.master_weights("parts"), gpu_trainer.master_weights("whole"))
    assert gpu_trainer.metrics("parts") == gpu_trainer.metrics("whole")
    lines = map(json.loads, (gpu_trainer.folder("parts") / "metrics.jsonl").read_text().splitlines())
    assert all(line["gpu_seconds"] > 0 for line in lines)


def test_gradient_checkpointing_costs_less_memory(gpu_trainer):
    peaks = {}
    for checkpointing in ("none", "feed_forward", "all"):
        torch.cuda.reset_peak_memory_stats()
        changes = {"train.gradient_checkpointing": checkpointing, "train.batch_size": 8, "train.steps": 2}
        assert gpu_trainer.train(f"checkpointing_{checkpointing}", changes) == 0
        peaks[checkpointing] = torch.cuda.max_memory_allocated()
    assert max(peaks["all"], peaks["feed_forward"]) < peaks["none"]


def test_a_single_file_comes_to_the_gpu_whole(architecture, tmp_path):
    from single_files import narrow_base, write_single_file

    from sushi_research.models import loading

    folder = narrow_base(tmp_path / "folder", architecture)
    file = write_single_file(folder, tmp_path / "base.safetensors", architecture)
    base = loading.resolve_base(str(file), tokenizers=str(folder))
    for name, part in base.parts.items():
        model = part.load(torch.bfloat16, torch.device("cuda"))
        assert all(tensor.is_cuda for tensor in [*model.parameters(), *model.buffers()]), name
        assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}
