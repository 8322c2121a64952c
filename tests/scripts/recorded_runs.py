"""Makes the runs of a test recorded on a CPU, with the stand-in for CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sushi_research.fast.decision import RECORDED
from sushi_research.training import recorded_step
from testing.rerun import Rerun


class Recording:
    """Runs are recorded while it is `on`; `made` are the stand-ins that made their recordings."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.on, self.made = True, []
        decide = recorded_step.decide
        patch.setattr(recorded_step, "make_graphs", self.make_graphs)
        patch.setattr(recorded_step, "decide", lambda config, device: RECORDED if self.on else decide(config, device))

    def make_graphs(self, device: torch.device, buffers: Any) -> Rerun | None:
        if not self.on:
            return None
        self.made.append(Rerun(buffers.all))
        return self.made[-1]
