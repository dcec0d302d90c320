"""What repeated measurements say: the interval of a ratio, the spread of a side, rounds that stand apart, drift."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy import special

from tunebench.record import Record

# As hyperfine has it: ten standard deviations, estimated by the median absolute deviation (which is 0.6745 of one).
OUTLYING = 14.826
FEWEST = 4  # of three normal rounds one would stand apart in 11 of 100 cases, of four in 2 (simulated)
SAME = 0.03  # differences whose interval lies within ± this are called the same
MOST_FREEDOM = 6  # of pooled noise: rows differ in it, so that their number says less than it seems
DRIFT, DRIFT_P = 0.05, 0.01  # smaller drifts, and those that chance explains, are not reported


def ratio_interval(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float] | None:
    """The 95% interval of ours ÷ theirs - 1, by Student's t of the rounds' log ratios; None with fewer than two rounds.

    The k-th of both are a round.
    """
    if len(ours) < 2:
        return None
    ratios = log_ratios(ours, theirs)
    margin = _t95(len(ratios) - 1) * statistics.stdev(ratios) / math.sqrt(len(ratios))
    mean = statistics.fmean(ratios)
    return _expm1(mean - margin), _expm1(mean + margin)


def log_ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """The logarithm of ours ÷ theirs of each round."""
    return [math.log(a) - math.log(b) for a, b in zip(ours, theirs, strict=True)]


class Noise(NamedTuple):
    """How much comparisons of a side with itself scatter: the pooled standard deviation of their log ratios within a
    row, and its degrees of freedom."""

    deviation: float
    freedom: int

    def worth(self, rounds: int) -> float:
        """What a difference of so many rounds is worth, as a share: it is ± this in 95 of 100 cases without one."""
        return _expm1(_t95(min(MOST_FREEDOM, self.freedom)) * self.deviation / math.sqrt(rounds))


def pooled_noise(rows: Sequence[Sequence[float]]) -> Noise | None:
    """The noise of rows of log ratios, a number for each round; None where no row has two."""
    freedom = sum(len(row) - 1 for row in rows if row)
    if freedom < 1:
        return None
    squares = sum((len(row) - 1) * statistics.variance(row) for row in rows if len(row) > 1)
    return Noise(math.sqrt(squares / freedom), freedom)


def is_across_zero(interval: tuple[float, float]) -> bool:
    """Whether the interval of a difference has 0 in it."""
    return interval[0] <= 0 <= interval[1]


def is_within(interval: tuple[float, float], limit: float = SAME) -> bool:
    """Whether the whole interval of a difference lies within ± `limit`."""
    return -limit < interval[0] and interval[1] < limit


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
    return [i for i, distance in enumerate(distances) if distance > max(OUTLYING * typical, 1e-9)]  # or is rounding


def drift(runs: Sequence[Sequence[float]]) -> float | None:
    """How much longer a step took in the second half of the steps than in the first, as a share; from runs alike.

    `runs` has each run's seconds of steps whose second half has the batches of the first again, in the same order (of
    an odd number the middle one is left out). Each batch gives the log ratio of its two steps, the mean of the runs.
    None where they are less than 5% apart, or where chance explains it (paired t-test, p ≥ 0.01).
    """
    half = len(runs[0]) // 2
    if half < 2:
        return None
    means = [statistics.fmean(map(math.log, seconds)) for seconds in zip(*runs, strict=True)]
    ratios = [later - first for first, later in zip(means[:half], means[len(means) - half :], strict=True)]
    change, error = statistics.fmean(ratios), statistics.stdev(ratios) / math.sqrt(half)
    if abs(_expm1(change)) < DRIFT:
        return None
    p = 2 * float(special.stdtr(half - 1, -abs(change) / error)) if error > 0 else 0.0
    return _expm1(change) if p < DRIFT_P else None


def drift_of(records: Sequence[Record]) -> float | None:
    """The drift of the timed steps of runs of the same setup; None where batches do not come twice."""
    if not all(map(has_paired_halves, records)):
        return None
    return drift([record.steps.seconds[record.timed_from :] for record in records if record.steps])


def drift_between(rounds: Sequence[tuple[Record, Record]]) -> float | None:
    """How much the ratio of two sides' step times changed from the first half of the timed steps to the second."""
    if not rounds or not all(has_paired_halves(record) for pair in rounds for record in pair):
        return None
    timed = ([record.steps.seconds[record.timed_from :] for record in pair if record.steps] for pair in rounds)
    return drift([[a / b for a, b in zip(*pair, strict=True)] for pair in timed])


def has_paired_halves(record: Record) -> bool:
    """Whether the second half of the timed steps has the batches of the first, by their counts of tokens."""
    if record.steps is None:
        return False
    steps, half = record.steps, (len(record.steps.seconds) - record.timed_from) // 2
    counts = list(zip(steps.effective_tokens, steps.padded_tokens, steps.label_tokens, strict=True))
    return half > 0 and counts[record.timed_from :][:half] == counts[-half:]


def drift_in_words(change: float) -> str:
    """What it may be, and what to do next."""
    what, advice = "was not warm", "raise --warmup-steps"
    if change > 0:
        what, advice = "slowed down", "see what else runs here, and the clocks"
    return f"{what}: steps took {change:+.0%} in the second half of the timed ones; {advice}"


def _t95(freedom: int) -> float:
    return float(special.stdtrit(freedom, 0.975))


def _expm1(value: float) -> float:
    return math.expm1(min(value, 700.0))  # more has no float
