"""Checks that two runs are the same training: by the models that they built and by their curves."""

from collections.abc import Iterator
from typing import NamedTuple

from tunebench.record import Record


class Tolerance(NamedTuple):
    """The largest relative differences of two curves that still count as the same training, at any step."""

    first_loss: float  # of step 1, which depends on the start weights and the tokens only
    loss: float
    gradient: float  # of the gradient norms, which show faults that the loss hides


class Apart(NamedTuple):
    """The relative differences of two runs' curves, by step."""

    loss: list[float]
    grad_norm: list[float]


# Float32: at least 47 times the differences in docs/models.md. Low precision: what rounding alone may do, as
# tests/scripts/test_precision.py allows between torch in low precision and torch in float32.
TOLERANCES = {
    "fp32": Tolerance(1e-5, 1e-4, 1e-4),
    "bf16": Tolerance(1e-3, 1e-2, 5e-2),
    "fp16": Tolerance(5e-4, 5e-3, 2e-2),
}


LEAST = 1e-12  # a value is divided by at least this


def parity(paddle: Record, torch: Record) -> float:
    """The largest relative difference of two loss curves at any step."""
    return max(relative("loss", paddle, torch))


def disagreement(paddle: Record, torch: Record, apart: Apart | None = None) -> str | None:
    """Why two runs are not the same training: the field or curve, the step and both values. None where they are.

    `apart` is what `how_far_apart` gives for them, if it is known already.
    """
    if built := _contradiction(paddle, torch):
        return f"model.built{built}"
    ours, theirs = _skipped(paddle), _skipped(torch)
    if ours != theirs:
        return f"steps.grad_norm: the skipped steps differ: {ours or 'none'} ≠ {theirs or 'none'}"
    differences = apart or how_far_apart(paddle, torch)
    for curve, found, limit in _limited(differences, TOLERANCES[paddle.setup.dtype]):
        if not max(found) <= limit:
            worst = found.index(max(found))
            values = [getattr(record.steps, curve)[worst] for record in (paddle, torch)]
            where, words = f"steps.{curve} of step {worst + 1}", f"{found[worst]:.1e} apart, allowed are {limit:g}"
            return f"{where}: {values[0]:.8g} ≠ {values[1]:.8g}, {words}"
    return None


def _contradiction(paddle: Record, torch: Record) -> str | None:
    """The field in which two runs' models differ. Older records do not hold the model that was built."""
    ours, theirs = (record.model.built if record.model else None for record in (paddle, torch))
    if ours is None or theirs is None:
        return None if ours is theirs else ": known of one side alone"
    found = ours.contradiction(theirs)
    return found and f".{found}"


def _skipped(record: Record) -> list[int]:
    assert record.steps is not None
    return [i for i, norm in enumerate(record.steps.grad_norm, 1) if norm is None]


def _limited(apart: Apart, tolerance: Tolerance) -> Iterator[tuple[str, list[float], float]]:
    """Each curve's name, its relative differences by step, and the largest allowed one."""
    yield "loss", apart.loss[:1], tolerance.first_loss
    yield "loss", apart.loss, tolerance.loss
    yield "grad_norm", apart.grad_norm, tolerance.gradient


def how_far_apart(paddle: Record, torch: Record) -> Apart:
    """The relative differences of both curves of two runs."""
    return Apart(relative("loss", paddle, torch), relative("grad_norm", paddle, torch))


def relative(curve: str, paddle: Record, torch: Record) -> list[float]:
    """The relative difference of a curve at each step; 0 at steps that one side skipped."""
    steps = zip(getattr(paddle.steps, curve), getattr(torch.steps, curve), strict=True)
    # A conditional takes half the time of `max`.
    return [
        0.0 if a is None or b is None else abs(a - b) / (size if (size := abs(b)) > LEAST else LEAST) for a, b in steps
    ]
