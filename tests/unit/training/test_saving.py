"""Which file of a step the samples of that step are put into."""

from types import SimpleNamespace

import pytest

from sushi_research.runs.run_folder import RunFolder
from sushi_research.training import saving, thumbnail


@pytest.mark.parametrize("evaluated", [None, "exponential"])
def test_samples_are_put_into_no_file_of_an_earlier_step(tmp_path, monkeypatch, evaluated):
    run = RunFolder(tmp_path / "run", None)
    config = SimpleNamespace(ema=SimpleNamespace(decay=0.9), checkpoint=SimpleNamespace(keep_adapters=None))
    writer = SimpleNamespace(
        job=SimpleNamespace(run=run, config=config, is_main=True),
        plan=SimpleNamespace(steps=8),
        state=SimpleNamespace(averages=SimpleNamespace(evaluated=evaluated)),
        has_written=lambda path, average=None: False,
        write=lambda path, step, average=None: None,
    )
    found = []
    monkeypatch.setattr(thumbnail, "add", lambda job, path, step: found.append((path, step)))
    saver = saving.Saver(writer)
    saver.add_picture(2)  # before the first checkpoint
    saver._write_adapter(4)
    saver.add_picture(4)
    saver.add_picture(6)
    if evaluated:
        assert found == [(run.average, 4)]
    else:  # a file of each step, which is there or not
        assert found == [(run.step_adapter(step), step) for step in (2, 4, 6)]
