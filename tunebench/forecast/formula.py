"""Forecasts the memory of one GPU by formulas, in microseconds and without a framework.

The bytes that layers keep are those of activations.json, which benchmarks/activations.py counted with the frameworks'
own forecasts. States are counted by how each framework splits them; tests compare both with counted bytes.
"""

from pathlib import Path
from typing import NamedTuple

from tunebench.flags import Flags

TABLE = Path(__file__).with_name("activations.json")


class Shape(NamedTuple):
    """The widths of a layer and a micro-batch: `queries` and `keys` are heads × head size, `longest` the tokens of the
    longest sample, or the padded width."""

    hidden: int
    queries: int
    keys: int
    inner: int
    heads: int
    head_size: int
    tokens: int
    longest: int


def kind_of(family: str, method: str, flags: Flags) -> str:
    """The key of a kind of layer in the table."""
    attention = "eager" if flags.attention == "eager" else "fused"
    return "-".join([family, method, flags.amp or "fp32", attention, *["by-sample"] * flags.padding_free])


def layer_features(shape: Shape) -> list[float]:
    """What the bytes of a layer are linear in: tokens × (hidden, queries, keys, inner, heads, heads × longest, 1)."""
    widths = (shape.hidden, shape.queries, shape.keys, shape.inner, shape.heads, shape.heads * shape.longest, 1)
    return [shape.tokens * width for width in widths]


def rest_features(shape: Shape) -> list[float]:
    """What the bytes beside the layers are linear in: tokens × (hidden, head size, longest, heads × longest, 1)."""
    widths = (shape.hidden, shape.head_size, shape.longest, shape.heads * shape.longest, 1)
    return [shape.tokens * width for width in widths]
