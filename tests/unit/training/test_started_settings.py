"""What a run that starts from a file says of settings that are not those of the file."""

from pathlib import Path

import pytest
import torch
from torch import nn

from sushi_research.adapters.entries import Kronecker
from sushi_research.config import SD15Training
from sushi_research.errors import UserError
from sushi_research.training.started_settings import section_of


def test_a_file_of_whole_matrices_has_no_rank_to_compare():
    """Its rank would be a made-up one: half of the larger side of w2."""
    unet = nn.Sequential(nn.Linear(4, 4, bias=False))
    entries = {"0": Kronecker("0", w1=torch.ones(2, 2), w2=torch.ones(2, 2))}
    lora = {"start_from": "a.safetensors", "rank": 16}
    config = SD15Training(model={"base": "base"}, data={"path": "photos"}, train={"steps": 9}, lora=lora)
    said = r"^lora.rank is 16, and a.safetensors, .* has whole matrices only, where rank and alpha have no effect: remove lora.rank"
    with pytest.raises(UserError, match=said):
        section_of(config, Path("a.safetensors"), entries, unet)
