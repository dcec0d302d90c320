"""What the passes of a run hold at the moments that can be the peak, for all sizes: one table for each framework."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tunebench.forecast.symbols import SYMBOLS, Kind, Monomial
from tunebench.recipe import MOST_LOGITS, POSITIONS

FOLDER = Path(__file__).parent
FEWEST = 2  # layers of the first numbers
# Phases that are no moments of their own: before the backward pass, when the last pass ends, and the weights.
AT_FORWARD_END, AT_END, WEIGHTS = "kept", "end", "weights"


class Logit(NamedTuple):
    """The bytes of a logit, and those of its copies in a stretch beside what it takes without stretches."""

    size: int
    copied: int

    @classmethod
    def of(cls, framework: str, types: str) -> "Logit":
        """That of a framework for `types` of a Kind."""
        size = 4 if types == "fp32" else 2
        return cls(size, size if framework == "torch" else size + 4)


class Passes(NamedTuple):
    """The passes of a kind of run.

    `kinds` are those of the tensors, and `exponents` of SYMBOLS what their bytes grow with, (terms, sizes). `few` are
    the numbers before these with FEWEST layers, and `more` what each further layer adds, both (moments, terms).
    """

    phases: list[str]
    kinds: list[str]
    exponents: np.ndarray
    few: np.ndarray
    more: np.ndarray

    def at(self, sizes: Mapping[str, float], layers: int, logit: Logit) -> np.ndarray:
        """The bytes of each term at each moment, (moments, terms).

        Beside SYMBOLS `sizes` has `squares`, the sum of the squares of the rows' widths. Without padding it is that of
        the samples' lengths: eager attention goes sample by sample. The losses take many logits in stretches. Then only
        the logits and their gradient are whole.
        """
        values = np.array([sizes[name] for name in SYMBOLS])
        products = (values**self.exponents).prod(axis=1)
        products[self.exponents[:, list(SYMBOLS).index("width")] > 1] *= sizes["squares"] / (
            sizes["rows"] * sizes["width"] ** 2
        )
        products[self.where("labels", "vocabulary")] *= min(1.0, POSITIONS / sizes["labels"])
        numbers = self.few + (layers - FEWEST) * self.more
        amounts = numbers * products
        logits = self.where("rows", "width", "vocabulary") & (np.array(self.kinds) == "logits_and_loss")
        over = logits & (products > MOST_LOGITS)
        rest = 2 * logit.size * (products[over] - MOST_LOGITS)
        whole = (numbers[:, over] + logit.copied) * MOST_LOGITS + rest
        amounts[:, over] = np.where(numbers[:, over] > 2 * logit.size, whole, amounts[:, over])
        return amounts

    def where(self, *names: str) -> np.ndarray:
        """Which terms grow with all these sizes."""
        return np.all(self.exponents[:, [list(SYMBOLS).index(name) for name in names]] > 0, axis=1)

    def by_kind(self, sizes: Mapping[str, float], layers: int, logit: Logit) -> dict[str, np.ndarray]:
        """The bytes at each moment by kind of tensor."""
        amounts = self.at(sizes, layers, logit)
        groups: dict[str, list[int]] = {}
        for i, kind in enumerate(self.kinds):
            groups.setdefault(kind, []).append(i)
        return {kind: amounts[:, members].sum(axis=1) for kind, members in groups.items()}


def to_line(kind: Kind, passes: Passes) -> str:
    """A line of the table."""
    terms = [[name, spell(tuple(exponents))] for name, exponents in zip(passes.kinds, passes.exponents, strict=True)]
    moments = []
    for phase, few, more in zip(passes.phases, passes.few, passes.more, strict=True):
        there = [i for i in range(len(terms)) if few[i] or more[i]]
        moments.append([phase, {i: [short(few[i]), short(more[i])] for i in there}])
    return json.dumps({"kind": kind, "terms": terms, "moments": moments}, separators=(",", ":"))


def read_line(line: str) -> tuple[Kind, Passes]:
    """Reads a line of the table."""
    found = json.loads(line)
    terms, moments = found["terms"], found["moments"]
    few, more = np.zeros((2, len(moments), len(terms)))
    for row, (_, numbers) in enumerate(moments):
        for i, (first, further) in numbers.items():
            few[row, int(i)], more[row, int(i)] = first, further
    exponents = np.array([read(word) for _, word in terms])
    return Kind(*found["kind"]), Passes([m[0] for m in moments], [t[0] for t in terms], exponents, few, more)


def spell(exponents: Monomial) -> str:
    """A product of sizes as words, such as `rows width width`."""
    return " ".join(name for name, power in zip(SYMBOLS, exponents, strict=True) for _ in range(power))


def read(word: str) -> Monomial:
    """The exponents of such words."""
    names = word.split()
    return tuple(names.count(name) for name in SYMBOLS)


def short(number: float) -> float | int:
    """A number with six digits, without a point where it has none."""
    rounded = float(f"{number:.6g}")
    return int(rounded) if rounded.is_integer() else rounded


@functools.cache
def table(framework: str) -> dict[Kind, str]:
    """The lines of a framework's table by kind of run. They are parsed when they are asked for."""
    lines = (FOLDER / f"{framework}.jsonl").read_text().splitlines()
    start = len('{"kind":')
    return {Kind(*json.JSONDecoder().raw_decode(line, start)[0]): line for line in lines}


@functools.lru_cache(maxsize=256)
def passes_of(framework: str, kind: Kind) -> Passes | None:
    """The passes of a kind of run; None where the table has none."""
    line = table(framework).get(kind)
    return read_line(line)[1] if line else None
