"""scripts/compare_runs.py: the page says what was found, stands by itself, and comes whatever is wrong with a run."""

from __future__ import annotations

import json
import os
import re
import time
from types import SimpleNamespace

import pytest
from cases import case
from fake_runs import fake_run
from script_runs import script

from sushi_research.config.process import run_main
from sushi_research.data.own_outputs import own_pictures
from sushi_research.errors import UserError
from sushi_research.experiments import wandb_runs
from sushi_research.reports import statistics

SCRIPT = script("compare_runs")


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 9_999)
    monkeypatch.setattr(statistics, "MAX_PAIRS", 500)


@pytest.fixture
def compare(tmp_path):
    """Runs the script without W&B; gives the Markdown, the HTML and the numbers."""

    def run(*words):
        output = tmp_path / "page"
        arguments = SCRIPT.parse([*map(str, words), "--output", str(output), "--wandb", "off"])
        assert SCRIPT.main(arguments) == 0
        numbers = json.loads((output / "comparison.json").read_text())
        return (output / "comparison.md").read_text(), (output / "comparison.html").read_text(), numbers

    return run


def test_the_page(compare, tmp_path, capsys):
    weak = fake_run(tmp_path / "weak", 0.03, rank=2, pictures=True)
    strong = fake_run(tmp_path / "strong", 0.05, rank=8, noise_seed=4, pictures=True)
    (strong / "report.html").touch()
    text, page, numbers = compare(weak, strong, "--title", "Ranks & <more>")
    assert "pages:\n\n- [strong](../strong/report.html)\n" in text and 'href="../strong/report.html">strong</a>' in page
    order = ("Test result", "Learned against kept", "Learned", "Differences of the pairs", "What differs")
    places = [text.index(f"## {heading}\n") for heading in order]
    assert text.startswith("# Ranks & <more>\n") and places == sorted(places)
    assert "- strong is better than weak: it learned more (log loss -0.0" in text and "| lora.rank | 2 | 8 |" in text
    for heading in (
        "At equal samples seen: learned",
        "At equal training time: learned",
        "Learned by timestep",
        "Kept",
        "Speed and memory",
        "The same prompts and seeds",
    ):
        assert f"## {heading}" in text
    assert "the shared validation set removed" in text.replace("\n", " ") and "needs two or more common seeds" in text
    # Every picture that the page names is there, and the HTML needs none of them.
    named = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert {"trade_off.png", "curves.png", "differences.png", "timestep_bins.png", "samples.png"} == set(named)
    assert all((tmp_path / "page" / name).is_file() for name in named)
    # A data folder that the page is in does not train on them.
    assert own_pictures(tmp_path / "page", [], os.listdir(tmp_path / "page")) == set(named)
    assert page.count("data:image/png;base64,") == len(named) and not re.search(r'src="(?!data:)', page)
    assert "<h1>Ranks &amp; &lt;more&gt;</h1>" in page and "<script" not in page
    [pair], [result] = numbers["families"]["learned"], numbers["results"]
    assert pair["outcome"] == "lower" and pair["difference"]["images"] == 12 and result["result"] == "better"
    assert result["sides"] == {"learned": "better", "kept": "not worse"} and len(result["learned_by_timestep"]) == 4
    said = capsys.readouterr().out
    assert "strong is better than weak" in said and "comparison.html" in said


def test_runs_of_other_code_are_pooled_on_demand_and_the_page_says_so(compare, tmp_path):
    folders = []
    for seed, digest in ((0, "a"), (1, "b")):
        code = {"commit": None, "dirty": None, "script": "mine.py", "hash": digest, "files": {"script": digest}}
        folders.append(fake_run(tmp_path / f"r-seed{seed}", seed=seed, entry={"code": code}))
    folders.append(fake_run(tmp_path / "other-seed0", rank=2, noise_seed=3))
    text, _, numbers = compare(*folders)
    assert [variant["label"] for variant in numbers["variants"]] == ["r-seed0", "r-seed1", "other-seed0"]
    assert "- the code of r-seed1 differs from that of r-seed0 in mine.py" in text and "| code | mine.py a |" in text
    text, _, numbers = compare(*folders, "--pool-code")
    assert [variant["label"] for variant in numbers["variants"]] == ["r", "other"]
    assert "pooled although their code differs, because --pool-code asks for it" in text


