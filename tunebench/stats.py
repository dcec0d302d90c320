"""What repeated measurements say: the interval of a ratio, the spread of a side, rounds that stand apart, drift."""

import math
import statistics
from collections.abc import Sequence

from scipy import stats

from tunebench.record import Record

# As hyperfine has it: ten standard deviations, estimated by the median absolute deviation (which is 0.6745 of one).
OUTLYING = 14.826
FEWEST = 4  # of three normal rounds one would stand apart in 11 of 100 cases, of four in 2 (simulated)
DRIFT, DRIFT_P = 0.05, 0.01  # smaller drifts, and those that chance explains, are not reported


def ratio_interval(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float] | None:
    """The 95% interval of ours ÷ theirs − 1, by Student's t of the rounds' log ratios.

    The k-th of both are a round. None with fewer than two rounds, or where one side has more.
    """
    if len(ours) != len(theirs) or len(ours) < 2:
        return None
    ratios = [math.log(a) - math.log(b) for a, b in zip(ours, theirs, strict=True)]
    mean, error = statistics.mean(ratios), float(stats.sem(ratios))
    low, high = stats.t.interval(0.95, len(ratios) - 1, mean, error) if error else (mean, mean)
    return _expm1(low), _expm1(high)


def spread(rates: Sequence[float]) -> float | None:
    """The standard deviation of the rates' logarithms, which is their relative one; None with fewer than two."""
    return statistics.stdev(map(math.log, rates)) if len(rates) > 1 else None


def outlying(rates: Sequence[float]) -> list[int]:
    """Which rates stand apart, by index: whose logarithm is over 14.826 times as far from the median as the median one.

    Empty with fewer than four, which do not tell.
    """
    if len(rates) < FEWEST:
        return []
    logs = [math.log(rate) for rate in rates]
    middle = statistics.median(logs)
    distances = [abs(log - middle) for log in logs]
    typical = statistics.median(distances)
    return [i for i, distance in enumerate(distances) if distance > OUTLYING * typical]


def drift(seconds: Sequence[float], tokens: Sequence[int]) -> float | None:
    """How much longer a token took in the second half of the steps than in the first, as a share of it.

    None where that is less than 5%, or where Welch's t-test of the steps' logarithms gives it to chance (p ≥ 0.01).
    """
    costs = [math.log(second) - math.log(count) for second, count in zip(seconds, tokens, strict=True)]
    first, second = costs[: len(costs) // 2], costs[len(costs) // 2 :]
    if len(first) < 2 or min(len(set(first)), len(set(second))) < 2:
        return None
    change = _expm1(statistics.mean(second) - statistics.mean(first))
    about = [(statistics.mean(half), statistics.stdev(half), len(half)) for half in (first, second)]
    p = stats.ttest_ind_from_stats(*about[0], *about[1], equal_var=False).pvalue
    return change if abs(change) >= DRIFT and p < DRIFT_P else None


def drift_of(record: Record) -> float | None:
    """The drift of a run's timed steps, per token of their padded batches."""
    assert record.steps is not None
    timed = slice(record.timed_from, None)
    return drift(record.steps.seconds[timed], record.steps.padded_tokens[timed])


def _expm1(value: float) -> float:
    return math.expm1(min(value, 700.0))  # more has no float
