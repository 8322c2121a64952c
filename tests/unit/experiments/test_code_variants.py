"""The code is part of a variant: runs of other code are not pooled, the files are named, and what is not known is said."""

import json

import pytest
from cases import case
from fake_runs import fake_run

from sushi_research.experiments.comparison import compare
from sushi_research.experiments.variants import variants_of
from sushi_research.reports import statistics
from sushi_research.reports.run_record import read_record


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 999)


def code(name="train.py", **files):
    """The code of a provenance entry: the hash of each file, by its name without the ending."""
    files = {"script": "s"} | {key if key == "script" else f"{key}.py": digest for key, digest in files.items()}
    return {"code": {"commit": "c" * 40, "dirty": True, "script": name, "hash": json.dumps(files), "files": files}}


PLAIN, HUBER = code(losses="mse"), code("mine.py", script="h", losses="mse")


def launches(folder, *entries):
    """Lays entries, each with the step at which it began, over the one that the run has."""
    path = folder / "provenance.json"
    [known] = json.loads(path.read_text())
    path.write_text(json.dumps([known | entry for entry in entries]))
    return folder


@pytest.fixture
def runs(tmp_path):
    """A run of each name, seed and code, with losses of its own; the entry may be a list of launches."""

    def make(*planned):
        folders = []
        for number, (name, seed, entry) in enumerate(planned):
            folder = fake_run(tmp_path / name, 0.03 + 0.01 * number, seed=seed, noise_seed=number)
            folders.append(launches(folder, *(entry if isinstance(entry, list) else [entry])))
        return [read_record(folder) for folder in folders]

    return make


def labels(records, **options):
    return {variant.label: variant.seeds for variant in variants_of(records, **options)[0]}


def test_runs_of_other_code_are_other_variants_and_the_files_are_named(runs):
    records = runs(
        *((f"plain-seed{seed}", seed, PLAIN) for seed in (0, 1)),
        *((f"huber-seed{seed}", seed, HUBER) for seed in (0, 1)),
    )
    found = compare(records)
    assert labels(records) == {"plain": (0, 1), "huber": (0, 1)} and not found.by_run
    assert found.warnings == [
        "the code of huber-seed0, huber-seed1 differs from that of plain-seed0, plain-seed1 in train.py / mine.py: "
        "the code may cause the difference"
    ]
    [row] = found.differing.values()
    assert list(found.differing) == ["code"] and row[0].startswith("train.py ") and row[1].startswith("mine.py ")

    pooled = compare(records, pool_code=True)
    assert pooled.by_run, "all are one variant then"
    assert any("pooled although their code differs, because --pool-code" in warning for warning in pooled.warnings)
    assert any("train.py / mine.py" in warning for warning in pooled.warnings)

    [other] = runs(("rank4-seed0", 0, PLAIN))
    other.identity["lora.rank"] = 4
    for reference in ("plain", "huber"):
        [pair] = compare([*records, other], reference, pool_code=True).learned
        assert pair.candidate.label == "rank4" and pair.reference.seeds == (0, 0, 1, 1), reference


def test_the_same_code_under_another_name_is_the_same(runs):
    records = runs(("a-seed0", 0, PLAIN), ("a-seed1", 1, code("copy.py", losses="mse")))
    assert len(variants_of(records)[0]) == 2 and variants_of(records)[1], "one variant, compared run by run"
    assert compare(records).warnings == []


def test_names_stay_distinct_and_a_reference_means_each_of_its_codes(runs):
    """The script was edited in the middle of an experiment."""
    records = runs(("a-seed0", 0, PLAIN), ("a-seed1", 1, HUBER), ("b-seed0", 0, PLAIN | {"world": 1}))
    records[2].identity["lora.rank"] = 99
    assert list(labels(records)) == ["a-seed0", "a-seed1", "b-seed0"]
    pairs = [(pair.candidate.label, pair.reference.label) for pair in compare(records, "a").learned]
    assert pairs == [("a-seed1", "a-seed0"), ("b-seed0", "a-seed0"), ("b-seed0", "a-seed1")]
    assert labels(records, pool_code=True) == {"a": (0, 1), "b": (0,)}


