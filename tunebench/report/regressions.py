"""Regressions: the runs of `run_all.sh --versus`, old against new, by one rule for all rows.

Both sides ran in one series, next to each other in each round. Rates of different series cannot be compared.
"""

import itertools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import special

from tunebench.record import Record
from tunebench.report.cells import disturbed_by
from tunebench.report.identity import METHODS, group_of, place_of, setup_of, unequal, work_of
from tunebench.report.markdown import NOT_AVAILABLE, measured_on, packages_of, revision_of
from tunebench.report.parity import disagreement
from tunebench.report.rounds import NEW, OLD, Rounds, beside, pair_rounds, turn, versus_of
from tunebench.report.stats import PLAIN
from tunebench.report.tables import Column, as_csv, table

THRESHOLD = 0.03  # smaller changes are no regressions, however sure they are
LEVEL = 0.05  # of Holm's adjusted p, over all rows of a table
OTHERS_COUNT = 4  # degrees of freedom that the other rows' variance has beside the row's own n - 1
OWN_ALONE = 0.95  # a row whose variance exceeds this quantile of F is too unlike the others to borrow from them
OF_THE_CODE = ("git.revision", "git.changes")  # they differ by design

Verdict = Literal["regression", "improvement", "none", "not comparable", "not offered"]


@dataclass(frozen=True)
class Comparison:
    """A row of the table. Rates are in effective tokens/s of the whole job; `change` is new ÷ old - 1.

    - `interval`: the 95% interval of the change, per row. `p`: of no change, and `adjusted_p` by Holm over the rows.
      `freedom`: the degrees of freedom of its t.
    - `rounds`: the complete rounds. `dropped`: the others.
    - `reason`: why the row has no verdict.
    - `comparisons`: how many rows of the table were compared. `threshold`: the least change that counts, a share.
    - `old_code`, `new_code`: the packages and the commit of a side's first run; None where it did not run.
    """

    name: str
    framework: str
    family: str
    model: str
    method: str
    num_gpus: int
    batch_size: int
    setup: str
    old_effective_tokens_per_second: float | None = None
    new_effective_tokens_per_second: float | None = None
    change: float | None = None
    interval: tuple[float, float] | None = None
    p: float | None = None
    adjusted_p: float | None = None
    freedom: int | None = None
    rounds: int = 0
    dropped: int = 0
    verdict: Verdict = "not comparable"
    reason: str | None = None
    comparisons: int = 0
    threshold: float = THRESHOLD
    log_ratios: tuple[float, ...] = ()
    old_code: str | None = None
    new_code: str | None = None


class Estimate(NamedTuple):
    """The mean of a row's log ratios, its standard error and the error's degrees of freedom."""

    mean: float
    error: float
    freedom: int

    @property
    def p(self) -> float:
        """The probability of a mean as far from 0 where the true one is 0 (two-sided t-test)."""
        if self.error == 0:
            return 1.0 if self.mean == 0 else 0.0
        return 2 * float(special.stdtr(self.freedom, -abs(self.mean) / self.error))

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the ratio - 1."""
        margin = float(special.stdtrit(self.freedom, PLAIN)) * self.error
        return math.expm1(self.mean - margin), math.expm1(self.mean + margin)


def estimates(rows: Sequence[Sequence[float]]) -> list[Estimate]:
    """The estimate of each row of log ratios, all of at least two rounds, with a moderated variance.

    A few rounds tell little of a row's own variance s². It is joined with the mean variance of the other rows, s̄²:
    (4 · s̄² + (n - 1) · s²) / (n + 3), with n + 3 degrees of freedom. Where s² / s̄² exceeds the 95% quantile of F, and
    where there is no other row, it is the row's own with n - 1 degrees. The idea is that of G. K. Smyth, Linear models
    and empirical Bayes methods, 2004, with a fixed weight.
    """
    freedoms = [len(row) - 1 for row in rows]
    squares = [float(np.var(row, ddof=1)) * freedom for row, freedom in zip(rows, freedoms, strict=True)]
    found = []
    for i, (row, freedom) in enumerate(zip(rows, freedoms, strict=True)):
        variance = squares[i] / freedom
        others = sum(freedoms) - freedom
        if others:
            shared = math.fsum(square for k, square in enumerate(squares) if k != i) / others
            if variance <= float(special.fdtri(freedom, others, OWN_ALONE)) * shared:
                variance = (OTHERS_COUNT * shared + squares[i]) / (OTHERS_COUNT + freedom)
                freedom += OTHERS_COUNT
        found.append(Estimate(math.fsum(row) / len(row), math.sqrt(variance / len(row)), freedom))
    return found


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p of several tests: below a level, all claims together are wrong at most that often."""
    order = sorted(range(len(p)), key=p.__getitem__)
    raised = itertools.accumulate((min(1.0, (len(p) - rank) * p[i]) for rank, i in enumerate(order)), max)
    adjusted = dict(zip(order, raised, strict=True))
    return [adjusted[i] for i in range(len(p))]


