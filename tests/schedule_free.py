"""An optimizer that averages the weights, for tests: `optimizer.name: schedule_free.ScheduleFree`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class ScheduleFree(torch.optim.SGD):
    """Has the contract of schedulefree.SGDScheduleFree, which averages the weights."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, beta: float = 0.9) -> None:
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group.update(beta=beta, k=0, training=False)

    def train(self) -> None:
        self._go_to(True)

    def eval(self) -> None:
        self._go_to(False)

    @torch.no_grad()
    def _go_to(self, training: bool) -> None:
        for group in self.param_groups:
            if group["training"] != training:
                weight = 1 - (group["beta"] if training else 1 / group["beta"])
                for parameter in group["params"]:
                    if "z" in self.state[parameter]:
                        parameter.lerp_(self.state[parameter]["z"], weight)
                group["training"] = training

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            if not group["training"]:
                raise Exception("not in train mode")
            average = 1 / (group["k"] + 1)
            for parameter in group["params"]:
                z = self.state[parameter].setdefault("z", parameter.clone())
                parameter.lerp_(z, average)
                parameter.add_(parameter.grad, alpha=group["lr"] * (group["beta"] * (1 - average) - 1))
                z.sub_(parameter.grad, alpha=group["lr"])
            group["k"] += 1
