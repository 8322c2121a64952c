"""Runs that average the weights (`ema`): files, evaluations, a run in pieces, and averages of other lengths afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from script_runs import Trainer, assert_equal, script
from test_evaluating import make_pictures
from test_resume import Killed, at_micro_batch, kill

from sushi_research.adapters.averaging import exponent_of, exponential_decay, power_decay
from sushi_research.adapters.snapshots import AVERAGE
from sushi_research.errors import UserError
from sushi_research.evaluation.results import Results
from sushi_research.models.header import read_header
from sushi_research.runs.checkpoint import read_checkpoint

pytestmark = pytest.mark.parametrize("architecture", ["sd15"])
STEPS = 7
SETTINGS = {
    "train.steps": STEPS,
    "checkpoint.every": 1,
    "checkpoint.keep": STEPS,
    "optimizer.lr": 0.05,  # so that the averages are away from the weights
    "lora.save_dtype": "float32",
}
EMA = {"ema.decay": 0.7, "ema.post_hoc": True, "ema.every": 3}


@pytest.fixture
def evaluated(tmp_path) -> dict:
    """Settings of a run that evaluates its average before and after the training."""
    settings = {"evaluation.path": str(make_pictures(tmp_path / "eight", 8, 3)), "evaluation.every": None}
    settings |= {"evaluation.noise_samples": 4, "evaluation.drift_captions": [], "evaluation.keep_best": True}
    return settings | {"ema.evaluate": True}


def checkpoint(trainer: Trainer, name: str, step: int) -> dict:
    return read_checkpoint(trainer.folder(name) / f"checkpoints/step-{step:08d}").load()


def values(state: dict[str, torch.Tensor]) -> set[bytes]:
    """The tensors by content: an adapter file has other names, and alphas besides."""
    return {tensor.numpy().tobytes() for name, tensor in state.items() if not name.endswith(".alpha")}


def losses(folder: Path, step: int = 1) -> np.ndarray:
    found = Results(folder / "evaluation.parquet").arrays()
    return found.loss[found.steps.index(step)]


def averaged(states: list[dict[str, torch.Tensor]], decay_of) -> dict[str, torch.Tensor]:
    """The average of the weights after steps 1, 2, ... in fp64."""
    found = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in states[0].items()}
    for step, state in enumerate(states, start=1):
        found = {name: old * decay_of(step) + (1 - decay_of(step)) * state[name] for name, old in found.items()}
    return found


def test_a_run_in_pieces_keeps_the_averages_of_its_weights(trainer, evaluated, capsys, monkeypatch):
    assert trainer.train("plain", SETTINGS) == 0
    capsys.readouterr()
    assert trainer.train("whole", SETTINGS | EMA | evaluated) == 0
    printed, folder = capsys.readouterr().out, trainer.folder("whole")
    assert (
        "averages     exponential, in whole_ema.safetensors: of weights that are 1.71 steps old on average" in printed
    )
    assert "post-hoc: 3 snapshots of lengths 0.05 and 0.10 (every 3 steps, and at the end)" in printed
    assert f"the average of another length: python scripts/reconstruct_ema.py {folder}" in printed

    # They change nothing of the training, and a run without them has the checkpoints that it had.
    states = [checkpoint(trainer, "whole", step)["adapter"] for step in range(1, STEPS + 1)]
    last = checkpoint(trainer, "whole", STEPS)
    averages = last.pop("averages")
    assert_equal(last, checkpoint(trainer, "plain", STEPS))
    assert not (trainer.folder("plain") / "ema").exists()

    # The values, by the weights in the checkpoints of all steps.
    assert list(averages) == ["exponential", "0.05", "0.10"]
    for name, tensor in averaged(states, lambda step: exponential_decay(step, 0.7)).items():
        torch.testing.assert_close(averages["exponential"][name].double(), tensor, rtol=1e-5, atol=1e-7)
    assert values(load_file(folder / "whole_ema.safetensors")) == values(averages["exponential"])
    assert values(trainer.adapter("whole")) == values(states[-1])
    kept = sorted(path.name for path in (folder / "ema").iterdir())
    assert kept == [f"{step:06d}-{length}.safetensors" for step in (3, 6, 7) for length in ("0.05", "0.10")]
    for step, length in ((3, "0.10"), (7, "0.05")):
        of_step = checkpoint(trainer, "whole", step)["averages"][length]
        assert values(load_file(folder / f"ema/{step:06d}-{length}.safetensors")) == values(of_step)
    assert read_header(folder / "whole_ema.safetensors").metadata[AVERAGE] == "exponential, decay 0.7"
    assert AVERAGE not in read_header(folder / "whole.safetensors").metadata
    best = folder / f"whole-best-{STEPS:06d}.safetensors"
    assert values(load_file(best)) == values(averages["exponential"]), "what was evaluated is kept as the best"
    assert read_header(best).metadata[AVERAGE] == "exponential, decay 0.7"

    # A run in pieces: killed after a snapshot of a step that it does again; and a lost file.
    pieces = SETTINGS | EMA | {"checkpoint.every": 2}
    with pytest.raises(Killed), at_micro_batch(trainer, 4, 0, kill):
        trainer.train("pieces", pieces)
    assert (trainer.folder("pieces") / "ema/000003-0.05.safetensors").exists()
    assert trainer.train("pieces", pieces) == 0
    assert_equal(trainer.checkpoint("pieces").load(), checkpoint(trainer, "whole", STEPS))
    for path in (folder / "ema").iterdir():
        assert_equal(load_file(trainer.folder("pieces") / "ema" / path.name), load_file(path))
    file = trainer.folder("pieces") / "pieces_ema.safetensors"
    file.unlink()
    assert trainer.train("pieces", pieces) == 0
    assert f"{file} is missing: it is made again" in capsys.readouterr().out
    assert values(load_file(file)) == values(averages["exponential"])

    # Averages of other lengths, measured together with the weights and with the average that the run has evaluated.
    reconstruct, evaluate = script("reconstruct_ema"), script("evaluate")

    def in_this_process(words: list[str]) -> int:
        place = words.index("--adapters") + 1
        adapters = json.dumps([*json.loads(words[place]), f"{folder}@ema"])
        return evaluate.main(evaluate.read([*words[:place], adapters, *words[place + 1 :]]))

    monkeypatch.setattr(reconstruct, "evaluate", in_this_process)
    drawn = folder / "lengths.png"
    assert reconstruct.main(reconstruct.parse([str(folder), "--length", "0.08", "0.05", "--picture", str(drawn)])) == 0
    printed = capsys.readouterr().out
    file = folder / "whole_ema-0.08.safetensors"
    assert f"{file}: length 0.08 at step 7, from 6 snapshots; error of the profile 0" in printed
    assert read_header(file).metadata[AVERAGE] == "power function, length 0.08"
    kept = load_file(folder / "ema/000007-0.05.safetensors")
    torch.testing.assert_close(load_file(folder / "whole_ema-0.05.safetensors"), kept, rtol=1e-6, atol=1e-9)
    found, names = load_file(file), {}
    for key, tensor in trainer.adapter("whole").items():
        names[tensor.numpy().tobytes()] = key
    expected, near, far = averaged(states, lambda step: power_decay(step, exponent_of(0.08))), 0.0, 0.0
    for name, tensor in expected.items():
        near += (found[names[states[-1][name].numpy().tobytes()]] - tensor).square().sum().item()
        far += (averages["0.10"][name] - tensor).square().sum().item()
    assert near < far * 1e-3

    output = folder / "ema_lengths"
    of_weights = losses(output / "whole")
    np.testing.assert_array_equal(losses(output / "whole_ema"), losses(folder, STEPS))
    assert not np.array_equal(of_weights, losses(folder, STEPS))
    assert drawn.stat().st_size > 5_000
    table = [line.split() for line in printed[printed.index("length  validation loss") :].splitlines()]
    assert [line[0] for line in table[1:4]] == ["weights", "0.05", "0.08"]
    assert float(table[1][1]) == pytest.approx(of_weights.mean(), abs=1e-6)
    over = losses(output / "whole_ema-0.08").mean(dtype=np.float64) - of_weights.mean(dtype=np.float64)
    assert float(table[3][2]) == pytest.approx(over, abs=1e-6)
    assert float(table[3][3].strip("(")) < over < float(table[3][5].strip(")"))

    for words, sentence in (
        ([str(trainer.folder("plain")), "--length", "0.1"], "plain has no snapshots of averages, which a run keeps"),
        ([str(folder), "--length", "0.3"], "the length 0.3 is not between 0.005 and 0.28"),
        ([str(folder), "--length", "0.1", "--step", "5"], "has no snapshot of step 5: give one of 3, 6, 7"),
        ([str(trainer.folder("pieces")), "--length", "0.1", "--measure"], "holds out no images: give a folder"),
        ([f"{folder}@6", "--length", "0.1"], "@6 is not the folder of a run"),
        (
            [str(folder), "--length", "0.1", "--step", "6", "--measure"],
            "has no adapter file with the weights of step 6",
        ),
        ([str(folder), "--length", "0.1", "0.1000000001"], "--length has a number twice"),
    ):
        with pytest.raises(UserError, match=sentence):
            reconstruct.main(reconstruct.parse(words))

    # Without the snapshots of the last step, the averages end before it, and a note says so.
    capsys.readouterr()
    for path in (folder / "ema").glob("000007-*"):
        path.unlink()
    note = f"note: {folder / 'ema'} has no snapshot of step 7, at which the run finished: the averages end at step 6"
    for words, is_noted in (([], True), (["--step", "6"], False)):
        assert reconstruct.main(reconstruct.parse([str(folder), "--length", "0.1", *words])) == 0
        printed = capsys.readouterr().out
        assert (note in printed) == is_noted and "length 0.1 at step 6, from 4 snapshots" in printed


def test_the_command_line(architecture, capsys):
    parse = script("reconstruct_ema").parse
    assert parse(["runs/a", "--measure"]).length == [0.03, 0.05, 0.075, 0.1, 0.15, 0.2]
    assert parse(["runs/a", "--held-out", "photos"]).measure and not parse(["runs/a", "--length", "0.1"]).measure
    with pytest.raises(SystemExit):
        parse(["runs/a"])
    assert "error: no length: give some with --length, or --measure" in capsys.readouterr().err


def test_an_optimizer_that_averages_itself_is_refused(trainer):
    with pytest.raises(UserError, match="schedule_free.ScheduleFree averages the weights itself, .* remove ema.decay"):
        trainer.train("run", {"optimizer.name": "schedule_free.ScheduleFree", "ema.decay": 0.9})
