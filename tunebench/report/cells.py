"""Groups one side's runs by setup and work."""

import functools
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tunebench.frameworks import other_library
from tunebench.record import DISTURBED, Record
from tunebench.report.identity import as_key, attempt_of, heading_of, setup_of, split_of, work_of
from tunebench.report.rounds import turn


@dataclass(frozen=True)
class Cell:
    """All runs of one side with one setup on the same work."""

    records: list[Record]

    @property
    def first(self) -> Record:
        """The first run. It stands for the others in all that they have in common."""
        return self.records[0]

    @functools.cached_property
    def work(self) -> str:
        """A key of the work. It is equal where `differences` finds none."""
        return as_key(work_of(self.first))

    @functools.cached_property
    def setup(self) -> str:
        """The words of its setup."""
        return setup_of(self.first)

    @functools.cached_property
    def library(self) -> str | None:
        """The library of models in place of the framework's usual one; None for that one."""
        return other_library(self.first.versions)

    @property
    def heading(self) -> str:
        """Its setup in tables, with the library where it is not the usual one."""
        return heading_of(self.first)

    @functools.cached_property
    def split(self) -> tuple[str, ...]:
        """The words of its setup but for the precision."""
        return tuple(split_of(self.first))

    @functools.cached_property
    def disturbed(self) -> str | None:
        """What disturbed its most disturbed run, in words; None where no run was disturbed."""
        return disturbed_by(self.records)

    @functools.cached_property
    def wholly_disturbed(self) -> bool:
        """Whether others disturbed all of its runs, so that its rate is not known."""
        return len(self.shares_taken) == len(self.records) and min(self.shares_taken) >= DISTURBED

    @functools.cached_property
    def shares_taken(self) -> list[float]:
        """The shares that others took of a core or a GPU during its runs, of those where it is known."""
        return [share for record in self.records if (share := record.share_taken) is not None]

    @functools.cached_property
    def rates(self) -> list[float]:
        """The rates of the runs that ended ok, in effective tokens/s, by round."""
        return [record.effective_tokens_per_second for record in self.records if record.status == "ok"]

    @functools.cached_property
    def rate(self) -> float | None:
        """The geometric mean of `rates`, in effective tokens/s; None where there is none."""
        return statistics.geometric_mean(self.rates) if self.rates else None


def disturbed_by(records: Iterable[Record]) -> str | None:
    """What disturbed the most disturbed of these runs, in words; None where no run was disturbed."""
    found = [(*record.disturbance, record.framework) for record in records if record.disturbed and record.disturbance]
    return "{2}: {1}".format(*max(found)) if found else None


def cells_of(records: list[Record]) -> list[Cell]:
    """One side's runs by setup and work. A run that did not end ok counts only where no run of its attempt did."""
    by_key: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.status == "ok":
            # Runs of different versions do not repeat each other, though each may have its pair.
            # `as_key` takes three times as long.
            parts = (vars(record.setup), record.versions, work_of(record))
            by_key[repr([sorted(part.items()) for part in parts])].append(record)
    bad = [(attempt_of(record), record) for record in records if record.status != "ok"]
    done = {attempt_of(runs[0]) for runs in by_key.values()} if bad else set()
    ended: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for attempt, record in bad:
        if attempt not in done:
            ended[(*attempt, record.status)].append(record)
    for runs in by_key.values():
        runs.sort(key=turn)
    return [Cell(runs) for runs in (*by_key.values(), *ended.values())]
