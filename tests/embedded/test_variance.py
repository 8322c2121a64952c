"""The table of how sure each way of validating is, on losses whose variances are known."""

import numpy as np
import pytest

from demo import variance

IMAGES, SETS, NOISE_SAMPLES = 200, 64, variance.NOISE_SAMPLES


def tables():
    """What models share varies by 1 between timesteps, half of it between strata; what is a model's own by 0.1."""
    generator = np.random.default_rng(0)

    def shared(strata):
        within = generator.normal(0, 0.5**0.5, (IMAGES, SETS, NOISE_SAMPLES))
        return within + (strata if strata is not None else generator.normal(0, 0.5**0.5, (IMAGES, SETS, NOISE_SAMPLES)))

    levels = np.linspace(-1, 1, NOISE_SAMPLES)
    found = []
    for common in (shared(None), shared(levels / levels.std() * 0.5**0.5)):
        found.append(np.stack([common + generator.normal(0, 0.1, common.shape) for _ in range(3)]))
    return found


def test_the_variance_of_each_way_is_that_of_its_parts():
    rows = {row["way"]: row for row in variance.variance_rows(*tables())}
    own = 2 * 0.01
    expected = {
        "plain: one fresh timestep and noise": (1.01, 2 * 1.01, 1),
        "plain, eight noise samples": (1.01, 2 * 1.01, NOISE_SAMPLES),
        "stratified timesteps, fresh noise": (0.51, 2 * 0.51, NOISE_SAMPLES),
        "shared noise samples, not stratified": (1.01, own, NOISE_SAMPLES),
        "the validation set: shared and stratified": (0.51, own, NOISE_SAMPLES),
    }
    assert rows.keys() == expected.keys()
    for way, (of_one, of_two, passes) in expected.items():
        assert rows[way]["passes"] == passes
        assert rows[way]["A"] == pytest.approx(of_one / passes / IMAGES, rel=0.05)
        for difference in ("A - base", "A - B"):
            assert rows[way][difference] == pytest.approx(of_two / passes / IMAGES, rel=0.05)


def test_the_images_do_not_vary():
    shifted = [table + np.arange(IMAGES)[None, :, None, None] for table in tables()]
    for one, other in zip(variance.variance_rows(*shifted), variance.variance_rows(*tables()), strict=True):
        assert one["A"] == pytest.approx(other["A"])


def test_the_table_has_standard_errors_and_ratios_to_plain_validation_of_equal_cost():
    text = variance.describe(variance.variance_rows(*tables()))
    header, _, first, second, *_ = text.splitlines()
    assert header.count("|") == first.count("|") == 6
    assert second.count("(1x)") == 3 and "(0.12" in first


def test_what_is_no_finished_run_is_one_sentence(tmp_path, capsys):
    assert variance.main(["sdxl", str(tmp_path), str(tmp_path)]) == 2
    assert variance.main(["flux", "a", "b"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all(line.startswith("error: ") for line in errors)