def test_a_run_that_was_continued_with_other_code_is_a_variant_of_its_own(runs):
    changed = [PLAIN | {"step": 0}, HUBER | {"step": 10}]
    lost = [HUBER | {"step": 0}, PLAIN | {"step": 0}, HUBER | {"step": 20}, PLAIN | {"step": 20}]
    records = runs(
        ("a-seed0", 0, PLAIN),
        ("a-seed1", 1, changed),
        ("a-seed2", 2, HUBER),
        ("a-seed3", 3, lost),
        ("a-seed4", 4, changed[:1]),
    )
    groups = sorted(variant.seeds for variant in variants_of(records)[0])
    assert groups == [(0, 3, 4), (1,), (2,)], "of the fourth, all that is left was made with the first code"
    warnings = compare(records).warnings
    assert [text for text in warnings if "was continued" in text] == [
        "a-seed1 was continued at step 10 with other code than it began with (train.py / mine.py): it is a variant of its own"
    ]
    assert sorted(labels(records, pool_code=True).values()) != groups
    [back] = runs(("b-seed0", 0, [*changed, PLAIN | {"step": 15}]))
    assert "b-seed0 was continued at step 15 with the code that it began with again" in compare([back]).warnings[1]


def test_a_launch_that_trained_no_step_does_not_count(runs):
    """Its adapter file was lost, and written again from the last checkpoint with other code; or it was killed at once."""
    records = runs(("a-seed0", 0, PLAIN), ("a-seed1", 1, [PLAIN | {"step": 0}, HUBER | {"step": 20}]))
    assert len(records[1].entries) == 2 and labels(records, pool_code=True) == labels(records)
    records[1].finished_at = None
    assert variants_of(records)[1] and compare(records).warnings == []
    records[1].metrics = []
    assert not variants_of(records)[1], "how far it got is not known"


def test_code_that_is_not_recorded_is_not_pooled_with_code_that_is(runs):
    old = {"code": {"commit": "c" * 40, "dirty": False}}
    records = runs(
        ("a-seed0", 0, old), ("a-seed1", 1, PLAIN), ("a-seed2", 2, old), ("a-seed3", 3, [old, PLAIN | {"step": 9}])
    )
    assert sorted(variant.seeds for variant in variants_of(records)[0]) == [(0, 2), (1,), (3,)]
    warnings = compare(records).warnings
    assert any("no code is recorded for a-seed0, a-seed2, which an earlier version" in text for text in warnings)
    assert any(
        "a-seed3 was continued at step 9, and its code before or after that step is not recorded" in text
        for text in warnings
    )


def test_evaluated_files_are_compared_by_the_modules_that_both_have(runs, tmp_path):
    run = runs(("run", 0, code(script="t", validation="1")))[0]
    for number, digest in enumerate("12"):
        folder = fake_run(
            tmp_path / f"file{digest}", noise_seed=7 + number, entry=code("evaluate.py", script="e", validation=digest)
        )
        (folder / "run.json").unlink()
    found = compare([run, *(read_record(tmp_path / name) for name in ("file1", "file2"))])
    assert [text for text in found.warnings if "code" in text] == [
        "the code that evaluated file2 differs from that of run in validation.py: the code may cause the difference"
    ]


# --- runs that should be equal ---

CPU = PLAIN | {"machine": {"threads": 1, "gpu_memory_gib": None}}


def test_equal_runs_with_other_results_are_a_warning(tmp_path):
    def pair(name, first=CPU, second=CPU, **options):
        for number, entry in enumerate((first, second)):
            launches(fake_run(tmp_path / name / f"r{number}", noise_seed=number, **options), entry)
        return [read_record(tmp_path / name / f"r{number}") for number in range(2)]

    def said(records):
        return [text for text in compare(records).warnings if "should be equal" in text]

    [text] = said(pair("losses"))
    assert (
        text.startswith("r0 and r1 have the same settings, seed and code") and "validation losses of step 10 on" in text
    )
    records = pair("metrics")
    for line in records[1].metrics[2:]:
        line["loss"] += 0.5
    assert "they differ from step 3 (loss 0.1 and 0.6) on" in said(records)[0]
    records = pair("timings")
    records[1].curves = records[0].curves
    for line in records[1].metrics:
        line["images_per_second"] = 1.0
    assert said(records) == []
    gpu = {"machine": {"gpu_memory_gib": 80.0}}
    for name, entry in {
        "code": HUBER | {"machine": CPU["machine"]},
        "device": CPU | {"device": "another CPU"},
        "threads": CPU | {"machine": {"threads": 2}},
        "world": CPU | {"world": 2},
        "library": CPU | {"libraries": {"torch": "3"}},
        "micro-batches": CPU | {"resolved_config": {"train": {"batch_size": 2}}},
    }.items():
        with case(name):
            assert said(pair(name, second=entry)) == []
    assert said(pair("gpu", CPU | gpu, CPU | gpu)) == []
    other_seed = pair("seed")
    unknown = pair("unknown seed")
    for record in unknown:
        del record.identity["train.seed"]
    assert said(unknown) == [], "nothing says that their seeds are equal"
    other_seed[1].identity["train.seed"] = 5
    assert said(other_seed) == []
