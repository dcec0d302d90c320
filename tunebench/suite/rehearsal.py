"""A rehearsal of a suite: each run with its own widths, flags, processes and data, but few layers and few steps.

It shows in minutes what would fail, how long the whole suite would take, and what was seen of memory.
"""

from collections.abc import Sequence
from typing import Any

from tunebench.errors import BadInput
from tunebench.flags import COMPILED_STEPS, Flags
from tunebench.models.presets import PRESETS
from tunebench.record import Record, read_record
from tunebench.report.markdown import NOT_AVAILABLE, markdown
from tunebench.suite.file import Planned

LAYERS, STEPS = 2, 3
COLUMNS = ("Run", "Rehearsal", "Set-up s", "Step s", "Whole Run min", "Peak GB per Process")


def rehearsal_changes(whole: Sequence[Planned]) -> dict[str, dict[str, Any]]:
    """The flags that a rehearsal has in place of a suite's, by entry. `whole` are the suite's runs."""
    return {run.entry.name: _changes(run.flags) for run in whole}


def _changes(flags: Flags) -> dict[str, Any]:
    warmup = COMPILED_STEPS if flags.compile else 1
    layers = {"layers": min(LAYERS, flags.layers or LAYERS)} if flags.weights == "random" else {}
    return layers | {"steps": warmup + STEPS - 1, "epochs": None, "warmup-steps": warmup}


def rehearsal_table(runs: Sequence[Planned], whole: Sequence[Planned]) -> None:
    """Prints what came of each rehearsed run, and what the whole suite would take."""
    of_all = {run.entry.name: run for run in whole}
    lines, minutes, unknown = [], 0.0, 0
    for run in runs:
        record = _record(run)
        took = whole_minutes(record, of_all[run.entry.name].flags) if record else None
        lines.append([run.entry.name, *cells(record, took)])
        minutes += took or 0.0
        unknown += took is None
    rounds = max(run.round for run in whole)
    print(f"\n### Rehearsal\n\n{markdown(COLUMNS, lines)}\n")
    left_out = f", without the {unknown} run(s) that have no estimate" * (unknown > 0)
    print(
        f"The whole suite would take about {minutes * rounds:.0f} minutes with {rounds} round(s){left_out}: steps as "
        "here, times the layers left out. A head or an embedding that is large makes this too much.",
        flush=True,
    )


def _record(run: Planned) -> Record | None:
    try:
        return read_record(run.record)
    except BadInput:
        return None


def cells(record: Record | None, took: float | None) -> list[str]:
    """The cells of a rehearsed run after its name; `took` are the minutes of the whole run."""
    if record is None:
        return ["not run", *[NOT_AVAILABLE] * 4]
    said = record.status if record.status == "ok" else f"{record.status}: {record.reason}".replace("|", "\\|")
    if record.status != "ok" or record.steps is None:
        return [said, *[NOT_AVAILABLE] * 4]
    peak = max(record.peak_memory_bytes) / 1e9
    minutes = NOT_AVAILABLE if took is None else f"{took:.1f}"
    return [said, f"{record.setup_seconds or 0:.1f}", f"{seconds_of_a_step(record):.3g}", minutes, f"{peak:.2f}"]


def seconds_of_a_step(record: Record) -> float:
    """The mean seconds of a timed step."""
    assert record.steps
    timed = record.steps.seconds[record.timed_from :]
    return sum(timed) / len(timed)


def whole_minutes(record: Record, flags: Flags) -> float | None:
    """The minutes of a whole run with `flags`, from the record of its rehearsal; None where it did not end ok."""
    if record.status != "ok" or record.model is None or record.steps is None:
        return None
    layers = layers_of(flags)
    scale = max(layers / LAYERS, 1.0) if layers else 1.0
    steps = flags.steps or (flags.epochs or 0) * (flags.samples or 0) // flags.bsz
    if not steps:  # of a file whose samples are not counted
        return None
    return ((record.setup_seconds or 0.0) + steps * seconds_of_a_step(record) * scale) / 60


def layers_of(flags: Flags) -> int | None:
    """The layers of a preset's run; None of a checkpoint, which a rehearsal does not cut."""
    return (flags.layers or PRESETS[flags.model].layers) if flags.weights == "random" else None
