"""Functions with which both sides read back from their model what it computes with."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

PROBES = (-2.0, -0.5, 0.0, 1.0, 3.0)  # the arguments at which activations are compared
ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: max(x, 0.0),
}


def activation_name(values: Sequence[float]) -> str:
    """The name of the activation with these values at `PROBES`; `unknown` where none of ACTIVATIONS fits."""
    for name, function in ACTIVATIONS.items():
        if all(math.isclose(value, function(x), abs_tol=1e-5) for value, x in zip(values, PROBES, strict=True)):
            return name
    return "unknown"


def only(values: Iterable[Any]) -> Any:
    """The one value of all. Raises RuntimeError where they differ or where there is none."""
    found = list(dict.fromkeys(values))
    if len(found) != 1:
        raise RuntimeError(f"the layers of the model differ: {found}" if found else "the model has no such layer")
    return found[0]
