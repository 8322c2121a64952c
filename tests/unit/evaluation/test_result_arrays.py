"""Results are matched by their key: rows in another order or twice are the same results, and anything else is refused."""

import numpy as np
import pyarrow
import pyarrow.compute as compute
import pyarrow.parquet
import pytest
from fake_runs import FakeValidationSet, base_loss, losses

from sushi_research.errors import UserError
from sushi_research.evaluation.result_arrays import image_of, row_names
from sushi_research.evaluation.results import Results

VAL_SET = FakeValidationSet()


@pytest.fixture
def results(tmp_path):
    found = Results(tmp_path / "evaluation.parquet")
    for step in (0, 10):
        found.append(VAL_SET, step, losses(VAL_SET, step / 100, 1), base_loss(VAL_SET))
    return found


def rewrite(results, change):
    table = pyarrow.parquet.ParquetFile(results.path).read()
    pyarrow.parquet.write_table(change(table).replace_schema_metadata(table.schema.metadata), results.path)


def with_value(table, row, name, value):
    values = table[name].to_pylist()
    values[row] = value
    return table.set_column(
        table.column_names.index(name), table.schema.field(name), pyarrow.array(values, table[name].type)
    )


def without(name, value):
    return lambda table: table.filter(compute.not_equal(table[name], value))


def test_order_and_copies_of_rows_change_nothing(results):
    before = [results.loss_at(VAL_SET, step) for step in (0, 10)] + [results.base_loss(VAL_SET)]
    rng = np.random.default_rng(0)
    rewrite(results, lambda table: pyarrow.concat_tables([table, table.slice(5, 40)]).take(rng.permutation(232)))
    assert results.arrays().repeated == 40 and results.read().num_rows == 192 and results.steps() == [0, 10]
    after = [results.loss_at(VAL_SET, step) for step in (0, 10)] + [results.base_loss(VAL_SET)]
    assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))
    # A run that goes on writes each row once again.
    results.append(VAL_SET, 20, losses(VAL_SET, 0.2, 1), base_loss(VAL_SET))
    assert pyarrow.parquet.ParquetFile(results.path).metadata.num_rows == 288 and results.arrays().repeated == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.slice(0, t.num_rows - 1), "does not have the same images and noise samples at every step"),
        (without("image", "image3"), "lost some"),
        (without("noise_sample", 7), "lost some"),
        (lambda t: pyarrow.concat_tables([t.slice(1), t.slice(1, 1)]), "does not have the same images and noise samples"),
        (lambda t: pyarrow.concat_tables([t, with_value(t, 3, "loss", 9.0).slice(3, 1)]), "different values of loss for image0"),
        (lambda t: with_value(t, 3, "timestep", 1), "values of timestep that differ between steps"),
        (lambda t: with_value(t, 100, "base_loss", 9.0), "values of base_loss that differ between steps"),
        (lambda t: with_value(t, 3, "loss", None), "a row without a value"),
        (lambda t: with_value(t, 3, "noise_sample", -1), "does not have the same images"),
        (lambda t: t.set_column(0, "step", pyarrow.array(["a"] * t.num_rows)), "has no int32 column step"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_are_one_sentence(results, change, words):
    rewrite(results, change)
    for read in (results.read, results.arrays, results.steps, lambda: results.loss_at(VAL_SET, 10)):
        with pytest.raises(UserError, match=words) as caught:
            read()
        assert str(results.path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_image_with_two_captions_has_two_names(tmp_path):
    image, other = "a" * 32, "b" * 32
    val_set = FakeValidationSet(names=(image, image, other), noise_samples=4)
    results, loss = Results(tmp_path / "evaluation.parquet"), np.arange(12.0).reshape(3, 4)
    results.append(val_set, 1, loss, loss)
    assert results.arrays().names == (image, f"{image}#2", other) == tuple(row_names(val_set.names))
    assert np.array_equal(results.loss_at(val_set, 1), loss) and results.loss_at(val_set, 2) is None
    assert [image_of(name) for name in (*results.arrays().names, "a caption#2")] == [image, image, other, "a caption#2"]


def test_rows_beyond_number_are_not_read(results, monkeypatch):
    """The compressed file may be tiny; its table would take all memory."""
    monkeypatch.setattr("sushi_research.evaluation.results.MOST_ROWS", 191)
    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "read", lambda *_: pytest.fail("read"))
    with pytest.raises(UserError, match="evaluation.parquet has 192 rows, and 191 are read: restore it, or remove it"):
        results.read()
