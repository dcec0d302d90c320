"""The runs of one side with one setup on one piece of work."""

import functools
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tunebench.record import Record
from tunebench.report.identity import as_key, attempt_of, setup_of, split_of, work_of
from tunebench.report.rounds import turn


@dataclass(frozen=True)
class Cell:
    """All runs of one side with one setup on one piece of work."""

    records: list[Record]

    @property
    def first(self) -> Record:
        """The run that stands for the others where they must agree."""
        return self.records[0]

    @functools.cached_property
    def work(self) -> str:
        """What was done: equal where `differences` finds none."""
        return as_key(work_of(self.first))

    @functools.cached_property
    def setup(self) -> str:
        """How it was split and computed."""
        return setup_of(self.first)

    @functools.cached_property
    def split(self) -> tuple[str, ...]:
        """The same but for the precision."""
        return tuple(split_of(self.first))

    @functools.cached_property
    def disturbed(self) -> str | None:
        """By what the most disturbed of its runs was, where one was."""
        return disturbed_by(self.records)

    @functools.cached_property
    def wholly_disturbed(self) -> bool:
        """Whether each of its runs was, so that nothing is known of its rate."""
        return all(record.disturbed for record in self.records)

    @functools.cached_property
    def rates(self) -> list[float]:
        """The runs in effective tokens/s, by round; none when they did not end ok."""
        return [record.effective_tokens_per_second for record in self.records if record.status == "ok"]

    @functools.cached_property
    def rate(self) -> float | None:
        """The geometric mean of the runs, in effective tokens/s; None when they did not end ok."""
        return statistics.geometric_mean(self.rates) if self.rates else None


def disturbed_by(records: Iterable[Record]) -> str | None:
    """By what the most disturbed of a side's runs was, where one was."""
    found = [(*record.disturbance, record.framework) for record in records if record.disturbance and record.disturbed]
    return "{2}: {1}".format(*max(found)) if found else None


def cells_of(records: list[Record]) -> list[Cell]:
    """One side's runs by setup and work. Runs that did not end ok count only where none of their setup did."""
    by_key: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.status == "ok":
            # Runs of other versions are no repeats of each other, though each may have its pair.
            by_key[as_key([vars(record.setup), record.versions, work_of(record)])].append(record)
    bad = [(attempt_of(record), record) for record in records if record.status != "ok"]
    done = {attempt_of(runs[0]) for runs in by_key.values()}
    ended: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for attempt, record in bad:
        if attempt not in done:
            ended[(*attempt, record.status)].append(record)
    for runs in by_key.values():
        runs.sort(key=turn)
    return [Cell(runs) for runs in (*by_key.values(), *ended.values())]
