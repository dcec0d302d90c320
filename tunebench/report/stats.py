"""Statistics of repeated measurements: intervals of ratios, spread, noise, outlying rounds, drift."""

import functools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy import special

from tunebench.record import Record

# hyperfine's rule: ten standard deviations, where the median absolute deviation is 0.6745 standard deviations.
OUTLYING = 14.826
FEWEST = 4  # simulated: among three normal rounds one stands apart in 11% of cases, among four in 2%
SAME = 0.03  # a difference counts as none where its interval lies within ± this
MOST_FREEDOM = 6  # limit of pooled noise's degrees of freedom: rows differ in their noise, so more would claim too much
DRIFT, DRIFT_P = 0.05, 0.01  # smaller drifts are not reported, nor are those that chance explains
# Quantiles of Student's t for a 95% interval: of a given number of rounds, and of rounds that were added until the
# interval was narrow (run_all.sh --until). That looks at these numbers of rounds alone. See docs/method.md.
PLAIN, WIDENED = 0.975, 0.9875
LOOKS = (4, 6, 8, 10, 12)
TOLD, POWER = 0.05, 0.8  # a difference of TOLD is to be told from none with this probability
MANY_ROUNDS = 1000  # from so many on Student's t is as good as normal


def ratio_interval(
    ours: Sequence[float], theirs: Sequence[float], quantile: float = PLAIN
) -> tuple[float, float] | None:
    """The 95% interval of ours ÷ theirs - 1, by the `quantile` of Student's t of the rounds' log ratios.

    `ours[k]` and `theirs[k]` are a round's rates. None with fewer than two rounds.
    """
    ratios = log_ratios(ours, theirs)
    return interval_of(ratios, standard_deviation(ratios) if len(ratios) > 1 else None, quantile)


def interval_of(
    ratios: Sequence[float], deviation: float | None, quantile: float = PLAIN
) -> tuple[float, float] | None:
    """`ratio_interval` of log ratios, from their standard deviation. None where there is none."""
    if deviation is None:
        return None
    mean, margin = statistics.fmean(ratios), _margin(len(ratios), deviation, quantile)
    return _expm1(mean - margin), _expm1(mean + margin)


def rate_interval(rates: Sequence[float]) -> tuple[float, float] | None:
    """The 95% interval of the geometric mean of rates, by Student's t of their logarithms.

    It holds the machine's drift, which the sides of a round share: whether sides differ, `ratio_interval` tells. None
    with fewer than two rates.
    """
    deviation = spread(rates)
    return None if deviation is None else mean_interval(statistics.geometric_mean(rates), deviation, len(rates))


def mean_interval(mean: float, deviation: float, runs: int) -> tuple[float, float]:
    """`rate_interval` of so many runs, from the geometric mean of their rates and its `spread`."""
    margin = _t(runs - 1, PLAIN) * deviation / math.sqrt(runs)
    middle = math.log(mean)
    return math.exp(middle - margin), math.exp(min(middle + margin, 700.0))


def margin_of(ratios: Sequence[float], quantile: float = PLAIN) -> float | None:
    """Half the width of the interval of log ratios; None with fewer than two."""
    return _margin(len(ratios), standard_deviation(ratios), quantile) if len(ratios) > 1 else None


def is_narrow(ratios: Sequence[float], target: float) -> bool:
    """Whether --until has enough rounds: half the widened interval is below `target`, a share."""
    margin = margin_of(ratios, WIDENED)
    return margin is not None and margin < math.log1p(target)


def rounds_to_tell(deviation: float, difference: float = TOLD) -> int:
    """The rounds after which a true `difference`, a share, is told from none with probability POWER.

    An even number, since the order of the sides alternates. `deviation` is the standard deviation of the rounds' log
    ratios. The power of Student's two-sided t-test at 5% is that of the noncentral t distribution (J. Cohen,
    Statistical Power Analysis for the Behavioral Sciences, 1988, chapter 2; in R `power.t.test` with `strict = TRUE`).
    """
    if deviation <= 0:
        return 2
    size = math.log1p(difference) / deviation
    # By the normal distribution: fewer than by Student's t, but for many rounds nearly as many.
    least = ((float(special.ndtri(PLAIN)) + float(special.ndtri(POWER))) / size) ** 2
    rounds = max(2, 2 * math.ceil(least / 2))
    while rounds < MANY_ROUNDS:
        limit, shift = _t(rounds - 1, PLAIN), size * math.sqrt(rounds)
        # With a shift of several limits the test cannot miss, and the distribution's value is not computed any more.
        if shift > 10 * limit:
            break
        missed = float(special.nctdtr(rounds - 1, shift, limit) - special.nctdtr(rounds - 1, shift, -limit))
        if 1 - missed >= POWER:
            break
        rounds += 2
    return rounds