def verdict_on(change: float, adjusted_p: float, threshold: float) -> Verdict:
    """The verdict on a change of the rate: it counts where it is sure and at least `threshold`."""
    if adjusted_p >= LEVEL or abs(change) <= threshold:
        return "none"
    return "regression" if change < 0 else "improvement"


def regressions(records: Iterable[Record], threshold: float = THRESHOLD) -> list[Comparison]:
    """The comparisons of the runs of one series of --versus."""
    rows: dict[tuple[str, str], dict[str, list[Record]]] = defaultdict(lambda: {OLD: [], NEW: []})
    for record in sorted(records, key=turn):
        if versus := versus_of(record):
            rows[versus[1], record.framework][versus[2]].append(record)
    found = [_row(name, framework, *sides.values()) for (name, framework), sides in rows.items()]
    found.sort(key=lambda row: (place_of((row.family, row.model, row.method, row.num_gpus, row.batch_size)), row.name))
    compared = [i for i, row in enumerate(found) if row.log_ratios]
    by_row = estimates([found[i].log_ratios for i in compared])
    adjusted = holm([each.p for each in by_row])
    for i, each, p in zip(compared, by_row, adjusted, strict=True):
        change = math.expm1(each.mean)
        found[i] = replace(
            found[i],
            change=change,
            interval=each.interval,
            p=each.p,
            adjusted_p=p,
            freedom=each.freedom,
            verdict=verdict_on(change, p, threshold),
        )
    return [replace(row, comparisons=len(compared), threshold=threshold) for row in found]


def exit_code(comparisons: Sequence[Comparison]) -> int:
    """1 where there is a regression, else 2 where a row could not be compared or there is none, else 0."""
    verdicts = {row.verdict for row in comparisons} - {"not offered"}
    if "regression" in verdicts:
        return 1
    return 2 if not verdicts or "not comparable" in verdicts else 0


def _row(name: str, framework: str, old: list[Record], new: list[Record]) -> Comparison:
    """A row without its test. It has log ratios only where both sides are the same work, whole and undisturbed."""
    first = (new or old)[0]
    family, model, method, devices, bsz = group_of(first)
    row = Comparison(name, framework, family, model, method, devices, bsz, setup_of(first))
    row = replace(row, old_code=_code_of(old), new_code=_code_of(new))
    both = {OLD: old, NEW: new}
    if old and new and all(record.status == "unsupported" for record in (*old, *new)):
        return replace(row, verdict="not offered", reason=f"on both sides: {first.reason}")
    if reason := next(filter(None, itertools.starmap(_fault_of_side, both.items())), None):
        return replace(row, reason=reason)
    if apart := unequal(_work_of(old[0]), _work_of(new[0])):
        return replace(row, reason=f"not the same work: {'; '.join(apart)}")
    rounds = pair_rounds(new, old, beside)
    row = replace(row, rounds=len(rounds.pairs), dropped=rounds.dropped)
    if rounds.pairs:
        ours, theirs = map(statistics.geometric_mean, rounds.rates)
        row = replace(row, old_effective_tokens_per_second=theirs, new_effective_tokens_per_second=ours)
    if reason := _fault_of_rounds(rounds, old, new):
        return replace(row, reason=reason)
    return replace(row, log_ratios=tuple(rounds.log_ratios))


def _code_of(runs: list[Record]) -> str | None:
    """The packages and the commit of a side's first run."""
    return ", ".join([*packages_of(runs[0]), f"revision {revision_of(runs[0].git)}"]) if runs else None


def _fault_of_side(side: str, runs: list[Record]) -> str | None:
    """Why the runs of one side are no basis of a comparison."""
    other = NEW if side == OLD else OLD
    if not runs:
        return f"only the {other} side ran"
    if bad := next((record for record in runs if record.status != "ok"), None):
        return f"the {side} side ended as {bad.status}: {bad.reason}"
    for record in runs[1:]:
        if apart := unequal(_sameness_of(runs[0]), _sameness_of(record)):
            return f"the runs of the {side} side differ: {'; '.join(apart)}; measure all again (--fresh)"
    return None


def _fault_of_rounds(rounds: Rounds, old: list[Record], new: list[Record]) -> str | None:
    """Why the rounds of two sides with equal work are no basis of a comparison."""
    if not rounds.pairs:
        plans = [{record.plan.sha256 for record in runs if record.plan} for runs in (old, new)]
        if not plans[0] & plans[1]:
            return f"not the same work: plan.sha256: {min(plans[0])[:12]} ≠ {min(plans[1])[:12]}"
    if len(rounds.pairs) < 2:
        return f"{len(rounds.pairs)} complete round(s), and a test needs two; the same command goes on"
    if fault := next(filter(None, itertools.starmap(disagreement, rounds.pairs)), None):
        return f"not the same training: {fault}"
    if disturbed := disturbed_by(record for pair in rounds.pairs for record in pair):
        return f"disturbed: {disturbed}"
    return None


