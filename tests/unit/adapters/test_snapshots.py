"""Adapter files from snapshots of averages."""

import pytest
import torch
from safetensors.torch import save_file

from sushi_research.adapters import snapshots
from sushi_research.adapters.averaging import Combination
from sushi_research.adapters.snapshots import Snapshot
from sushi_research.errors import UserError


def kept(folder, scale=1.0):
    """Snapshots of a DoRA's layer after two steps."""
    found = []
    for number, step in enumerate((10, 20), start=1):
        tensors = {
            "a.lora_up.weight": torch.full((2, 1), 1.001 * number * scale),
            "a.dora_scale": torch.full((2, 1), 1.001),
        }
        save_file(tensors | {"a.alpha": torch.tensor(4.0)}, folder / f"{step:06d}-0.05.safetensors")
        found.append(Snapshot(folder / f"{step:06d}-0.05.safetensors", step, 0.05))
    return found


def test_magnitudes_stay_fp32_as_in_the_run_s_own_file(tmp_path):
    combination = Combination((-1.0, 2.0), 0.0)
    (found,) = snapshots.reconstructed(kept(tmp_path), [combination], torch.bfloat16)
    assert {key: tensor.dtype for key, tensor in found.items()} == {
        "a.lora_up.weight": torch.bfloat16,
        "a.dora_scale": torch.float32,
        "a.alpha": torch.float32,
    }
    torch.testing.assert_close(found["a.dora_scale"], torch.full((2, 1), 1.001), rtol=1e-6, atol=0)
    assert torch.equal(found["a.lora_up.weight"], torch.full((2, 1), 3.003, dtype=torch.bfloat16))


def test_what_the_file_s_dtype_cannot_hold_is_refused(tmp_path):
    with pytest.raises(UserError, match="^the average's a.lora_up.weight has values that float16 cannot hold"):
        snapshots.reconstructed(kept(tmp_path, 3e4), [Combination((-1.0, 2.0), 0.0)], torch.float16)
