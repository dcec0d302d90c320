"""The line that a run prints after each step, and how it is read again."""

import re
from typing import NamedTuple

PATTERN = re.compile(r"step (\d+)/(\d+): ([\d.]+) s, (\d+) effective tokens/s")


class Step(NamedTuple):
    """A finished step: its number from 1, of how many, its seconds and effective tokens per second."""

    number: int
    total: int
    seconds: float
    rate: float

    def line(self) -> str:
        """As a run prints it."""
        return f"step {self.number}/{self.total}: {self.seconds:.3f} s, {self.rate:.0f} effective tokens/s"


def read_step(line: str) -> Step | None:
    """The step that a printed line tells of; None where it tells of none."""
    found = PATTERN.search(line)
    return Step(int(found[1]), int(found[2]), float(found[3]), float(found[4])) if found else None
