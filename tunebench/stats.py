"""What repeated measurements say: the interval of a ratio, the spread of a side, rounds that stand apart, drift."""

import math
import statistics
from collections.abc import Sequence

import numpy as np
from scipy import special

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
    mean, error = statistics.fmean(ratios), statistics.stdev(ratios) / math.sqrt(len(ratios))
    margin = float(special.stdtrit(len(ratios) - 1, 0.975)) * error
    return _expm1(mean - margin), _expm1(mean + margin)


def is_across_zero(interval: tuple[float, float]) -> bool:
    """Whether the interval of a difference claims none."""
    return interval[0] <= 0 <= interval[1]


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


def drift(runs: Sequence[Sequence[float]], tokens: Sequence[int]) -> float | None:
    """How much longer a step took in the second half of the steps than in the first, as a share; from runs alike.

    `runs` has each run's seconds, `tokens` the padded tokens of the steps. The half's effect on the mean logarithm of a
    step's seconds is estimated by least squares, beside one of the tokens' logarithm: a wide batch costs more for each.
    None where it is less than 5%, where chance explains it (t-test, p ≥ 0.01), or where there are too few steps.
    """
    logs = np.log(np.array(runs)).mean(axis=0)
    later = (np.arange(len(tokens)) >= len(tokens) // 2).astype(float)
    columns = [later, np.ones(len(tokens))] + [np.log(np.array(tokens, dtype=float))] * (len(set(tokens)) > 1)
    x, free = np.stack(columns, axis=1), len(tokens) - len(columns)
    if free < 2:
        return None
    effects, _, rank, _ = np.linalg.lstsq(x, logs, rcond=None)
    effect = float(effects[0])
    change = _expm1(effect)
    if rank < len(columns) or abs(change) < DRIFT:
        return None
    variance = float(np.sum((logs - x @ effects) ** 2)) / free * float(np.linalg.inv(x.T @ x)[0, 0])
    p = 2 * float(special.stdtr(free, -abs(effect) / math.sqrt(variance))) if variance > 0 else 0.0
    return change if p < DRIFT_P else None


def drift_of(records: Sequence[Record]) -> float | None:
    """The drift of the timed steps of runs of the same work."""
    steps = [record.steps for record in records if record.steps]
    timed = slice(records[0].timed_from, None)
    return drift([each.seconds[timed] for each in steps], steps[0].padded_tokens[timed])


def drift_in_words(change: float) -> str:
    """What it may be, and what to do next."""
    what, advice = "was not warm", "raise --warmup-steps"
    if change > 0:
        what, advice = "slowed down", "see what else runs here, and the clocks"
    return f"{what}: steps took {change:+.0%} in the second half of the timed ones; {advice}"


def _expm1(value: float) -> float:
    return math.expm1(min(value, 700.0))  # more has no float
