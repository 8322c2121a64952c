"""A metrics.jsonl that no run wrote: one sentence, within seconds and without much memory."""

import os

import pytest

from sushi_research.errors import UserError
from sushi_research.runs import metrics_file
from sushi_research.runs.metrics_file import MetricsFile


@pytest.fixture
def metrics(tmp_path):
    return MetricsFile(tmp_path / "metrics.jsonl")


def test_a_mark_of_steps_far_beyond_the_run_takes_no_time(metrics):
    """The steps of a mark are not counted one by one beyond the steps of the run."""
    metrics.path.write_text(f'{{"step": {2**53}, "missing_from": 2}}\n')
    assert metrics.mark_missing(3).startswith(f"{metrics.path} has lost the lines of step 1:")
    assert [line["step"] for line in metrics.read()] == [1, 2**53]


@pytest.mark.parametrize("mark", [{"step": 3, "missing_from": 4}, {"step": 3, "missing_from": 0}])
def test_a_mark_without_steps_is_refused(metrics, mark):
    metrics.append(mark)
    with pytest.raises(UserError, match="metrics.jsonl, line 1 .* remove that line or the whole file"):
        metrics.read()


def test_a_file_of_zeros_is_not_read_whole(metrics):
    """A terabyte without a line end, which the file system does not store."""
    metrics.append({"step": 1, "loss": 0.5})
    os.truncate(metrics.path, 2**40)
    with pytest.raises(UserError, match=f"metrics.jsonl, line 2 has more than {metrics_file.MOST_LINE_BYTES:,} bytes"):
        metrics.read()
