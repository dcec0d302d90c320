"""What repeated measurements say: the interval of a ratio, the spread of a side, rounds that stand apart, drift."""

import math
import statistics
from collections.abc import Sequence

import numpy as np
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


def drift(runs: Sequence[tuple[Sequence[float], Sequence[int]]]) -> float | None:
    """How much longer a step took in the second half of the steps than in the first, as a share; from runs alike.

    A run is its steps' seconds and padded tokens. The half's effect on the seconds' logarithm is estimated by least
    squares, beside one of the logarithm of the tokens (a wide batch costs more for each) and each run's own level.
    None where it is less than 5%, where chance explains it (t-test, p ≥ 0.01), or where there are too few steps.
    """
    columns: list[list[float]] = []
    costs: list[float] = []
    for number, (seconds, tokens) in enumerate(runs):
        levels = [float(number == other) for other in range(len(runs))]
        for step, (second, count) in enumerate(zip(seconds, tokens, strict=True)):
            columns.append([float(step >= len(seconds) // 2), math.log(count), *levels])
            costs.append(math.log(second))
    x, y = np.array(columns), np.array(costs)
    if np.ptp(x[:, 1]) == 0:
        x = np.delete(x, 1, axis=1)
    free = len(y) - x.shape[1]
    if free < 2 or np.linalg.matrix_rank(x) < x.shape[1]:
        return None
    effects, *_ = np.linalg.lstsq(x, y, rcond=None)
    variance = float(np.sum((y - x @ effects) ** 2)) / free * float(np.linalg.inv(x.T @ x)[0, 0])
    change = _expm1(float(effects[0]))
    p = 2 * float(stats.t.sf(abs(float(effects[0])) / math.sqrt(variance), free)) if variance > 0 else 0.0
    return change if abs(change) >= DRIFT and p < DRIFT_P else None


def drift_of(records: Sequence[Record]) -> float | None:
    """The drift of the timed steps of runs of the same work."""
    runs = []
    for record in records:
        assert record.steps is not None
        timed = slice(record.timed_from, None)
        runs.append((record.steps.seconds[timed], record.steps.padded_tokens[timed]))
    return drift(runs)


def _expm1(value: float) -> float:
    return math.expm1(min(value, 700.0))  # more has no float
