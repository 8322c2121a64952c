"""A run folder is read as far as it is whole; the rest is a sentence."""

import json

import numpy as np
import pytest
from fake_runs import IMAGES, NOISE_SAMPLES, FakeValidationSet, base_loss, fake_run, losses

from sushi_research.errors import UserError
from sushi_research.reports.run_record import find_records, read_record
from sushi_research.runs.run_folder import open_run_folder


def test_a_run_is_read(tmp_path):
    run = read_record(fake_run(tmp_path / "run", 0.05, seed=3))
    assert (run.name, run.state, run.seed, run.last_step, run.problems) == ("run", "finished", 3, 20, [])
    curve = run.evaluation
    assert (
        curve.steps == (0, 10, 20) and curve.loss.shape == (3, IMAGES, NOISE_SAMPLES) and curve.set_hash == "set-hash"
    )
    assert np.array_equal(curve.base, base_loss(FakeValidationSet()).astype(np.float32))
    assert np.array_equal(curve.loss[0], curve.base)
    assert np.array_equal(curve.loss[2], losses(FakeValidationSet(), 0.05, 3).astype(np.float32))
    assert list(curve.samples) == [0, 40, 80] and list(curve.seconds) == [0, 5, 10]
    assert run.settings["train.batch_size"] == 1 and run.identity["lora.rank"] == 8


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(path):
    path.write_text("{ no json\n" + path.read_text())


@pytest.mark.parametrize(
    ("name", "harm", "words", "curve"),
    [
        ("evaluation.parquet", cut, "evaluation.parquet is damaged", False),
        ("metrics.jsonl", garble, "metrics.jsonl, line 1 is not valid JSON", True),
        ("run.json", garble, "run.json is not valid JSON", True),
        ("provenance.json", garble, "provenance.json is not valid JSON", True),
        ("plan.json", lambda path: path.unlink(), "plan.json is missing", True),
        ("config.yaml", lambda path: path.write_text("a: [1"), "config.yaml", True),
        (
            "provenance.json",
            lambda path: path.write_text("[3]"),
            "provenance.json does not hold what a run writes",
            True,
        ),
    ],
)
def test_damage_is_one_sentence_and_the_rest_is_there(tmp_path, name, harm, words, curve):
    folder = fake_run(tmp_path / "run")
    harm(folder / name)
    run = read_record(folder)
    assert len([problem for problem in run.problems if words in problem]) == 1, run.problems
    assert all("\n" not in problem for problem in run.problems)
    assert (run.evaluation is not None) is curve


def test_any_damage_to_any_file_leaves_a_record(tmp_path):
    """A bit flipped or a file cut anywhere: never an exception, and what is read is right or said to be damaged."""
    whole = read_record(fake_run(tmp_path / "run", kept=None))
    for path in sorted(tmp_path.glob("run/*.*")):
        data = path.read_bytes()
        rng = np.random.default_rng(len(data))
        for position in rng.integers(0, len(data), 25):
            path.write_bytes(
                data[:position] + bytes([data[position] ^ (1 << int(rng.integers(8)))]) + data[position + 1 :]
            )
            found = read_record(tmp_path / "run")
            if path.suffix == ".parquet" and not found.problems:
                assert np.array_equal(found.evaluation.loss, whole.evaluation.loss), position
            path.write_bytes(data[:position])
            read_record(tmp_path / "run")
        path.write_bytes(data)


@pytest.mark.parametrize("change", [{"format": 1}, {"format": "2"}, {"format": None}, {}])
def test_a_run_of_another_format_is_refused_in_one_sentence(tmp_path, change):
    folder = fake_run(tmp_path / "run")
    record = json.loads((folder / "run.json").read_text())
    del record["format"]
    (folder / "run.json").write_text(json.dumps(record | change))
    (folder / "evaluation.parquet").write_bytes(b"of another format too")
    run = read_record(folder)
    [problem] = run.problems
    found = f"format {json.dumps(change['format'])}" if change else "no format"
    assert f"run.json has {found}, this version reads format 2: use the version that wrote it" in problem
    assert run.evaluation is None and run.identity == {}


def test_a_setting_that_an_older_version_did_not_have_has_its_default(tmp_path):
    runs = []
    for name, settings in {"old": {}, "new": {"loss.snr_gamma": None}, "changed": {"loss.snr_gamma": 5.0}}.items():
        folder = fake_run(tmp_path / name)
        record = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(record | {"identity": record["identity"] | settings}))
        (folder / "plan.json").write_text(json.dumps({"global_batch_size": 4, "architecture": "sd15"}))
        runs.append(read_record(folder))
    old, new, changed = runs
    assert old.identity == new.identity != changed.identity
    assert old.identity["loss.snr_gamma"] is None and old.settings["train.attention"] == "sdpa"
    assert "model.clip_skip" in old.identity, "of the architecture that plan.json names"
    (tmp_path / "old/plan.json").write_text('{"architecture": []}')
    assert read_record(tmp_path / "old").identity["lora.rank"] == 8


def test_a_run_that_is_going_or_was_stopped_is_used_so_far(tmp_path):
    folder = fake_run(tmp_path / "run", finished=False)
    assert read_record(folder).state == "stopped"
    assert any(
        "was stopped at step 20: its results so far are used" in problem for problem in read_record(folder).problems
    )
    with open_run_folder(folder.parent, folder.name):
        run = read_record(folder)
        assert run.state == "still going" and run.evaluation.steps == (0, 10, 20)
        assert any("is still going, at step 20" in problem for problem in run.problems)


