"""What the rules of --versus and --until find and claim, by drawing rounds from recorded A/A runs.

An A/A run compares a side with itself, so that only noise moves its log ratios from 0. Rounds are drawn without
replacement, each with a random sign: which run is a and which is b is a matter of names. A true change is added.
`rows` has the log ratios of each comparison, by round.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from tunebench.report.regressions import Verdict, estimates, holm, verdict_on
from tunebench.report.stats import LOOKS, WIDENED, is_narrow, margin_of

Rows = Sequence[Sequence[float]]


class Rate(NamedTuple):
    """How often something happened among independent draws."""

    happened: int
    draws: int

    @property
    def share(self) -> float:
        """The observed rate."""
        return self.happened / self.draws

    def limits(self, confidence: float = 0.999) -> tuple[float, float]:
        """The interval of the true rate of these draws (Clopper and Pearson, 1934)."""
        tail, k, n = (1 - confidence) / 2, self.happened, self.draws
        low = float(special.betaincinv(k, n - k + 1, tail)) if k else 0.0
        high = float(special.betaincinv(k + 1, n - k, 1 - tail)) if k < n else 1.0
        return low, high


class Until(NamedTuple):
    """What --until does with a row. `rounds` is the mean number of rounds."""

    covered: Rate
    reached: Rate
    rounds: float


def drawn(generator: np.random.Generator, row: Sequence[float], rounds: int, change: float = 0.0) -> list[float]:
    """Rounds of a row, with a true change of the rate, a share."""
    ratios = generator.choice(row, size=rounds, replace=False) * generator.choice((-1, 1), size=rounds)
    return list(ratios + math.log1p(change))


def versus(rows: Rows, change: float, draws: int, rounds: int, threshold: float, seed: int) -> tuple[Rate, Rate, Rate]:
    """What the rule of --versus says of tables of all rows, of which one has a true change of the rate, others none.

    It is another row in each draw. Returns how often that row's change was found, and how often a table claimed a
    regression, and a regression or an improvement, of a row that has none.
    """
    generator = np.random.default_rng(seed)
    found = regressed = claimed = 0
    for draw in range(draws):
        changed = draw % len(rows) if change else None
        table = [drawn(generator, row, rounds, change if i == changed else 0.0) for i, row in enumerate(rows)]
        verdicts = verdicts_on(table, threshold)
        others = [verdict for i, verdict in enumerate(verdicts) if i != changed]
        found += changed is not None and verdicts[changed] == ("regression" if change < 0 else "improvement")
        regressed += "regression" in others
        claimed += any(verdict != "none" for verdict in others)
    return Rate(found, draws), Rate(regressed, draws), Rate(claimed, draws)


def verdicts_on(table: Rows, threshold: float) -> list[Verdict]:
    """The verdict on each row of a table."""
    means = estimates(table)
    adjusted = holm([each.p for each in means])
    return [verdict_on(math.expm1(each.mean), p, threshold) for each, p in zip(means, adjusted, strict=True)]


def until(row: Sequence[float], target: float, draws: int, seed: int) -> Until:
    """How often the interval that --until reports of a row covers the truth, and how often it reaches the target."""
    generator = np.random.default_rng(seed)
    covered = reached = total = 0
    for _ in range(draws):
        ratios = drawn(generator, row, LOOKS[-1])
        rounds = next((look for look in LOOKS if is_narrow(ratios[:look], target)), LOOKS[-1])
        taken = ratios[:rounds]
        margin = margin_of(taken, WIDENED)
        assert margin is not None
        covered += abs(math.fsum(taken) / rounds) <= margin
        reached += is_narrow(taken, target)
        total += rounds
    return Until(Rate(covered, draws), Rate(reached, draws), total / draws)
