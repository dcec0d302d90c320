"""The table of memory: the predicted and the measured peak of each setup."""

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from tunebench.frameworks import FRAMEWORKS
from tunebench.models.families import FAMILIES
from tunebench.record import ALLOCATED, RESIDENT, Record
from tunebench.report.cells import Cell, cells_of
from tunebench.report.identity import group_of, model_of, place_of
from tunebench.report.markdown import NOT_AVAILABLE, measured_on
from tunebench.report.remarks import on_what
from tunebench.report.tables import COLUMNS, NOTE, Column, as_csv, notes, table

GB = 10**9


@dataclass(frozen=True)
class Row:
    """The memory of one framework's runs with one setup. It is that of the run whose measured peak is largest.

    - `num_gpus`: processes, where there are no GPUs.
    - `status`: how the runs ended.
    - `predicted_peak_memory_bytes`: of tensors on the GPU that holds most. None where the record has no prediction.
    - `measured_peak_memory_bytes`: of the process that held most, as `counter` counts it. None where the run did not
      end ok.
    - `error`: predicted ÷ measured - 1. `refusal`: why there is none, in a few words.
    """

    family: str
    model: str
    method: str
    num_gpus: int
    batch_size: int
    framework: str
    setup: str
    status: str
    predicted_peak_memory_bytes: int | None
    measured_peak_memory_bytes: int | None
    counter: str | None
    error: float | None
    refusal: str | None
    note: str | None


MEMORY_COLUMNS = [
    *COLUMNS[:4],
    Column("Framework", lambda row: FRAMEWORKS[row.framework].title),
    Column("Setup", lambda row: row.setup),
    Column("Predicted Peak GB", lambda row: _gigabytes(row.predicted_peak_memory_bytes)),
    Column("Measured Peak GB", lambda row: _measured(row)),
    Column("Counter", lambda row: row.counter or NOT_AVAILABLE),
    Column("Error", lambda row: (row.refusal or NOT_AVAILABLE) if row.error is None else f"{row.error:+.1%}"),
]
CAPTION = (
    "Predicted: bytes on the GPU that holds most, by formula: tensors, and 8% of what a step adds to those that last. "
    "Layers compiled by --compile are not forecast. Measured: the largest of all processes and "
    "rounds, from the first step on; older records may count from the process's start. "
    f"{ALLOCATED} counts tensors on a GPU, by the framework's allocator. Error = predicted ÷ measured - 1. "
    f"{RESIDENT.capitalize()} is all that a process on a CPU holds, libraries included. The prediction leaves these "
    "out, so that the two have no error. 1 GB = 10⁹ bytes."
)


def memory_rows(records: list[Record]) -> list[Row]:
    """A row for each setup and framework. A/A runs count. Peers do not: no formula knows them."""
    groups: dict[tuple[Any, ...], dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record.peer is None:
            groups[group_of(record)][record.framework].append(record)
    rows = []
    for group in sorted(groups, key=place_of):
        cells = [cell for members in groups[group].values() for cell in cells_of(members)]
        cells.sort(key=lambda cell: (cell.heading, cell.first.framework))
        counts = Counter((cell.heading, cell.first.framework) for cell in cells)
        rows += [_row(group, cell, told_apart=counts[cell.heading, cell.first.framework] > 1) for cell in cells]
    return rows


def render_memory(records: list[Record], form: str) -> str:
    """The rows of memory as `md`, `csv` or `json`. Markdown has a table for each model family."""
    rows = memory_rows(records)
    if form == "json":
        return json.dumps([asdict(row) for row in rows], indent=1)
    if form == "csv":
        return as_csv([Column("Family", lambda row: row.family), *MEMORY_COLUMNS, NOTE], rows)
    return "\n".join([*_tables(rows, [record for record in records if record.peer is None]), CAPTION])


def _tables(rows: list[Row], records: list[Record]) -> Iterator[str]:
    for family, group in itertools.groupby(rows, key=lambda row: row.family):
        members = list(group)
        yield f"### {FAMILIES[family].title if family in FAMILIES else family}: peaks of memory\n"
        yield measured_on([record for record in records if model_of(record)[0] == family]) + "\n"
        yield table(MEMORY_COLUMNS, members) + "\n"
        yield from notes(members)


def _row(group: tuple[Any, ...], cell: Cell, told_apart: bool) -> Row:
    largest = max(cell.records, key=lambda r: (max(r.peak_memory_bytes, default=0), r.predicted_peak_memory_bytes or 0))
    ended_ok, predicted = largest.status == "ok", largest.predicted_peak_memory_bytes
    measured = max(largest.peak_memory_bytes, default=None) if ended_ok else None
    counter = largest.peak_memory_counter if measured else None
    refusal = error = note = None
    if measured and largest.setup.compile:
        refusal = "none: compiled"
    elif measured and predicted is None:
        refusal = "none: no prediction"
    elif measured and counter != ALLOCATED:
        refusal = "none: other counters"
    elif measured and predicted is not None:
        error = predicted / measured - 1
    if not ended_ok:
        note = f"{largest.framework} {largest.status}: {largest.reason}"
    elif told_apart:
        note = on_what(largest)
    family, model, method, devices, bsz = group
    return Row(
        family=family,
        model=model,
        method=method,
        num_gpus=devices,
        batch_size=bsz,
        framework=largest.framework,
        setup=cell.heading,
        status=largest.status,
        predicted_peak_memory_bytes=predicted,
        measured_peak_memory_bytes=measured,
        counter=counter,
        error=error,
        refusal=refusal,
        note=note,
    )


def _gigabytes(size: int | None) -> str:
    return NOT_AVAILABLE if size is None else f"{size / GB:.2f}"


def _measured(row: Row) -> str:
    if row.status == "ok":
        return _gigabytes(row.measured_peak_memory_bytes)
    return "out of memory" if row.status == "oom" else row.status
