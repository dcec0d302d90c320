"""What a step of a model with many layers holds, from steps of two models with a few layers and with one more.

Layers are alike, so that bytes change from layer to layer by the same amounts.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Moment(NamedTuple, Generic[T]):
    """An operator of a step, and what is held while it runs."""

    phase: str
    operator: str
    held: T


def pairs(few: Sequence[Moment[T]], many: Sequence[Moment[T]]) -> Iterator[tuple[str, T, T]]:
    """Each phase with what is held at an operator with few layers, and with one layer more.

    What is held is largest in a first or in a last layer. So the operators of one layer are left out twice: of the
    earliest layer that can be, and of the latest. Raises RuntimeError where layers differ.
    """
    parts = [[list(group) for _, group in itertools.groupby(each, lambda m: m.phase)] for each in (few, many)]
    for some, others in zip(*parts, strict=True):
        phase, same = some[0].phase, others[0].phase
        names = [[each.operator for each in group] for group in (some, others)]
        latest = common_start(*names)
        earliest = len(some) - common_start(*(each[::-1] for each in names))
        if phase != same or earliest > latest:
            raise RuntimeError(f"the layers differ in the {phase} pass")
        for first in {max(earliest, 0), latest}:
            left = others[:first] + others[first + len(others) - len(some) :]
            yield from ((phase, one.held, other.held) for one, other in zip(some, left, strict=True))


def common_start(some: Sequence[str], others: Sequence[str]) -> int:
    """How many first names two lists have in common."""
    differ = (i for i, (one, other) in enumerate(zip(some, others, strict=False)) if one != other)
    return next(differ, min(len(some), len(others)))