def _work_of(record: Record) -> dict[str, Any]:
    """What both sides must have in common: work, machine and setup. The commit is left out."""
    work = {name: value for name, value in work_of(record).items() if name not in OF_THE_CODE}
    return work | {f"setup.{name}": value for name, value in record.setup}


def _sameness_of(record: Record) -> dict[str, Any]:
    """What all runs of one side must have in common: also the code and the packages."""
    versions = {f"versions.{name}": version for name, version in record.versions.items()}
    return work_of(record) | {f"setup.{name}": value for name, value in record.setup} | versions


COLUMNS = [
    Column("Row", lambda row: row.name),
    Column("Side", lambda row: row.framework),
    Column("Model", lambda row: row.model),
    Column("Method", lambda row: METHODS[row.method]),
    Column("Setup", lambda row: row.setup),
    Column("Old Effective Tokens/s", lambda row: _rate(row.old_effective_tokens_per_second)),
    Column("New Effective Tokens/s", lambda row: _rate(row.new_effective_tokens_per_second)),
    Column("Change", lambda row: NOT_AVAILABLE if row.change is None else f"{row.change:+.1%}"),
    Column(
        "95% Interval",
        lambda row: "{:+.1%} to {:+.1%}".format(*row.interval) if row.interval else NOT_AVAILABLE,
    ),
    Column("p (Holm)", lambda row: NOT_AVAILABLE if row.adjusted_p is None else f"{row.adjusted_p:.2g}"),
    Column("Rounds", lambda row: str(row.rounds) if row.rounds else NOT_AVAILABLE),
    Column("Verdict", lambda row: row.verdict),
]
OF_CSV = [
    Column("Reason", lambda row: row.reason or ""),
    Column("Old Code", lambda row: row.old_code or ""),
    Column("New Code", lambda row: row.new_code or ""),
]


def render_regressions(records: list[Record], form: str, threshold: float = THRESHOLD) -> str:
    """The tables of the runs of --versus among these records, as `md`, `csv` or `json`; one for each series."""
    by_series: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if versus := versus_of(record):
            by_series[versus[0]].append(record)
    found = {series: regressions(members, threshold) for series, members in by_series.items()}
    rows = list(itertools.chain.from_iterable(found.values()))
    if form == "json":
        return json.dumps([asdict(row) for row in rows], indent=1)
    if form == "csv":
        return as_csv([*COLUMNS, *OF_CSV], rows)
    parts = []
    for series, comparisons in found.items():
        name = Path(series).name
        parts.append(f"### Old against new{f': {name}' if name else ''}\n")
        for side in (OLD, NEW):
            runs = [record for record in by_series[series] if (versus_of(record) or "")[2:] == (side,)]
            parts.append(f"{side.capitalize()}: {measured_on(runs)}\n")
        parts.append(table(COLUMNS, comparisons) + "\n")
        parts += [_caption(comparisons, threshold), *_summary(comparisons)]
    return "\n".join(parts)


def _caption(comparisons: Sequence[Comparison], threshold: float) -> str:
    """How to read the table."""
    count = sum(row.adjusted_p is not None for row in comparisons)
    return (
        f"Change = new ÷ old - 1 of effective tokens/s, in rounds of one series. {count} comparison(s). A regression: p"
        f" below {LEVEL:g} after Holm's adjustment over the {count}, and slower by more than {threshold * 100:g}%. The "
        "interval is 95% per row, not adjusted. Variances are moderated by those of the other rows.\n"
    )


def _summary(comparisons: Sequence[Comparison]) -> list[str]:
    """What was found, and each row without a verdict with its reason."""
    count = sum(row.adjusted_p is not None for row in comparisons)
    lines = []
    for verdict in ("regression", "improvement"):
        named = [f"{row.name}/{row.framework} {row.change:+.1%}" for row in comparisons if row.verdict == verdict]
        lines.append(f"{len(named)} {verdict}(s) in {count} comparison(s){': ' * bool(named)}{', '.join(named)}.\n")
    for verdict in ("not comparable", "not offered"):
        rows = [row for row in comparisons if row.verdict == verdict]
        lines += [f"{verdict}: {row.name}/{row.framework}: {row.reason}\n" for row in rows]
    return lines


def _rate(rate: float | None) -> str:
    return NOT_AVAILABLE if rate is None else f"{rate:.2f}"
