"""Shows how a suite gets on: on a terminal a board of all rows, elsewhere plain lines."""

import contextlib
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from tunebench import conditions
from tunebench.progress import Step, in_words
from tunebench.record import DISTURBED, Record
from tunebench.suite.file import Planned

LINE = 10.0  # seconds between two plain lines about a run
# Seconds between two drawings of the board, and between two readings of the machine: some milliseconds each. They are
# rare, since the run needs the cores.
REDRAW, READ = 2.0, 10.0
MOST_COLUMNS = 4  # a suite with more sides, such as one of peers, has a row for each
CELL, NAMES = 24, 18  # characters of a side's cell, and at least of a row's name
FRAME = 4  # lines of the board that are no rows: two above and two below
Stage = Literal["waiting", "active", "ended"]
Show = Callable[["Progress"], None]


class Progress(NamedTuple):
    """How a run gets on. Times are in seconds, the rate is in effective tokens/s.

    `step` is the last finished one, None before the first. `left` is the time until the run's end, `in_all` until the
    end of all runs; None where not known.
    """

    elapsed: float
    step: Step | None = None
    rate: float = 0.0
    left: float = 0.0
    in_all: float | None = None

    def line(self) -> str:
        """The progress in words."""
        if self.step is None or self.in_all is None:
            return f"starting, {in_words(self.elapsed)}"
        return (
            f"step {self.step.number}/{self.step.total}, {self.rate:.0f} effective tokens/s, "
            f"{in_words(self.left)} left, all: {in_words(self.in_all)}"
        )


def progress_of(steps: Sequence[Step], warmup: int, elapsed: float, took: Sequence[float], rest: int) -> Progress:
    """The progress of a run from its steps so far. `took` has the seconds of earlier runs; `rest` runs follow."""
    usual = statistics.fmean(took) if took else None
    if not steps:
        return Progress(elapsed, in_all=None if usual is None else max(0.0, usual - elapsed) + rest * usual)
    timed = steps[warmup:] or steps
    seconds = sum(step.seconds for step in timed)
    rate = sum(step.seconds * step.rate for step in timed) / max(seconds, 1e-9)
    last = steps[-1]
    left = (last.total - last.number) * seconds / len(timed)
    return Progress(elapsed, last, rate, left, left + rest * (elapsed + left if usual is None else usual))


@dataclass
class State:
    """One run on the board: its row and side, its stage, what is said of it, and its rate once it ended ok."""

    row: str
    side: str
    stage: Stage = "waiting"
    text: str = "waiting"
    rate: float | None = None