def standard_deviation(values: Sequence[float]) -> float:
    """The standard deviation of at least two finite numbers, as `statistics.stdev` gives it to the last bit.

    Both are exact until the last rounding. `statistics` adds fractions, which takes ten times as long, and a report
    asks for several deviations in each of its rows.
    """
    fractions = [value.as_integer_ratio() for value in values]
    scale, count = max(below for _, below in fractions), len(values)  # all denominators are powers of two
    whole = [above * (scale // below) for above, below in fractions]
    above = count * sum(number * number for number in whole) - sum(whole) ** 2
    below = count * (count - 1) * scale**2
    # The root of above ÷ below with 54 bits or more. An odd last bit where it is inexact makes the division round well.
    shift = max(0, (below.bit_length() - above.bit_length() + 111) // 2)
    square = (above << 2 * shift) // below
    root = math.isqrt(square)
    return (root | (root * root * below != above << 2 * shift)) / (1 << shift)


def log_ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """log(ours ÷ theirs) of each round."""
    return [math.log(a) - math.log(b) for a, b in zip(ours, theirs, strict=True)]


class Noise(NamedTuple):
    """The scatter of A/A comparisons: the pooled standard deviation of log ratios within rows, and its degrees of
    freedom."""

    deviation: float
    freedom: int

    def worth(self, rounds: int) -> float:
        """The share within which 95% of measured differences lie where there is no true one, for so many rounds."""
        return _expm1(_t(min(MOST_FREEDOM, self.freedom), PLAIN) * self.deviation / math.sqrt(rounds))


def pooled_noise(rows: Sequence[Sequence[float]]) -> Noise | None:
    """The noise of rows that have a log ratio for each round; None where no row has two rounds."""
    freedom = sum(len(row) - 1 for row in rows if row)
    if freedom < 1:
        return None
    squares = sum((len(row) - 1) * statistics.variance(row) for row in rows if len(row) > 1)
    return Noise(math.sqrt(squares / freedom), freedom)


def is_across_zero(interval: tuple[float, float]) -> bool:
    """Whether the interval of a difference contains 0."""
    return interval[0] <= 0 <= interval[1]


def is_within(interval: tuple[float, float], limit: float = SAME) -> bool:
    """Whether the whole interval of a difference lies within ± `limit`."""
    return -limit < interval[0] and interval[1] < limit


def spread(rates: Sequence[float]) -> float | None:
    """The standard deviation of the rates' logarithms, a relative spread; None with fewer than two rates."""
    return standard_deviation([math.log(rate) for rate in rates]) if len(rates) > 1 else None


def outlying(rates: Sequence[float]) -> list[int]:
    """The indices of the rates that stand apart from the others.

    The logarithm of such a rate is over OUTLYING times as far from the median as the median distance. Fewer than FEWEST
    rates give none.
    """
    if len(rates) < FEWEST:
        return []
    logs = [math.log(rate) for rate in rates]
    middle = statistics.median(logs)
    distances = [abs(log - middle) for log in logs]
    typical = statistics.median(distances)
    limit = max(OUTLYING * typical, 1e-9)  # smaller distances are rounding
    return [i for i, distance in enumerate(distances) if distance > limit]


def drift(runs: Sequence[Sequence[float]]) -> float | None:
    """The share by which steps took longer in the second half of the steps than in the first.

    `runs` has the seconds of each run's steps, for runs of one setup. The second half of the steps has the batches of
    the first half in the same order. The middle step of an odd number is left out. Each batch gives the log ratio of
    its two steps, as the mean over the runs. None where the halves are less than DRIFT apart, or where chance explains
    it (paired t-test, p ≥ DRIFT_P).
    """
    half = len(runs[0]) // 2
    if half < 2:
        return None
    means = [math.fsum(map(math.log, seconds)) / len(runs) for seconds in zip(*runs, strict=True)]
    ratios = [later - first for first, later in zip(means[:half], means[len(means) - half :], strict=True)]
    change = statistics.fmean(ratios)
    if abs(_expm1(change)) < DRIFT:
        return None
    error = standard_deviation(ratios) / math.sqrt(half)
    p = 2 * float(special.stdtr(half - 1, -abs(change) / error)) if error > 0 else 0.0
    return _expm1(change) if p < DRIFT_P else None


def drift_of(records: Sequence[Record]) -> float | None:
    """The drift of the timed steps of runs of one setup; None where their halves do not have the same batches."""
    if not all(map(has_paired_halves, records)):
        return None
    return drift([record.steps.seconds[record.timed_from :] for record in records if record.steps])


def drift_between(rounds: Sequence[tuple[Record, Record]]) -> float | None:
    """The share by which the ratio of two sides' step times changed between the halves of the timed steps, or None."""
    if not rounds or not all(has_paired_halves(record) for pair in rounds for record in pair):
        return None
    timed = ([record.steps.seconds[record.timed_from :] for record in pair if record.steps] for pair in rounds)
    return drift([[a / b for a, b in zip(*pair, strict=True)] for pair in timed])


def has_paired_halves(record: Record) -> bool:
    """Whether both halves of the timed steps have the same batches, by their counts of tokens."""
    if record.steps is None:
        return False
    steps, half = record.steps, (len(record.steps.seconds) - record.timed_from) // 2
    counts = (steps.effective_tokens, steps.padded_tokens, steps.label_tokens)
    first = slice(record.timed_from, record.timed_from + half)
    return half > 0 and all(count[first] == count[-half:] for count in counts)


def drift_in_words(change: float) -> str:
    """A sentence on a drift: its likely cause, and what to do."""
    what, advice = "was not warm", "raise --warmup-steps"
    if change > 0:
        what, advice = "slowed down", "see what else runs here, and the clocks"
    return f"{what}: steps took {change:+.0%} in the second half of the timed ones; {advice}"


def _margin(rounds: int, deviation: float, quantile: float) -> float:
    return _t(rounds - 1, quantile) * deviation / math.sqrt(rounds)


@functools.lru_cache(maxsize=1024)
def _t(freedom: int, quantile: float) -> float:
    return float(special.stdtrit(freedom, quantile))


def _expm1(value: float) -> float:
    return math.expm1(min(value, 700.0))  # exp of more overflows a float
