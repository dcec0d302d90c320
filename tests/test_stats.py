"""What the statistics claim: about real runs of a side against itself, and about numbers made for the purpose."""

import math
import statistics
from collections import defaultdict

import pytest
from conftest import ROOT
from scipy import stats

from tunebench.join import Itself, against_itself
from tunebench.record import Record, parse_record
from tunebench.stats import drift, outlying, ratio_interval, spread

ROUNDS = 3  # of a comparison, as in the suite `quick`


@pytest.fixture(scope="module")
def sets() -> list[list[Record]]:
    """A/A runs by what was run, ROUNDS rounds each: those of tests/data/README.md, cut in the order they were made."""
    series = defaultdict(lambda: {"a": [], "b": []})
    for line in (ROOT / "tests" / "data" / "aa.jsonl").read_bytes().splitlines():
        record = parse_record(line)
        series[record.framework, record.method, record.model.name][record.aa].append(record)
    found = []
    for sides in series.values():
        a, b = (sorted(side, key=lambda record: record.started_at) for side in sides.values())
        assert len(a) == len(b)
        assert len(a) % ROUNDS == 0
        found += [a[i : i + ROUNDS] + b[i : i + ROUNDS] for i in range(0, len(a), ROUNDS)]
    return found


def compare(runs: list[Record], factor: float = 1.0) -> Itself:
    """The comparison of one set, the runs of side b `factor` times as slow."""
    slowed = [
        record.model_copy(
            update={"steps": record.steps.model_copy(update={"seconds": [s * f for s in record.steps.seconds]})}
        )
        for record in runs
        for f in [factor if record.aa == "b" else 1.0]
    ]
    (comparison,) = against_itself(slowed)
    assert comparison.runs == (ROUNDS, ROUNDS)
    return comparison


def claims(comparison: Itself) -> bool:
    return not comparison.interval[0] <= 0 <= comparison.interval[1]


def test_of_40_comparisons_of_a_side_with_itself_few_claim_a_difference(sets):
    assert len(sets) == 40
    assert sum(claims(compare(runs)) for runs in sets) <= 4


def test_the_same_runs_show_a_difference_where_there_is_one(sets):
    """Or the test above could not fail: b takes 25% longer, and still with the machine's own noise."""
    slowed = [compare(runs, 1.25) for runs in sets]
    assert sum(map(claims, slowed)) >= 36
    assert statistics.median(comparison.difference for comparison in slowed) == pytest.approx(-0.2, abs=0.02)


def test_the_interval_is_scipys():
    ours, theirs = [100.0, 120.0, 90.0, 130.0], [80.0, 85.0, 82.0, 99.0]
    ratios = [math.log(a / b) for a, b in zip(ours, theirs, strict=True)]
    expected = stats.ttest_1samp(ratios, 0.0).confidence_interval(0.95)
    assert [math.log1p(end) for end in ratio_interval(ours, theirs)] == pytest.approx(list(expected))
    assert ratio_interval([2.0, 4.0], [1.0, 2.0]) == pytest.approx((1.0, 1.0))
    assert ratio_interval([2.0], [1.0]) is None
    assert ratio_interval([2.0, 2.0], [1.0]) is None


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
    assert outlying([100, 100.1, 150]) == []  # three do not tell
    assert outlying([100, 100, 100, 100]) == []


def test_drift_is_beside_the_width_of_batches_and_no_noise():
    tokens = [100, 200, 150, 300, 120, 240, 110, 220]
    steady = [count**1.3 * 0.01 * (1 + 0.01 * (-1) ** (i // 2)) for i, count in enumerate(tokens)]
    assert drift([steady], tokens) is None
    warming = [second * (1.3 if i < 4 else 1.0) for i, second in enumerate(steady)]
    assert drift([warming], tokens) == pytest.approx(1 / 1.3 - 1, abs=0.02)
    slowing = [second * (1.0 if i < 4 else 1.3) for i, second in enumerate(steady)]
    assert drift([slowing], tokens) == pytest.approx(0.3, abs=0.02)
    noisy = [count * 0.01 * factor for count, factor in zip(tokens, [1, 2, 1, 2, 1.1, 2.5, 1.2, 2.4], strict=True)]
    assert drift([noisy], tokens) is None
    assert drift([[1.0, 1.0]], [1, 1]) is None
    assert drift([[1.0] * 8], [1, 1, 1, 1, 2, 2, 2, 2]) is None  # the widths may be the reason


def test_several_runs_tell_of_a_drift_that_one_cannot():
    noise = stats.norm(0, 0.1).rvs(size=(40, 8), random_state=3)
    runs = [[math.exp(value) * (1.0 if i < 4 else 0.85) for i, value in enumerate(steps)] for steps in noise]
    assert sum(drift([run], [100] * 8) is not None for run in runs) < 20
    assert drift(runs, [100] * 8) == pytest.approx(-0.15, abs=0.03)


def test_chance_is_seldom_called_a_drift():
    noise = stats.norm(0, 0.1).rvs(size=(1000, 10), random_state=2)
    called = [drift([[math.exp(value) for value in steps]], list(range(100, 110))) for steps in noise]
    assert sum(change is not None for change in called) <= 20