def test_whatever_is_wrong_is_a_sentence_and_the_page_comes(compare, tmp_path, capsys):
    good = [fake_run(tmp_path / f"good{rank}", rank=rank, noise_seed=rank) for rank in (1, 2)]
    damaged = fake_run(tmp_path / "damaged", rank=3)
    (damaged / "evaluation.parquet").write_bytes(b"PAR1 no more")
    (damaged / "metrics.jsonl").write_text("{\n")
    going = fake_run(tmp_path / "going", rank=4, finished=False)
    (tmp_path / "empty").mkdir()
    text, _, numbers = compare(*good, damaged, going, tmp_path / "empty", tmp_path / "nowhere")
    printed = capsys.readouterr().err
    for words in (
        "empty holds no run",
        "nowhere is not a folder",
        "evaluation.parquet is damaged",
        "metrics.jsonl, line 1 is not valid JSON",
        "going was stopped at step 20",
    ):
        assert words in printed and words in text, words
    assert "good2 is not distinguishable from good1" in text and len(numbers["variants"]) == 4
    assert "Traceback" not in printed


def test_a_line_or_picture_that_is_not_what_a_run_writes_is_a_sentence(compare, tmp_path, capsys):
    """Each is valid JSON, or carries the right name, and would have been an error further on."""
    whole = fake_run(tmp_path / "whole", rank=1, pictures=True)
    still = fake_run(tmp_path / "still", rank=2, noise_seed=2, pictures=True)
    (still / "metrics.jsonl").write_text('{"step": 1, "images_per_second": 0}\n')
    (still / "provenance.json").write_text('[{"code": "main"}]')
    (still / "samples/step-00000020/00-seed0.png").write_bytes(b"no picture")
    bare = fake_run(tmp_path / "bare", rank=3, noise_seed=3)
    record = json.loads((bare / "run.json").read_text()) | {"identity": [1]}
    (bare / "run.json").write_text(json.dumps(record))
    lines = [{"step": step, "images_per_second": 8.0} for step in range(1, 21)]  # no memory, no waiting
    (bare / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (whole / "stage_timings.json").write_text('{"training": 12.5, "sampling": "long"}')
    text, _, _ = compare(whole, still, bare)
    printed = capsys.readouterr().err
    for words in (
        "metrics.jsonl, line 1 does not hold what a run writes",
        "provenance.json does not hold what a run writes",
        "run.json does not hold what a run writes",
        "00-seed0.png is not an image",
        "stage_timings.json does not hold what a run writes",
    ):
        assert words in printed and words in text, words
    assert "still is not distinguishable from whole" in text and "bare is not distinguishable from whole" in text
    assert "| bare | 8 | - | - |" in text


def test_nothing_left_is_an_error(tmp_path, capsys):
    arguments = SCRIPT.parse([str(tmp_path / "nowhere"), "--output", str(tmp_path / "page"), "--wandb", "off"])
    with pytest.raises(SystemExit) as ended:
        run_main(SCRIPT.main, arguments)
    assert ended.value.code == 2 and "error: no run is left to compare" in capsys.readouterr().err


def test_a_mistyped_command_line_is_refused(capsys):
    for words in (
        [],
        ["--group", "x", "run"],
        ["run", "--wandb", "maybe"],
        ["run", "--outpt", "x"],
        ["run", "--step", "0"],
    ):
        with case(words):
            with pytest.raises(SystemExit) as ended:
                SCRIPT.parse(words)
            assert ended.value.code == 2 and "error: " in capsys.readouterr().err


def test_the_page_says_what_better_means_and_which_clock_was_used(compare, tmp_path, monkeypatch):
    monkeypatch.setattr(SCRIPT, "write_plots", lambda *_: {})
    times = {"times": {"cpu_seconds": 0.5}}
    runs = [fake_run(tmp_path / name, rank=rank, noise_seed=rank, **times) for rank, name in enumerate("ab")]
    text, page, numbers = compare(*runs)
    words = "Where pictures of a side are measured, they decide and losses do not"
    assert words in text and words in page
    assert "Training time is CPU time" in text and "| wall clock, s |" in text and "| 10.0 / 10.0 |" in text
    [pair] = numbers["families"]["seconds"]
    assert (pair["clock"], pair["at"], pair["wall_seconds"]["candidate"]) == ("CPU time", 10.0, 10.0)
    text, _, _ = compare(*(fake_run(tmp_path / f"old{rank}", rank=rank, noise_seed=rank) for rank in range(2)))
    assert "Runs that recorded no GPU or CPU time are compared by the wall clock" in text


def test_identical_runs_are_called_so(compare, tmp_path):
    text, _, numbers = compare(fake_run(tmp_path / "a", rank=1), fake_run(tmp_path / "b", rank=2))
    assert "b and a are identical on every one of 12 x 8 losses: bit for bit the same." in text
    assert numbers["families"]["learned"][0]["identical"] is True


def test_one_run_alone_has_a_page_without_a_test_result(compare, tmp_path):
    text, _, _ = compare(fake_run(tmp_path / "alone"))
    assert "None: there is nothing to compare it with." in text and "curves.png" in text


def test_runs_of_one_variant(compare, tmp_path):
    text, _, _ = compare(*(fake_run(tmp_path / f"r-seed{seed}", seed=seed) for seed in (0, 1)))
    assert "All of these are runs of one variant" in text and "it is about these two runs, not other seeds" in text


@pytest.mark.slow
def test_sixteen_variants_with_three_seeds(compare, tmp_path, monkeypatch):
    """120 pairs, with all resamples: a matrix, and a table that is cut."""
    monkeypatch.undo()
    for rank in range(16):
        for seed in range(3):
            gain = 0.03 + 0.02 * (rank == 7)
            fake_run(
                tmp_path / f"runs/v{rank:02d}-seed{seed}", gain, seed=seed, rank=rank, noise_seed=100 * rank + seed
            )
    text, page, numbers = compare(tmp_path / "runs")
    assert len(numbers["families"]["learned"]) == 120 and "matrix.png" in text and len(page) < 8e6
    assert "more pairs are in comparison.json" in text and len(text) < 100_000


# --- W&B ---


class FakeArtifact:
    def __init__(self, source, kind="record", version="v0"):
        self.source, self.type, self.version = source, kind, version

    def download(self, root):
        import shutil

        shutil.copytree(self.source, root)


def fake_api(*runs, error=None):
    def find(path, filters):
        if error is not None:
            raise error
        return [run for run in runs if filters.get("group") in (None, run.group)]

    return SimpleNamespace(runs=find)


def in_wandb(folder, *artifacts, group="g"):
    return SimpleNamespace(
        id=f"id-{folder.name}", name=folder.name, group=group, logged_artifacts=lambda: list(artifacts)
    )


def test_records_are_downloaded_the_newest_of_each(tmp_path):
    one, two, old = (fake_run(tmp_path / name, rank=rank) for rank, name in enumerate(("one", "two", "old")))
    api = fake_api(
        in_wandb(
            one, FakeArtifact(old, version="v9"), FakeArtifact(one, version="v10"), FakeArtifact(old, "adapter", "v11")
        ),
        in_wandb(two, FakeArtifact(two)),
        in_wandb(tmp_path / "bare"),
        in_wandb(tmp_path / "lost", FakeArtifact(tmp_path / "not there")),
        in_wandb(tmp_path / "elsewhere", FakeArtifact(old), group="h"),
    )
    found, problems = wandb_runs.download("team/project", "g", None, tmp_path / "wandb", api)
    assert [path.name for path in found] == ["one", "two"]
    ranks = [json.loads((path / "run.json").read_text())["identity"]["lora.rank"] for path in found]
    assert ranks == [0, 1] and "1 runs of team/project have no record and are skipped: bare" in problems
    assert any("W&B's run lost of team/project cannot be read" in problem for problem in problems)


def test_a_name_in_wandb_does_not_lead_out_of_the_folder(tmp_path):
    run = in_wandb(fake_run(tmp_path / "one"), FakeArtifact(tmp_path / "one"))
    run.name = "../../rank 8/lr"
    [place], problems = wandb_runs.download("team/project", None, None, tmp_path / "wandb", fake_api(run))
    assert problems == [] and place.resolve().parent == tmp_path / "wandb/id-one"


def test_nothing_could_be_downloaded(tmp_path):
    run = in_wandb(tmp_path / "lost", FakeArtifact(tmp_path / "not there"))
    with pytest.raises(UserError, match="could be downloaded: W&B's run lost of team/project cannot be read"):
        wandb_runs.download("team/project", None, None, tmp_path / "wandb", fake_api(run))


def test_out_of_reach_is_one_sentence(tmp_path, monkeypatch):
    """The last one is real: there are no credentials here."""
    for name in ("WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    nowhere, unreachable = ValueError("Could not find project"), ConnectionError("no route\nat all")
    for api, path, words in (
        (fake_api(), "project", "--wandb-runs is project: give ENTITY/PROJECT"),
        (fake_api(), "team/project", "W&B's team/project, group g holds no run: there is nothing"),
        (fake_api(error=nowhere), "team/project", r"cannot be read \(Could not find project\)"),
        (fake_api(error=unreachable), "team/project", r"cannot be read \(no route\): check"),
        (None, "team/project", "W&B's team/project cannot be read"),
    ):
        with case(words):
            with pytest.raises(UserError, match=words) as caught:
                wandb_runs.download(path, "g", None, tmp_path / "wandb", api)
            assert "\n" not in str(caught.value)


def test_the_rest_of_the_page_comes_without_wandb(compare, tmp_path, monkeypatch, capsys):
    def unreachable(*_):
        raise UserError("W&B's team/project cannot be read (no route): check its name.")

    monkeypatch.setattr(wandb_runs, "download", unreachable)
    runs = [fake_run(tmp_path / f"r{rank}", rank=rank, noise_seed=rank) for rank in (1, 2)]
    text, _, _ = compare(*runs, "--wandb-runs", "team/project")
    assert "- W&B's team/project cannot be read (no route)" in text and "r2 is not distinguishable from r1" in text
    assert "warning: W&B's team/project cannot be read" in capsys.readouterr().err


def test_the_page_is_logged_offline(tmp_path):
    """By the real library, into the page's own folder."""
    runs = [fake_run(tmp_path / f"r{rank}", rank=rank, noise_seed=rank) for rank in (1, 2)]
    arguments = SCRIPT.parse([*map(str, runs), "--output", str(tmp_path / "page"), "--wandb", "offline"])
    assert SCRIPT.main(arguments) == 0
    [offline] = (tmp_path / "page/wandb").glob("offline-run-*")
    [record] = offline.glob("*.wandb")
    # W&B's service, another process, writes the file out a moment after it has said that the run is finished.
    for _ in range(300):
        if record.stat().st_size > 1000:
            break
        time.sleep(0.1)
    assert record.stat().st_size > 1000
    assert {path.name for path in offline.rglob("media/*/*")} or list(offline.rglob("*.table.json"))
    from sushi_research.experiments.comparison import compare as compare_runs
    from sushi_research.reports.run_record import read_record

    tables = wandb_runs.tables(compare_runs([read_record(run) for run in runs]))
    assert tables["test_results/learned"]["data"][0][:3] == ["r2", "r1", "not distinguishable"]
    assert tables["results"]["data"][0][:3] == ["r2", "r1", "not distinguishable"]
    assert tables["what differs"]["data"] == [["lora.rank", "1", "2"]]
