"""Runs that train each kind of adapter: resumed bit for bit, equal on two processes, and a start for another run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from script_runs import Trainer
from test_equivalence import split
from test_resume import Killed, assert_same_result, at_micro_batch, kill

from sushi_research.adapters.reading import read_adapter
from sushi_research.adapters.tensor_names import starts_at_zero
from sushi_research.config.command_line import config_to_yaml
from sushi_research.errors import UserError
from sushi_research.evaluation.results import Results
from sushi_research.models.header import read_header
from testing.forked_scripts import free_port, ranks

TARGETS = {"lora.targets": ["attn2.to_k", "conv1"], "lora.save_dtype": "float32"}
DROPS = {"lora.dropout": 0.2, "lora.rank_dropout": 0.2, "lora.module_dropout": 0.2}
MIXED = {
    "lora.conv_rank": 3,
    "lora.conv_alpha": 6.0,
    "lora.rank_stabilized": True,
    "lora.overrides": [{"modules": "mid_block", "rank": 5}, {"modules": "up_blocks.*conv1", "rank": 0}],
}
# The architecture, the settings, and what the plan says of the file.
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "mixed": ("sd15", MIXED, "the file has each scale within the second matrix"),
    "dora": (
        "sdxl",
        {"lora.kind": "dora"},
        "warning: diffusers will not load this adapter as it is: it leaves out the magnitudes",
    ),
    "loha": (
        "sdxl",
        {"lora.kind": "loha"},
        "warning: diffusers will not load this adapter as it is: it reads low-rank pairs only",
    ),
    "lokr": (
        "sd15",
        {"lora.kind": "lokr", "lora.lokr_factor": 4},
        "warning: diffusers will not load this adapter as it is",
    ),
}
EVALUATED = {"evaluation.held_out": 0.1, "evaluation.noise_samples": 4, "evaluation.drift_captions": []}
TEXT = {"text_encoders.train": True}
# The UNet's adapter stays at zero, and only the token learns.
TOKENS_ALONE = {
    "lora.overrides": [{"modules": "*", "lr_factor": 0}],
    "text_encoders.new_tokens": [{"token": "picture"}],
}
OF_THE_FILE = {f"lora.{key}": None for key in ("kind", "rank", "alpha", "targets")}


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "settings", "line"), CASES.values(), ids=CASES.keys())
def test_a_killed_run_goes_on_bit_for_bit_and_its_file_is_a_start(
    architecture: str, settings: dict[str, Any], line: str, trainer: Trainer
) -> None:
    given = TARGETS | DROPS | split(2, 2) | EVALUATED | settings
    assert trainer.train("whole", given) == 0
    assert any(line in each for each in trainer.plan("whole")["text"])
    with at_micro_batch(trainer, 3, 1, kill), pytest.raises(Killed):
        trainer.train("killed", given)
    assert trainer.train("killed", given) == 0
    assert_same_result(trainer, "killed", "whole")
    if settings is MIXED:  # of any kind the same
        with pytest.raises(UserError, match="lora.module_dropout was 0.2, is now 0"):
            trainer.train("whole", given | {"lora.module_dropout": 0.0})

    rows = Results(trainer.folder("whole") / "evaluation.parquet").read().to_pydict()
    of_step = [{key: value for key, value in zip(rows, row, strict=True)} for row in zip(*rows.values(), strict=True)]
    assert all((row["loss"] == row["base_loss"]) == (row["step"] == 0) for row in of_step)

    # The file is the master weights, and so is the start of another run.
    file = trainer.folder("whole") / "whole.safetensors"
    start = {"lora.start_from": str(file), "lora.save_dtype": "float32", "train.steps": 1, "optimizer.lr": 1e-12}
    assert trainer.train("next", OF_THE_FILE | start) == 0
    config = trainer.folder("next") / "config.yaml"
    assert f"kind: {settings.get('lora.kind', 'lora')}" in config.read_text()
    for found, given_entry in zip(
        read_adapter(trainer.folder("next") / "next.safetensors").entries, read_adapter(file).entries, strict=True
    ):
        assert (found.name, found.rank, found.scale) == (given_entry.name, given_entry.rank, given_entry.scale)
        for part, tensor in vars(given_entry).items():
            if isinstance(tensor, torch.Tensor):
                torch.testing.assert_close(getattr(found, part), tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "kind"), [("sd15", "dora"), ("sdxl", "loha"), ("sd15", "lokr")])
def test_two_processes_learn_what_one_does(
    architecture: str, kind: str, trainer: Trainer, forked: Any, tmp_path: Path
) -> None:
    """By plain SGD, whose steps are the gradients: Adam divides each by its own size, which makes roundings of small ones large."""
    settings = TARGETS | {"lora.kind": kind, "train.steps": 3, "optimizer.name": "torch.optim.SGD", "optimizer.lr": 1.0}
    assert trainer.train("one", settings) == 0
    config = tmp_path / "two.yaml"
    config.write_text(config_to_yaml(trainer.config("two", settings | split(1, 2))))
    script = f"scripts/train_{architecture}_lora.py"
    both = [forked(script, "--config", str(config), **place) for place in ranks(2, free_port())]
    assert [process.wait() for process in both] == [0, 0], both[0].err
    assert trainer.plan("two")["split"] == {"batch_size": 1, "accumulation": 2, "processes": 2}
    one, two = trainer.master_weights("one"), trainer.master_weights("two")
    for name in filter(starts_at_zero, one):
        # Sums in another order, in fp32.
        assert (one[name] - two[name]).abs().max() <= 1e-3 * one[name].abs().max() != 0, name


@pytest.mark.parametrize("architecture", ["sd15"])
def test_what_cannot_be_trained_is_refused(architecture: str, trainer: Trainer) -> None:
    for changes, sentence in (
        ({"lora.overrides": [{"modules": "down_blocks.9", "rank": 2}]}, "which fits none of the"),
        ({"lora.targets": ["attn2.to_k"], "lora.conv_rank": 2}, "lora.conv_rank has no effect, because no module"),
        (
            {"lora.overrides": [{"modules": "*", "rank": 0}]},
            "and a run adapts the UNet: remove one of them, or give lr_factor 0",
        ),
        (TEXT | {"lora.overrides": [{"modules": "text_encoder", "rank": 0}]}, "train without that encoder"),
        (TOKENS_ALONE | {"lora.max_norm": 1.0}, "lora.max_norm has no effect, because no adapter is trained"),
    ):
        with pytest.raises(UserError, match=sentence):
            trainer.train("refused", changes)
    every = [{"modules": "*", "rank": 3, "alpha": 6.0}]
    assert trainer.train("unknown", {"lora.targets": ["attn1.to_k"], "lora.overrides": every, "train.steps": 1}) == 0
    said = read_header(trainer.folder("unknown") / "unknown.safetensors").metadata
    assert (said["ss_network_dim"], said["ss_network_alpha"]) == ("3", "6.0")
    text = trainer.plan("unknown")["text"]
    assert any(
        "warning: InvokeAI will not load this adapter as it is: it cannot tell the base" in line for line in text
    )