class Board:
    """The rows of a suite, each with a cell for each side. `on_terminal` decides between board and plain lines.

    The board is drawn while a run waits or runs, and leaves the terminal to other output in between.
    """

    def __init__(self, runs: Sequence[Planned], console: Console | None = None) -> None:
        """Draws on `console`, by default on stdout."""
        self.console = console or Console()
        self.on_terminal = sys.stdout.isatty() and not self.console.is_dumb_terminal
        self.states = [State(run.entry.group, re.sub(r"-r\d+$", "", run.record.stem)) for run in runs]
        if len({state.side for state in self.states}) > MOST_COLUMNS:
            self.states = [State(f"{state.row}/{state.side}", "") for state in self.states]
        self.sides = list(dict.fromkeys(state.side for state in self.states))
        self.rows = list(dict.fromkeys(state.row for state in self.states))
        self.machine = "not looked at yet"
        self.before: conditions.Reading | None = None
        self.in_all: float | None = None

    def ended(self, number: int, record: Record) -> None:
        """Notes how a run ended."""
        ok = record.status == "ok" and record.steps is not None
        self._note(number, "ended", record.status, record.effective_tokens_per_second if ok else None)

    @contextlib.contextmanager
    def waiting(self, number: int, title: str) -> Iterator[None]:
        """Shows that a run waits for a quiet machine."""
        self._note(number, "active", "machine quiet?")
        with self._live() as live:
            if live:
                self._draw(live, number, f"{title}: waits for a quiet machine", "")
            yield

    def found(self, quiet: bool) -> None:
        """Notes whether the machine was quiet before a run."""
        self.machine = "quiet" if quiet else "NOT QUIET"

    @contextlib.contextmanager
    def running(self, number: int, title: str, log: Path) -> Iterator[Show]:
        """A function that shows a run's progress: on the board, or in a new line every LINE seconds."""
        starts = f"{title}: starts, log: {log}"
        if not self.on_terminal:
            print(starts)
        self._note(number, "active", "starting")
        shown = time.monotonic()
        with self._live() as live:
            if live:
                self.before = None  # the machine is read anew for each run
                self._look_at_machine()
                self._draw(live, number, starts, "")

            def show(progress: Progress) -> None:
                nonlocal shown
                if time.monotonic() - shown < (REDRAW if live else LINE):
                    return
                shown, line = time.monotonic(), f"{title}: {progress.line()}"
                if live is None:
                    print(line)
                    return
                self.in_all = progress.in_all
                self._look_at_machine()
                self._note(number, "active", _brief(progress))
                self._draw(live, number, line, f"log: {log}")

            yield show

    @contextlib.contextmanager
    def _live(self) -> Iterator[Live | None]:
        """What redraws the terminal in place; None where stdout is none."""
        if not self.on_terminal:
            yield None
            return
        with Live(console=self.console, auto_refresh=False, transient=True) as live:
            yield live

    def _draw(self, live: Live, number: int, *below: str) -> None:
        size = self.console.size
        lines = self.lines(size.width, size.height - 1, number)
        lines += [Text(line, style="dim") for line in below]
        for line in lines:
            line.no_wrap, line.overflow = True, "ellipsis"
        live.update(Group(*lines), refresh=True)

    def lines(self, width: int, height: int, number: int) -> list[Text]:
        """The board's lines above the two that are about run `number`: at most `height` with these two."""
        done = sum(state.stage == "ended" for state in self.states)
        left = "time left not known yet" if self.in_all is None else f"about {in_words(self.in_all)} left"
        head = Text(f"{done} of {len(self.states)} runs done, {left}; machine: {self.machine}", style="bold")
        names = max(NAMES, min(width - CELL * len(self.sides) - 3, max(map(len, self.rows))))
        titles = Text(f"  {'effective tokens/s':{names}.{names}} ", style="dim")
        for side in self.sides:
            titles.append(f"{side:{CELL}.{CELL - 1}}")
        current = self.rows.index(self.states[number].row)
        first, last = window(len(self.rows), current, height - FRAME)
        lines = [head, titles]
        for i in range(first, last):
            line = Text(f"{'▶' if i == current else ' '} {self.rows[i]:{names}.{names}} ")
            for side in self.sides:
                text, style = self._cell(self.rows[i], side)
                line.append(f"{text:{CELL}.{CELL - 1}}", style=style)
            lines.append(line)
        hidden = [f"{first} above"] * (first > 0) + [f"{len(self.rows) - last} below"] * (last < len(self.rows))
        if hidden:
            titles.append(f"(more rows: {', '.join(hidden)})")
        return lines

    def _cell(self, row: str, side: str) -> tuple[str, str]:
        """A cell's text and style: the run that runs, else the rate so far, else how the last run ended."""
        mine = [state for state in self.states if (state.row, state.side) == (row, side)]
        if active := [state.text for state in mine if state.stage == "active"]:
            return active[0], "bold cyan"
        ended = [state for state in mine if state.stage == "ended"]
        rounds = f" ({len(ended)}/{len(mine)})" if len(mine) > 1 else ""
        if bad := [state.text for state in ended if state.rate is None]:
            return f"{bad[-1]}{rounds}", "red"
        if rates := [state.rate for state in ended if state.rate is not None]:
            return f"{statistics.geometric_mean(rates):.0f}{rounds}", "green"
        return ("waiting", "dim") if mine else ("", "")

    def _note(self, number: int, stage: Stage, text: str, rate: float | None = None) -> None:
        state = self.states[number]
        state.stage, state.text, state.rate = stage, text, rate

    def _look_at_machine(self) -> None:
        """Reads the machine where the last reading is READ seconds old, and says what others took since."""
        if self.before and time.monotonic() - self.before.at < READ:
            return
        try:
            now = conditions.read([os.getpid()])
            found = conditions.between(self.before, now) if self.before else None
        except (OSError, ValueError):  # a system without these counters
            self.machine = "not known"
            return
        if found:
            share, words = found.disturbance(on_gpu=bool(found.gpus))
            self.machine = f"{'quiet' if share < DISTURBED else 'NOT QUIET'}, {words}"
        self.before = now


def window(rows: int, current: int, height: int) -> tuple[int, int]:
    """The first row to show of so many, and the one after the last: at most `height`, with the current one."""
    height = max(1, min(rows, height))
    first = min(max(0, current - height // 2), rows - height)
    return first, first + height


def _brief(progress: Progress) -> str:
    """The progress in a cell."""
    if progress.step is None:
        return progress.line()
    return f"step {progress.step.number}/{progress.step.total}: {progress.rate:.0f}"
