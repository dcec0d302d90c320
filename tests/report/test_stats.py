"""The statistics' claims, checked on real runs of a side against itself and on generated numbers."""

import math
import statistics
from collections import defaultdict

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tunebench.record import DISTURBED, Record, parse_record
from tunebench.report.pairing import SelfComparison, against_itself
from tunebench.report.stats import (
    drift,
    is_across_zero,
    outlying,
    pooled_noise,
    ratio_interval,
    spread,
    standard_deviation,
)

DRAWS = 250  # of each row and number of rounds


@pytest.fixture(scope="module")
def records() -> list[Record]:
    """The A/A runs of tests/data/README.md."""
    return [parse_record(line) for line in (ROOT / "tests" / "data" / "aa.jsonl").read_bytes().splitlines()]


@pytest.fixture(scope="module")
def itself(records) -> list[SelfComparison]:
    """The comparisons of the A/A runs, one per row."""
    found = against_itself(records)
    assert sum(len(each.log_ratios) for each in found) * 2 == len(records) == 240
    return found


NUMBERS = st.floats(-1e100, 1e100) | st.floats(-1, 1) | st.floats(1, 1 + 1e-12) | st.just(0.1)


@settings(max_examples=1000, deadline=None, derandomize=True, database=None)
@given(st.lists(NUMBERS, min_size=2, max_size=6))
def test_deviations_are_those_of_the_statistics_module_to_the_last_bit(values):
    assert standard_deviation(values) == statistics.stdev(values)


def resampled(itself: list[SelfComparison], rounds: int, shift: float = 0.0) -> list[tuple[float, float]]:
    """Intervals of `rounds` rounds of a row, drawn without replacement, each with a random sign; b is `shift` faster.

    What is a and what b is a matter of names, so that either sign is as likely.
    """
    generator = np.random.default_rng(7)
    found = []
    for each in itself:
        for _ in range(DRAWS):
            drawn = generator.choice(each.log_ratios, size=rounds, replace=False)
            signs = generator.choice([-1, 1], size=rounds)
            found.append(
                ratio_interval(
                    [math.exp(r * s) * (1 + shift) for r, s in zip(drawn, signs, strict=True)], [1.0] * rounds
                )
            )
    return found


def share(found: list[bool]) -> float:
    return sum(found) / len(found)


@pytest.mark.parametrize(("rounds", "most"), [(2, 0.07), (3, 0.07), (4, 0.07), (8, 0.07)])
def test_a_side_against_itself_is_seldom_called_different(itself, rounds, most):
    """5% by Student's t; the limit leaves room for 15 rounds a row. Wrong signs or degrees of freedom exceed it."""
    assert share([not is_across_zero(interval) for interval in resampled(itself, rounds)]) <= most


@pytest.mark.parametrize("rounds", [2, 3, 4, 8])
def test_the_interval_covers_a_true_difference(itself, rounds):
    covered = [low <= 0.1 <= high for low, high in resampled(itself, rounds, 0.1)]
    assert 0.93 <= share(covered) <= 0.99


@pytest.mark.parametrize(
    ("rounds", "shift", "least", "most"),
    [
        *((4, 0.05, 0.2, 0.45), (4, 0.1, 0.6, 0.85), (4, 0.25, 0.97, 1.0)),
        *((3, 0.1, 0.35, 0.6), (8, 0.05, 0.5, 0.8), (8, 0.1, 0.97, 1.0)),
    ],
)
def test_a_true_difference_is_found(itself, rounds, shift, least, most):
    """A difference that exists is found: b is faster by `shift`, with the machine's own noise."""
    assert least <= share([low > 0 for low, _ in resampled(itself, rounds, shift)]) <= most


def test_a_single_round_lies_within_the_noise(itself):
    noise = pooled_noise([each.log_ratios for each in itself])
    sizes = [abs(math.expm1(ratio)) for each in itself for ratio in each.log_ratios]
    assert share([size <= noise.worth(1) for size in sizes]) >= 0.93
    assert 0.6 <= share([size <= noise.worth(1) / 2 for size in sizes]) <= 0.93, "the noise is not too large"


def test_nothing_disturbed_the_recorded_runs(records):
    """Each run was timed for at least five seconds (which resolve 1% of a core), and none was disturbed."""
    assert min(record.conditions.seconds for record in records) >= 5.0
    assert max(record.disturbance[0] for record in records) < DISTURBED


def test_rounds_that_are_not_side_by_side_are_noisier(itself, records):
    """Pairs of one round have less noise than pairs of different rounds."""
    paired = pooled_noise([each.log_ratios for each in itself]).deviation
    series = defaultdict(lambda: {"a": [], "b": []})
    for record in sorted(records, key=lambda record: record.started_at):
        side = series[record.framework, record.method, record.model.name][record.aa]
        side.append(math.log(record.effective_tokens_per_second))
    apart = [[b - a for a, b in zip(s["a"], s["b"][7:] + s["b"][:7], strict=True)] for s in series.values()]
    assert pooled_noise(apart).deviation > 1.2 * paired


