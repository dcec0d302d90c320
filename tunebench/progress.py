"""What a program prints while it works: a run's line after each step, its parser, and how a long step gets on."""

import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from rich.progress import Progress

PATTERN = re.compile(r"step (\d+)/(\d+): ([\d.]+) s, (\d+) effective tokens/s")
LINE = 10.0  # seconds between two lines about a long step, where stdout is no terminal


class Step(NamedTuple):
    """A finished step: its number from 1, the run's steps, its seconds, and its effective tokens per second."""

    number: int
    total: int
    seconds: float
    rate: float

    def line(self) -> str:
        """The line that a run prints."""
        return f"step {self.number}/{self.total}: {self.seconds:.3f} s, {self.rate:.0f} effective tokens/s"


def read_step(line: str) -> Step | None:
    """The step in a printed line; None where the line has none."""
    found = PATTERN.search(line)
    return Step(int(found[1]), int(found[2]), float(found[3]), float(found[4])) if found else None


@contextlib.contextmanager
def told(description: str, total: int, bar: bool = True) -> Iterator[Callable[[int], None]]:
    """A function that takes how much more of `total` is done, and shows it with an estimate of the time left.

    On a terminal it draws a bar where `bar` is set. Elsewhere, as in a log, it prints a line every LINE seconds.
    """
    if sys.stdout.isatty():
        with Progress(disable=not bar) as progress:
            task = progress.add_task(description, total=total)
            yield lambda more: progress.advance(task, more)
        return
    done, started = 0, time.monotonic()
    said = started

    def advance(more: int) -> None:
        nonlocal done, said
        done, now = done + more, time.monotonic()
        if now - said >= LINE and 0 < done < total:
            said, elapsed = now, now - started
            left = elapsed / done * (total - done)
            print(
                f"{description}: {done / total:.0%}, {in_words(elapsed)} so far, about {in_words(left)} left",
                flush=True,
            )

    yield advance


def in_words(seconds: float) -> str:
    """A duration, such as `2 min 5 s`."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
