"""Paired timing and its statistics; all times here are simulated, so nothing depends on the machine."""

import gc
import math

import numpy as np
import pytest
from scipy.stats import binomtest

from benchmarking import paired_timing
from benchmarking.paired_timing import alternate, bootstrap_interval, calls_per_block, compare_timings, sign_test


def simulate(rng: np.random.Generator, rounds: int, ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of A and B per round: a drift common to both (a factor of e per deviation), and 5 % of noise in either."""
    drift = np.exp(rng.normal(0, 1, rounds))
    noise = np.exp(rng.normal(0, 0.05, (2, rounds)))
    return ratio * drift * noise[0], drift * noise[1]


@pytest.mark.parametrize(("rounds", "ratio"), [(9, 1.3), (9, 1.0), (15, 0.8)])
def test_the_interval_holds_the_true_ratio_about_as_often_as_it_says(rounds, ratio):
    rng = np.random.default_rng(rounds)
    hits = 0
    for _ in range(3000):
        found = compare_timings(*simulate(rng, rounds, ratio))
        hits += found.low <= ratio <= found.high
    # The interval ends on ratios that occurred, so its coverage is not 95 % but 96.1 % for 9 rounds and 96.5 % for 15.
    # The standard deviation over 3,000 trials is 0.35 %: the margin is three of them below 96.1 % and above 96.5 %.
    assert 0.950 < hits / 3000 < 0.976


@pytest.mark.parametrize("n", [9, 15, 21])
def test_the_interval_is_that_of_a_great_many_resamples(n):
    rng = np.random.default_rng(n)
    ratios = rng.lognormal(0, 0.1, n)
    medians = np.median(ratios[rng.integers(n, size=(200_000, n))], axis=1)
    for level in (0.8, 0.95):
        limits = np.quantile(medians, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
        assert bootstrap_interval(ratios.tolist(), level) == tuple(limits)


def test_pairing_takes_the_drift_out():
    a, b = simulate(np.random.default_rng(0), 15, 1.3)
    assert a.max() / a.min() > 5  # the machine was up to five times slower in some rounds than in others
    found = compare_timings(a, b)
    assert found.rounds == 15
    assert found.low < 1.3 < found.high and found.high / found.low < 1.15
    assert found.low <= found.ratio <= found.high
    # Comparing the medians of unpaired times would be off by far more than that interval is wide.
    b_shuffled = np.random.default_rng(1).permutation(b)
    assert compare_timings(a, b_shuffled).high / compare_timings(a, b_shuffled).low > 3


def test_compare_takes_the_median_of_ratios_a_over_b():
    b = np.array([1.0, 10.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    a = b * [2, 2, 2, 2, 1.5, 2.5, 2.5, 0.5, 2]
    found = compare_timings(a, b)
    assert found.ratio == 2
    assert found.p_value == sign_test(a / b) == 20 / 512
    with pytest.raises(AssertionError):
        compare_timings(a[:8], b[:8])


def test_for_nine_rounds_the_interval_is_the_second_and_the_eighth():
    assert bootstrap_interval([1.9, 1.2, 1.4, 1.1, 1.8, 1.3, 1.6, 1.7, 1.5]) == (1.2, 1.8)
    with pytest.raises(AssertionError):
        bootstrap_interval([1.0] * 10)


def test_the_sign_test_is_the_binomial_test():
    for n in range(1, 20):
        for above in range(n + 1):
            ratios = [1.1] * above + [0.9] * (n - above)
            assert math.isclose(sign_test(ratios), binomtest(above, n).pvalue, rel_tol=1e-12)
            assert sign_test([*ratios, 1.0, 1.0]) == sign_test(ratios)
    assert sign_test([1.0] * 9) == 1.0


def test_equal_variants_are_seldom_called_different():
    rng = np.random.default_rng(3)
    outside = small = 0
    for _ in range(3000):
        found = compare_timings(*simulate(rng, 9, 1.0))
        outside += not found.low <= 1 <= found.high
        small += found.p_value <= 0.05
    # Both happen when at most one ratio of nine is on one side of 1: 20/512 = 3.9 %, give or take three standard
    # deviations of 3,000 trials (0.35 % each).
    assert 0.028 < outside / 3000 < 0.050
    assert small == outside


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    """Rounds collect garbage before every block, which takes a tenth of a second where torch is loaded."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


class Machine:
    """A clock that only steps move, and the pressure that the rounds are to see."""

    def __init__(self, pressures=None, drift=0.0):
        self.now, self.cpu, self.waited, self.drift = 0.0, 0.0, 0.0, drift
        self.pressures = pressures
        self.events: list[object] = []

    def step(self, name, seconds):
        def step(index):
            self.events.append((name, index))
            # The drift is a straight line over the calls, whoever makes them.
            taken = seconds + self.drift * sum(isinstance(event, tuple) for event in self.events)
            self.now += taken
            self.cpu += seconds / 2

        return step

    def read_waited(self):
        # Twice per round: before and after; the second time, the round's share of the time since has passed waiting.
        if self.pressures is None:
            return None
        self.events.append("waited")
        reads = self.events.count("waited")
        if reads % 2 == 1:
            self.started = self.now
        else:
            self.waited += self.pressures[min(reads // 2 - 1, len(self.pressures) - 1)] * (self.now - self.started)
        return self.waited

    def run(self, a, b, **settings):
        options = {"rounds": 9, "warmup": 0, "calls": 2, "max_pressure": 0.5, "limit": 1e9} | settings
        return list(
            alternate(
                self.step("A", a),
                self.step("B", b),
                **options,
                synchronize=lambda: self.events.append("sync"),
                clocks=paired_timing.Clocks(
                    wall=lambda: self.now, cpu=lambda: self.cpu, waited=self.read_waited, load=lambda: 1.5
                ),
            )
        )


def test_a_round_is_four_blocks_and_both_variants_get_the_same_indices():
    machine = Machine()
    rounds = machine.run(2.0, 1.0, first=5)
    assert len(rounds) == 9
    assert {done.order for done in rounds} == {"ABBA", "BAAB"}  # by lot: nine of one kind are not what seed 0 gives
    for done in rounds:
        assert (done.a, done.b, done.a_cpu, done.b_cpu) == (2.0, 1.0, 1.0, 0.5)
        assert (done.load, done.pressure, done.status) == (1.5, None, "kept")
    # The first round: each block between two waits for the device, none inside.
    letters = list(rounds[0].order)
    indices = {"A": iter(range(5, 9)), "B": iter(range(5, 9))}
    expected = []
    for letter in letters:
        expected += ["sync", (letter, next(indices[letter])), (letter, next(indices[letter])), "sync"]
    assert machine.events[: len(expected)] == expected
    # The second round goes on where the first ended.
    assert {index for event in machine.events[len(expected) : 2 * len(expected)] if event != "sync" for index in event[1:]} == {
        9, 10, 11, 12,
    }  # fmt: skip


def test_a_steady_drift_within_the_rounds_cancels_exactly():
    # Whole numbers, so that sums of floats are exact.
    rounds = Machine(drift=1.0).run(1.0, 1.0, rounds=15)
    assert rounds[-1].a > 10 * rounds[0].a
    found = compare_timings([done.a for done in rounds], [done.b for done in rounds])
    assert (found.ratio, found.low, found.high, found.p_value) == (1.0, 1.0, 1.0, 1.0)


def test_the_order_follows_the_seed():
    orders = [tuple(done.order for done in Machine().run(1.0, 1.0, seed=seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert gc.get_freeze_count() == 0  # the garbage collector is as it was


def test_a_busy_round_is_reported_and_done_again():
    rounds = Machine(pressures=[0.9, 0.1, 0.6, 0.5, 0.0]).run(1.0, 1.0)
    assert [done.status for done in rounds[:5]] == ["busy", "kept", "busy", "kept", "kept"]
    assert [round(done.pressure, 6) for done in rounds[:4]] == [0.9, 0.1, 0.6, 0.5]
    assert sum(done.status == "kept" for done in rounds) == 9 and len(rounds) == 11


def test_a_machine_that_stays_busy_is_given_up_on():
    # A round takes 8 seconds: four blocks of two calls.
    rounds = Machine(pressures=[1.0]).run(1.0, 1.0, warmup=2, limit=33)
    assert [done.status for done in rounds] == ["warm-up"] * 2 + ["busy"] * 3


def test_warm_up_rounds_come_first_and_do_not_count():
    rounds = Machine(pressures=[0.0]).run(1.0, 1.0, warmup=2)
    assert [done.status for done in rounds] == ["warm-up"] * 2 + ["kept"] * 9


def test_calls_per_block_goes_by_the_faster_variant():
    machine = Machine()
    a, b = machine.step("A", 0.2), machine.step("B", 0.1)
    assert calls_per_block(a, b, 0.45, first=7, clock=lambda: machine.now) == 5
    assert machine.events == [("A", 7), ("A", 8), ("B", 7), ("B", 8)]
    assert calls_per_block(a, b, 0.0, clock=lambda: machine.now) == 1


def test_the_kernel_s_count_of_waiting_is_read_in_seconds(tmp_path, monkeypatch):
    file = tmp_path / "cpu"
    monkeypatch.setattr(paired_timing, "PRESSURE", file)
    assert paired_timing.cpu_waited() is None
    file.write_text(
        "some avg10=1.55 avg60=5.87 avg300=7.40 total=51008594\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7\n"
    )
    assert paired_timing.cpu_waited() == 51.008594


def result(**changes):
    comparison = {"ratio": 1.731, "low": 1.69, "high": 1.784, "p_value": 0.0039, "rounds": 9}
    return {
        "pair": "caches",
        "model": "sdxl",
        "profile": "tiny",
        "variants": {"a": "without caches", "b": "with caches"},
        "time": comparison,
        "cpu_time": comparison | {"ratio": 1.7, "low": 1.6, "high": 1.8},
        "seconds_per_step": {"a": 0.1731, "b": 0.1},
        "discarded": 0,
        "parity": {"steps": 4, "largest_relative_difference": 0.0},
        "counts": {
            "a": {"ops": 3000, "dtype_copies": 12, "saved_bytes": 5000},
            "b": {"ops": 2000, "dtype_copies": 5, "saved_bytes": 4000},
        },
        "memory": None,
        "config": {"batch_size": 1},
        "machine": {"device": "some CPU", "cpus": 2, "threads": 1},
    } | changes


def test_the_result_as_text():
    first, by_cpu, *rest = paired_timing.sentence(result()).splitlines()
    assert first == (
        "sdxl: a step without caches takes 1.73 times as long as one with caches (95 %: 1.69-1.78, 9 rounds; sign test p = 0.0039)"
    )
    assert by_cpu == "  by CPU time: 1.70 times (95 %: 1.60-1.80)"
    assert not any("no difference" in line for line in rest)
    assert any("173.1 ms and 100 ms" in line and "some CPU" in line for line in rest)
    assert not any("GiB" in line for line in rest)
    busy = paired_timing.sentence(result(discarded=3, memory={"a": 2**31, "b": 2**30}))
    assert "9 rounds, 3 more skipped because the machine was busy" in busy
    assert "peak memory 2.00 GiB and 1.00 GiB" in busy
    equal = result()["time"] | {"low": 0.98}
    assert "no difference has been shown" in paired_timing.sentence(result(time=equal))


def test_a_table_row_has_a_cell_for_every_column():
    row = paired_timing.table_row(result(), "some.json")
    assert row.startswith("| caches | sdxl, tiny | some CPU | 1.731 (1.690-1.784) | 1.700 (1.600-1.800) | 9 |")
    assert row.endswith("| 3,000; 2,000 | 12; 5 | `some.json` |")
    assert row.count("|") == paired_timing.TABLE_HEAD.splitlines()[0].count("|")