def test_the_interval_is_scipys():
    ours, theirs = [100.0, 120.0, 90.0, 130.0], [80.0, 85.0, 82.0, 99.0]
    ratios = [math.log(a / b) for a, b in zip(ours, theirs, strict=True)]
    expected = stats.ttest_1samp(ratios, 0.0).confidence_interval(0.95)
    assert [math.log1p(end) for end in ratio_interval(ours, theirs)] == pytest.approx(list(expected))
    assert ratio_interval([2.0, 4.0], [1.0, 2.0]) == pytest.approx((1.0, 1.0))
    assert ratio_interval([2.0], [1.0]) is None


def test_pooled_noise_is_within_rows_and_by_t_of_six_degrees_at_most():
    rows = [[0.1, 0.12, 0.08], [-0.3, -0.3], [0.5]]
    noise = pooled_noise(rows)
    assert noise.freedom == 3
    assert noise.deviation == pytest.approx(math.sqrt((2 * 0.02**2 + 0.0) / 3))
    assert math.log1p(noise.worth(4)) == pytest.approx(stats.t(3).ppf(0.975) * noise.deviation / 2)
    many = pooled_noise([[0.0, 0.01]] * 50)
    assert math.log1p(many.worth(1)) == pytest.approx(stats.t(6).ppf(0.975) * many.deviation)
    assert pooled_noise([[0.1], [], [0.2]]) is None


def test_nine_of_ten_differences_of_one_round_lie_within_the_noise():
    """At least 95% of new rounds lie within the noise of 8 rows of 4 rounds."""
    generator = np.random.default_rng(5)
    inside = 0
    for _ in range(1000):
        rows = generator.normal(0, 0.03, size=(8, 4)).tolist()
        inside += abs(math.expm1(generator.normal(0, 0.03))) <= pooled_noise(rows).worth(1)
    assert 0.95 <= inside / 1000 <= 0.995


def test_the_interval_covers_the_truth_as_often_as_it_says():
    ratios = stats.norm(math.log(1.3), 0.1).rvs(size=(1000, 4), random_state=1)
    covered = 0
    for logs in ratios:
        low, high = ratio_interval([math.exp(log) for log in logs], [1.0] * 4)
        covered += low <= 0.3 <= high
    assert 0.93 <= covered / 1000 <= 0.97


def test_spread_is_relative():
    assert spread([100.0, 101.0, 99.0]) == pytest.approx(0.01, rel=0.01)
    assert spread([1000.0, 1010.0, 990.0]) == pytest.approx(0.01, rel=0.01)
    assert spread([5.0]) is None


def test_what_stands_apart():
    assert outlying([100, 101, 99, 100.5, 150]) == [4]
    assert outlying([100, 101, 99, 100.5, 50, 102]) == [4]
    assert outlying([100, 101, 99, 100.5, 105]) == []
    assert outlying([100, 100.1, 150]) == []  # three values are too few
    assert outlying([100, 100, 100, 100]) == []


def test_drift_is_of_the_same_batches_and_no_noise():
    batches = [0.1, 0.2, 0.15, 0.3, 0.12]
    steady = [second * (1 + 0.01 * (-1) ** i) for i, second in enumerate([*batches, *batches])]
    assert drift([steady]) is None
    assert drift([[*steady[:5], 9.0, *steady[5:]]]) is None  # the middle one of an odd number is left out
    warming = [second * (1.3 if i < 5 else 1.0) for i, second in enumerate(steady)]
    assert drift([warming]) == pytest.approx(1 / 1.3 - 1, abs=0.03)
    slowing = [second * (1.0 if i < 5 else 1.3) for i, second in enumerate(steady)]
    assert drift([slowing]) == pytest.approx(0.3, abs=0.03)
    assert drift([[second * 1.3 ** (i % 2) for i, second in enumerate(slowing)]]) is None  # noise may explain it
    assert drift([[1.0, 1.0]]) is None
    assert drift([[1.0, 1.04, 1.0, 1.04]]) is None  # less than 5%


def test_several_runs_tell_of_a_drift_that_one_cannot():
    noise = stats.norm(0, 0.1).rvs(size=(40, 8), random_state=3)
    runs = [[math.exp(value) * (1.0 if i < 4 else 0.85) for i, value in enumerate(steps)] for steps in noise]
    assert sum(drift([run]) is not None for run in runs) < 20
    assert drift(runs) == pytest.approx(-0.15, abs=0.03)


def test_chance_is_seldom_called_a_drift():
    noise = stats.norm(0, 0.1).rvs(size=(1000, 10), random_state=2)
    called = [drift([[math.exp(value) for value in steps]]) for steps in noise]
    assert sum(change is not None for change in called) <= 20