def test_without_metrics_there_is_no_time(tmp_path):
    folder = fake_run(tmp_path / "run")
    (folder / "metrics.jsonl").unlink()
    curve = read_record(folder).evaluation
    assert curve.seconds is None and list(curve.samples) == [0, 40, 80]


def test_folders_of_runs_are_found(tmp_path):
    one, two = fake_run(tmp_path / "runs/one"), fake_run(tmp_path / "runs/two")
    (tmp_path / "runs/notes").mkdir()
    assert find_records(tmp_path / "runs") == [one, two] and find_records(one) == [one]
    for path, words in ((tmp_path, "holds no run"), (tmp_path / "nowhere", "is not a folder")):
        with pytest.raises(UserError, match=words):
            find_records(path)


def test_results_with_other_images_at_a_step_are_refused(tmp_path):
    import pyarrow.parquet

    folder = fake_run(tmp_path / "run")
    path = folder / "evaluation.parquet"
    table = pyarrow.parquet.ParquetFile(path).read()
    pyarrow.parquet.write_table(table.slice(0, table.num_rows - 1), path)
    run = read_record(folder)
    assert run.evaluation is None and any("does not have the same images" in problem for problem in run.problems)
    assert json.loads((folder / "run.json").read_text())["finished_at"] == 20


def test_what_a_file_lost_is_said(tmp_path):
    """Rows of a whole step that metrics.jsonl tells of; lines of metrics.jsonl; and a clock that changed."""
    folder = fake_run(tmp_path / "run")
    log = folder / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join([*lines[:15], '{"step": 15, "evaluation/loss": 1}\n', *lines[15:]]))
    run = read_record(folder)
    assert run.problems[:1] == [
        f"{folder}/evaluation.parquet has no results of step 15, which metrics.jsonl has: the other steps are used"
    ]
    assert run.evaluation.steps == (0, 10, 20)
    log.write_text("".join([*lines[:3], *lines[9:]]))
    run = read_record(folder)
    [problem] = run.problems
    assert f"{log}, line 4 is about step 10 after step 3, so steps are missing" in problem
    assert run.evaluation.seconds is None and run.metrics == [] and run.last_step == 20
    log.write_text("".join([*lines[:3], *(line.replace("{", '{"cpu_seconds": 0.1, ') for line in lines[3:])]))
    run = read_record(folder)
    assert "records the wall clock only up to step 3 and CPU time from then on" in run.problems[0]
    assert run.evaluation.seconds is None and list(run.evaluation.samples) == [0, 40, 80]


def test_results_of_other_steps_or_of_another_run_are_said(tmp_path):
    """The two files of a run tell of the same steps and means, and end where the run ended."""
    run, other = fake_run(tmp_path / "run", steps=(0, 5, 10, 20)), fake_run(tmp_path / "other", 0.06)
    folders = {path.parent.name: path for path in tmp_path.glob("*/evaluation.parquet")}
    log, whole = run / "metrics.jsonl", read_record(run)
    means = dict(zip(whole.evaluation.steps, whole.evaluation.loss.mean((1, 2), dtype=np.float64), strict=True))
    lines = log.read_text().splitlines(keepends=True)
    for step in (20, 10, 5, 0):
        lines.insert(step, json.dumps({"step": step, "evaluation/loss": means[step]}) + "\n")
    log.write_text("".join(lines))
    assert read_record(run).problems == []

    log.write_text("".join([*lines[:6], *lines[7:]]))
    found = read_record(run)
    assert found.problems == [
        f"{folders['run']} has results of step 5, which metrics.jsonl does not have: they are used all the same"
    ]
    assert np.array_equal(found.evaluation.loss, whole.evaluation.loss)
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"finished_at": None}))
    log.write_text("".join(lines[:-1]))
    assert len(read_record(run).problems) == 1, "a run that was killed before it logged what it had just measured"

    def problem(path, finished_at):
        (path / "run.json").write_text(json.dumps(record | {"finished_at": finished_at}))
        return read_record(path)

    log.write_text("".join(lines))
    folders["run"].unlink()
    assert problem(run, 20).problems == [
        f"{folders['run']} has no results, although metrics.jsonl tells of some: restore it; that part is skipped"
    ]
    folders["other"].replace(folders["run"])
    found = problem(run, 20)
    assert found.evaluation is None and "not have the results of step 10 that metrics.jsonl" in found.problems[0]
    later = fake_run(tmp_path / "later", steps=(0, 10, 30))
    (later / "metrics.jsonl").write_text("".join((other / "metrics.jsonl").read_text()))
    found = problem(later, 20)
    assert found.evaluation is None and "has results of step 30, but the run finished at step 20" in found.problems[0]
    earlier = fake_run(tmp_path / "earlier", steps=(0, 10))
    (earlier / "metrics.jsonl").write_text((other / "metrics.jsonl").read_text())
    found = problem(earlier, 20)
    assert found.evaluation.steps == (0, 10) and "ends at step 10, but the run finished at" in found.problems[0]


def test_an_image_with_several_captions_counts_once(tmp_path):
    names = tuple(f"{number:032x}" for number in range(4))
    twice = FakeValidationSet(names=names + names[:2])
    once = read_record(fake_run(tmp_path / "once", val_set=FakeValidationSet(names=names))).evaluation
    curve = read_record(fake_run(tmp_path / "twice", val_set=twice)).evaluation
    assert curve.names == names == once.names and curve.loss.shape == once.loss.shape
    assert np.array_equal(curve.loss[:, 2:].astype(np.float32)[0], base_loss(twice).astype(np.float32)[2:4])
    both = base_loss(twice).astype(np.float32)
    assert np.allclose(curve.loss[0, 0], (both[0] + both[4]) / 2, atol=1e-7)
