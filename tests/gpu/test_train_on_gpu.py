"""What only a GPU can show: the precision that auto comes to, real fp16, the fastest kernels, and memory."""

import json

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


SDXL = pytest.mark.parametrize("architecture", ["sdxl"])


@SDXL
def test_auto_is_the_best_that_the_gpu_computes_in(gpu_trainer):
    assert gpu_trainer.train("auto", {"train.precision": "auto"}) == 0
    expected = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    assert gpu_trainer.plan("auto")["dtypes"]["frozen UNet weights"] == expected


@SDXL
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_every_precision_trains_with_the_fastest_kernels(gpu_trainer, precision):
    assert gpu_trainer.train("run", {"train.precision": precision, "train.steps": 4}) == 0
    losses = [line["loss"] for line in gpu_trainer.metrics("run")]
    # A random base predicts noise of about unit size against noise of unit size.
    assert len(losses) == 4 and all(0.2 < loss < 5 for loss in losses)
    assert {tensor.dtype for tensor in gpu_trainer.master_weights("run").values()} == {torch.float32}
    (launch,) = json.loads((gpu_trainer.folder("run") / "provenance.json").read_text())
    assert launch["step_path"] == "recorded"


@SDXL
def test_gradient_checkpointing_keeps_less_for_the_backward_pass(gpu_trainer, monkeypatch):
    """By what a forward pass leaves in memory: the peak of so small a model is that of a convolution's workspace."""
    predict, kept, of_trial = gpu_trainer.script.model.predict, [], {}

    def measured(*arguments, **options):
        predict(*arguments, **options)  # once, because libraries allocate what they keep
        before = torch.cuda.memory_allocated()
        prediction = predict(*arguments, **options)
        kept.append(torch.cuda.memory_allocated() - before)
        return prediction

    monkeypatch.setattr(gpu_trainer.script.model, "predict", measured)
    changes = {"train.batch_size": 8, "train.steps": 1, "train.record_step": False}
    for mode in ("none", "feed_forward", "all"):
        kept.clear()
        assert gpu_trainer.train(f"checkpointing_{mode}", changes | {"train.gradient_checkpointing": mode}) == 0
        of_trial[mode] = kept[0]  # before the first step, when the loader allocates nothing at the same time
    assert max(of_trial["all"], of_trial["feed_forward"]) < of_trial["none"]


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
