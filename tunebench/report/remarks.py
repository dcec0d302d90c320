"""The remarks in a row's note: what a reader must know beside the figures."""

import math
import statistics
from collections.abc import Iterable

from tunebench.frameworks import FRAMEWORKS, other_library
from tunebench.record import DISTURBED, MARKED, Record
from tunebench.report.cells import Cell
from tunebench.report.rounds import Near, Rounds, out_of, pair_rounds, round_of
from tunebench.report.stats import (
    LOOKS,
    drift_between,
    drift_in_words,
    drift_of,
    is_across_zero,
    is_narrow,
    outlying,
)

LEAST_SECONDS = 5.0  # timed seconds that a share of 1% of a core needs: the kernel counts in ticks of 10 ms


def remarks_of_rounds(rounds: Rounds) -> list[str]:
    """The remarks on the rounds of a pair."""
    remarks = []
    if rounds.pairs and rounds.dropped:
        remarks.append(
            f"{rounds.dropped} round(s) left out: of one side alone, or with sides that started too far apart"
        )
    if rounds.until:
        count = len(rounds.pairs)
        words = until_in_words(rounds.until, is_narrow(rounds.log_ratios, rounds.until), count)
        remarks.append(words + "; the interval is widened for that" * (count > 1))
    for i in outlying([math.exp(ratio) for ratio in rounds.log_ratios]):
        ratio = math.expm1(rounds.log_ratios[i])
        number = round_of(rounds.pairs[i][0]) or i + 1
        remarks.append(f"round {number} stands apart by its ratio ({ratio:+.1%})")
    if change := drift_between(rounds.pairs):
        remarks.append(f"paddle's steps ÷ torch's changed by {change:+.0%} in the second half of the timed ones")
    return remarks


def until_in_words(target: float, reached: bool, rounds: int) -> str:
    """How --until ended for a row, or where it stands."""
    if reached:
        return f"rounds were added until the interval was within ±{target * 100:g}%"
    if rounds < 2:
        return f"there is no interval after {rounds} complete round(s)"
    more = "" if rounds >= LOOKS[-1] else " yet"
    return f"the interval is not within ±{target * 100:g}% after {rounds} rounds{more}"


def runner_up(best: Cell, same_work: Iterable[Cell], near: Near) -> str | None:
    """A remark on the second fastest of a framework's setups of the same work: whether it ties with the best one."""
    others = [cell for cell in same_work if cell is not best and cell.rate and cell.library == best.library]
    others = [cell for cell in others if cell.setup != best.setup and not cell.disturbed]
    if not others:
        return None
    second = max(others, key=lambda cell: cell.rate or 0.0)
    rounds = pair_rounds(second.records, best.records, near)
    text = f"{best.first.framework}'s runner-up is {second.setup}"
    if not rounds.pairs:
        return f"{text}, in no round with the best"
    text += f" ({math.expm1(statistics.fmean(rounds.log_ratios)):+.1%}"
    if rounds.interval is None:
        return f"{text}, one round)"
    return f"{text}, {'a tie' if is_across_zero(rounds.interval) else 'told apart'})"


def remarks_of_side(cell: Cell) -> list[str]:
    """The remarks on one side: how it ended and what is odd about its runs."""
    first, runs = cell.first, len(cell.records)
    if not cell.rate:
        return [f"{first.status}: {first.reason}"]
    remarks = []
    if skipped := sum(record.skipped_steps for record in cell.records):
        remarks.append(f"skipped {skipped} steps (float16 overflowed)")
    if first.kernels and first.setup.attention != "eager":
        remarks.append(f"ran {' and '.join(first.kernels.attention)}")
    if change := drift_of(cell.records):
        remarks.append(drift_in_words(change))
    known = [record.conditions for record in cell.records if record.conditions]
    if MARKED <= (worst := max(cell.shares_taken, default=0.0)) < DISTURBED:
        marked = (record.disturbance for record in cell.records if record.share_taken == worst)
        remarks.append(f"was marked: {max(each[1] for each in marked if each)}")
    remarks += dict.fromkeys(remark for conditions in known for remark in conditions.remarks())
    if known and (seconds := min(conditions.seconds for conditions in known)) < LEAST_SECONDS:
        remarks.append(f"was timed for {seconds:.1f} s alone, and {LEAST_SECONDS:g} s tell what others took")
    for i in outlying(cell.rates):
        remarks.append(
            f"run {i + 1} of {runs} stands apart ({cell.rates[i]:.0f} for a median of "
            f"{statistics.median(cell.rates):.0f}, {out_of(cell.records[i])}): see what else ran then, and measure the "
            "pair again (--fresh --only), or add rounds (--repeats)"
        )
    return remarks


def on_what(record: Record) -> str:
    """The text that tells rows with the same headings apart."""
    assert record.plan is not None
    assert record.steps is not None
    plan, timed = record.plan, len(record.steps.seconds) - record.timed_from
    library = other_library(record.versions)
    version = record.versions.get((library or FRAMEWORKS[record.framework].version_of).lower(), "?")
    return (
        f"{timed} steps of {plan.data} (plan {plan.sha256[:8]}), {library or record.framework} {version}, "
        f"revision {(record.git.revision or 'no git')[:10]}"
    )
