"""The line that a run prints after each step, and its parser."""

import re
from typing import NamedTuple

PATTERN = re.compile(r"step (\d+)/(\d+): ([\d.]+) s, (\d+) effective tokens/s")


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
