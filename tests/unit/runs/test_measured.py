"""What earlier runs say of this machine's speed: only runs with the same conditions, and only their last launch."""

import json

import pytest

from sushi_research.runs import measured

CONFIG = {"data": {"resolution": 512}, "train": {"attention": "sdpa"}, "optimizer": {"name": "adamw"}}


def plan(**changed):
    facts = {"architecture": "sd15", "trainable_parameters": 100, "split": {"batch_size": 2, "processes": 1}}
    return facts | {"global_batch_size": 4} | changed


def entry(**changed):
    facts = {"precision": "fp32", "device": "A CPU", "machine": {"threads": 1, "gpu_memory_gib": None}, "step": 0}
    return facts | {"resolved_config": CONFIG} | changed


def line(step: int, speed: float, memory: float | None = 1.0) -> str:
    return json.dumps({"step": step, "loss": 0.1, "images_per_second": speed, "peak_memory_gib": memory}) + "\n"


@pytest.fixture
def write(tmp_path):
    def run(name: str, text: str, entries=None, **changed):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "plan.json").write_text(json.dumps(plan(**changed)))
        (folder / "provenance.json").write_text(json.dumps(entries or [entry()]))
        (folder / "metrics.jsonl").write_text(text)
        return str(folder)

    return run


WANTED = measured.conditions(plan(), entry())


def test_the_median_speed_and_the_peak_memory_of_the_last_launch(write, tmp_path):
    earlier = "".join(line(step, 100.0, 9.0) for step in range(1, 11))
    evaluation = json.dumps({"step": 10, "validation/loss": 0.2}) + "\n"
    later = line(11, 0.1, 2.0) + line(12, 4.0, 3.0) + line(13, 5.0, 3.0)
    half = line(14, 1000.0)[:20]  # a run that goes on writes it at the moment
    entries = [entry(device="another"), entry(step=10)]
    where = write("run", earlier + evaluation + later + half, entries)
    assert measured.find(tmp_path, WANTED) == measured.Measured(where, 3, 1 / 4.0, 3.0)


def test_a_long_file_is_read_from_its_end(write, tmp_path):
    text = "".join(line(step, 1.0 + (step > 9000)) for step in range(1, 10_001))
    write("run", text)
    assert measured.find(tmp_path, WANTED).seconds_per_image == 0.5


def test_a_run_of_an_older_version_counts():
    of_mode = [
        measured.conditions(plan(), entry(resolved_config={**CONFIG, "train": {"gradient_checkpointing": mode}}))
        for mode in (False, "none", "all")
    ]
    assert of_mode[0] == of_mode[1] != of_mode[2]
    without = measured.conditions(plan(), entry(resolved_config={**CONFIG, "text_encoders": {"new_tokens": []}}))
    assert without == WANTED


@pytest.mark.parametrize(
    "changed",
    [
        {"entries": [entry(device="another")]},
        {"entries": [entry(precision="bf16")]},
        {"entries": [entry(machine={"threads": 2, "gpu_memory_gib": None})]},
        {"entries": [entry(resolved_config=CONFIG | {"data": {"resolution": 768}})]},
        {"entries": [entry(resolved_config=CONFIG | {"text_encoders": {"new_tokens": [{"token": "mycat"}]}})]},
        {"trainable_parameters": 99},
        {"split": {"batch_size": 1, "processes": 1}},
        {"text": line(1, 1.0) + line(2, 1.0)},
        {"text": "{"},
        {"entries": [{"step": "x"}]},
        {"entries": [entry(machine="a CPU")]},
        {"split": [2, 1]},
        {"text": "".join(line(step, 1.0, None) for step in range(1, 5))},
    ],
)
def test_other_conditions_do_not_count(write, tmp_path, changed):
    lines = "".join(line(step, 1.0) for step in range(1, 5))
    write("run", **{"text": lines} | changed)
    assert measured.find(tmp_path, WANTED) is None
    good = write("good", lines)
    assert measured.find(tmp_path, WANTED).run == good


def test_without_runs_nothing_is_known(tmp_path):
    assert measured.find(tmp_path / "none", WANTED) is None
