"""Finds the rounds of two sides: runs next to each other in time and on the same batches. Only these may be divided."""

import datetime
import functools
import itertools
import operator
import re
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tunebench.record import Record
from tunebench.report.parity import Apart, how_far_apart
from tunebench.report.stats import PLAIN, WIDENED, interval_of, log_ratios, standard_deviation

# The starts of a round's sides are at most this many seconds apart, or this many times the longer run.
APART, RUNS_APART = 120.0, 3
PAUSE = 600.0  # a pause of this many seconds ends a series of measurement
OLD, NEW = "old", "new"  # the sides of run_all.sh --versus
NUMBER = re.compile(r"-r(\d+)\.json$")
VERSUS = re.compile(rf"(?:(.*)/)?([^/]+)/[^/+]+\+({OLD}|{NEW})-r\d+\.json$")

Near = Callable[[Record, Record], bool]


@dataclass(frozen=True)
class Rounds:
    """The complete rounds of two sides, and the number of dropped ones."""

    pairs: list[tuple[Record, Record]]
    dropped: int

    @functools.cached_property
    def rates(self) -> tuple[list[float], list[float]]:
        """Both sides' rates by round, in effective tokens/s."""
        ours, theirs = ([pair[side].effective_tokens_per_second for pair in self.pairs] for side in (0, 1))
        return ours, theirs

    @functools.cached_property
    def log_ratios(self) -> list[float]:
        """log(first side's rate ÷ second side's rate) of each round."""
        return log_ratios(*self.rates)

    @functools.cached_property
    def interval(self) -> tuple[float, float] | None:
        """The 95% interval of first side ÷ second side - 1; None with fewer than two rounds.

        It is wider where the number of rounds was chosen by it.
        """
        return interval_of(self.log_ratios, self.deviation, WIDENED if self.until else PLAIN)

    @functools.cached_property
    def deviation(self) -> float | None:
        """The standard deviation of `log_ratios`; None with fewer than two."""
        return standard_deviation(self.log_ratios) if len(self.pairs) > 1 else None

    @functools.cached_property
    def apart(self) -> list[Apart]:
        """How far apart the curves of both sides are, for each round."""
        return list(itertools.starmap(how_far_apart, self.pairs))

    @functools.cached_property
    def until(self) -> float | None:
        """The target by which --until chose the number of rounds; None where the user gave the number."""
        return min((record.until for pair in self.pairs for record in pair if record.until), default=None)


def pair_rounds(ours: Sequence[Record], theirs: Sequence[Record], near: Near) -> Rounds:
    """The rounds of two sides' runs that ended ok. Both runs have the same number and batches and are `near`.

    Runs without a number, and several runs of one number, are paired in the order of their starts.
    """
    by_number: dict[int, tuple[deque[Record], deque[Record]]] = defaultdict(lambda: (deque(), deque()))
    for side, members in enumerate((ours, theirs)):
        for (number, _), run in sorted(((turn(run), run) for run in members), key=operator.itemgetter(0)):
            by_number[number][side].append(run)
    pairs, dropped = [], 0
    for _, runs in sorted(by_number.items()):
        left = [0, 0]
        while runs[0] and runs[1]:
            a, b = runs[0][0], runs[1][0]
            if a.plan and b.plan and a.plan.sha256 == b.plan.sha256 and near(a, b):
                pairs.append((a, b))
                runs[0].popleft()
                runs[1].popleft()
            else:
                earlier = int(b.started_at < a.started_at)
                left[earlier] += 1
                runs[earlier].popleft()
        dropped += max(left[0] + len(runs[0]), left[1] + len(runs[1]))
    return Rounds(pairs, dropped)


def beside(a: Record, b: Record) -> bool:
    """Whether two runs started so close to each other that the machine's drift between them is negligible."""
    apart = abs(_start(a) - _start(b))
    return apart <= APART or apart <= RUNS_APART * max(_seconds(a), _seconds(b))


def minutes_apart(a: Record, b: Record) -> float:
    """Minutes between the starts of two runs."""
    return abs(_start(a) - _start(b)) / 60


def started_lately(record: Record) -> bool:
    """Whether a run that starts now would be `beside` this one."""
    return time.time() - _start(record) <= max(APART, RUNS_APART * _seconds(record))


def in_one_series(records: Iterable[Record]) -> Near:
    """A function that says whether two runs belong to one series: no long pause of the machine lies between them."""
    series: dict[tuple[str, ...], int] = {}
    number = itertools.count()
    by_machine: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_machine[record.hardware.place].append(record)
    for _, runs in sorted(by_machine.items()):
        end = float("-inf")
        for run in sorted(runs, key=lambda record: record.started_at):
            start = _start(run)
            if start > end + PAUSE:
                current = next(number)
            series[_name(run)] = current
            end = max(end, start + _seconds(run))
    return lambda a, b: series[_name(a)] == series[_name(b)]


def turn(record: Record) -> tuple[int, str]:
    """A sort key: the round of a run, then its start, since a round may have run again."""
    return round_of(record), record.started_at


def round_of(record: Record) -> int:
    """The number of a run's round, from its record's file name; 0 where the name has none."""
    number = NUMBER.search(out_of(record))
    return int(number[1]) if number else 0


def versus_of(record: Record) -> tuple[str, str, str] | None:
    """The series, the pair and the side (OLD or NEW) of a run of run_all.sh --versus, from its record's file name.

    None for other runs. An older checkout knows no flag for the side, so that the name alone can tell it.
    """
    out = out_of(record)
    # The search of the whole pattern takes longer, and most names have no side.
    found = VERSUS.search(out) if f"+{OLD}-r" in out or f"+{NEW}-r" in out else None
    return (found[1] or "", found[2], found[3]) if found else None


def out_of(record: Record) -> str:
    """The record's file by the flag --out; without that flag, its start time."""
    # The last one counts. A report asks for this of each run several times, and `flags_of` is slower.
    following = None
    for word in reversed(record.argv):
        if word.startswith("--out="):
            return word[6:]
        if word == "--out" and following is not None:
            return following
        following = word
    return record.started_at


def flags_of(record: Record) -> dict[str, str]:
    """The value of each flag on the command line. For a bare flag that is the next word."""
    words = list(itertools.chain.from_iterable(word.split("=", 1) for word in record.argv))
    return {flag: value for flag, value in itertools.pairwise(words) if flag.startswith("--")}


def _start(record: Record) -> float:
    try:
        return datetime.datetime.fromisoformat(record.started_at).timestamp()
    except ValueError:
        return 0.0


def _seconds(record: Record) -> float:
    """The seconds of a run's set-up and steps, as far as its record has them."""
    return (record.setup_seconds or 0.0) + sum(record.steps.seconds if record.steps else [])


def _name(record: Record) -> tuple[str, ...]:
    return record.hardware.place, record.started_at, *record.argv
