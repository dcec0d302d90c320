"""The content of the page: what the Markdown tables show, by machine, by the same functions and in the same words."""

import gzip
import hashlib
import itertools
import json
import math
import shlex
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunebench.digest import digest_of
from tunebench.frameworks import FRAMEWORKS
from tunebench.record import Record
from tunebench.report.cells import Cell
from tunebench.report.html.words import Words
from tunebench.report.identity import METHODS, as_key, attempt_of, work_of
from tunebench.report.markdown import NOT_AVAILABLE, measured_on
from tunebench.report.memory import CAPTION as MEMORY_CAPTION
from tunebench.report.memory import MEMORY_COLUMNS, memory_rows
from tunebench.report.pairing import MINUTES_APART, SIDES, Joined, Row, against_itself, compare, join_cells
from tunebench.report.peers import CAVEAT as PEERS_CAPTION
from tunebench.report.peers import peer_tables
from tunebench.report.rounds import Near, Rounds, in_one_series, minutes_apart, round_of
from tunebench.report.stats import is_across_zero, is_within, rate_interval
from tunebench.report.tables import COLUMNS, NOTE, SELF_COLUMNS, Column, caption, noise_in_words, verdict

# The columns of the page, the most important ones first: a phone shows the first ones.
ORDER = (
    *("Model", "Method", "Num GPUs", "Batch Size", "Paddle Setup", "Torch Setup", "Speedup", "95% Interval"),
    *("Compared", "Paddle Effective Tokens/s", "Torch Effective Tokens/s", "Rounds", "Paddle Spread", "Torch Spread"),
    *("Round Noise", "Rounds for 5%"),
)
HEADLINE = sorted(COLUMNS, key=lambda column: ORDER.index(column.title) if column.title in ORDER else len(ORDER))
SORT_KEYS = {
    "Num GPUs": "num_gpus",
    "Batch Size": "batch_size",
    "Speedup": "speedup",
    "Paddle Effective Tokens/s": "paddle_effective_tokens_per_second",
    "Torch Effective Tokens/s": "torch_effective_tokens_per_second",
    "Rounds": "rounds",
    "Paddle Spread": "paddle_spread",
    "Torch Spread": "torch_spread",
    "Round Noise": "round_noise",
    "Rounds for 5%": "rounds_for_5",
}
# The kinds of verdicts, as the filter names them.
FASTER, SLOWER, WITHIN, UNCLEAR, ONE_ROUND, NO_SPEEDUP = "faster", "slower", "within", "unclear", "one", "none"
OK, DISTURBED, REFUSED, ONE_SIDE = "ok", "disturbed", "refused", "alone"  # beside the statuses of records


@dataclass(frozen=True)
class Text:
    """A cell of a table: its text, and the number or text that sorts it."""

    text: str
    sort: float | str | None = None


@dataclass(frozen=True)
class Table:
    """A table as texts. `about` has each line's model and method, by which the page filters."""

    heading: str
    caveat: str
    columns: list[str]
    lines: list[list[str]]
    about: list[tuple[str, str]]
    remarks: list[str]


@dataclass(frozen=True)
class Line:
    """A row of the headline table. `cells` are the indices of the Paddle cell and of the Torch cell in `Content.cells`.

    `ends` are the filter's words for how its runs ended, `status` is that in the page's language. `key` stays the same
    when rounds are added, so that a link to the row stays right.
    """

    key: str
    number: int
    row: Row
    texts: list[Text]
    status: str
    ends: list[str]
    verdict: str
    kind: str
    series: list[int]
    cells: list[int | None]
    data: dict[str, Any]


@dataclass(frozen=True)
class MachinePart:
    """What was measured on one machine: the caveat, the series, the rows and the other tables."""

    key: str
    name: str
    caveat: str
    series: list[str]
    lines: list[Line]
    caption: str
    noise: list[str]
    tables: list[Table]


@dataclass
class Content:
    """The whole page. Rows share cells and name them by index; cells share works and name their records.

    `ratios` has for each cell, by the index of another one of the same work, its rate ÷ that one's - 1.
    """

    memory_columns: list[str]
    machines: list[MachinePart] = field(default_factory=list)
    cells: list[dict[str, Any]] = field(default_factory=list)
    works: list[dict[str, Any]] = field(default_factory=list)
    ratios: list[dict[int, dict[str, Any]]] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)

    @property
    def lines(self) -> list[Line]:
        """The rows of all machines."""
        return [line for machine in self.machines for line in machine.lines]

    def data(self) -> dict[str, Any]:
        """What the page's script reads, but for the records."""
        rows = [
            line.data
            | {
                "id": line.key,
                "number": line.number,
                "machine": machine.key,
                "cells": line.cells,
                "series": line.series,
            }
            | {"ends": line.ends, "kind": line.kind, "verdict": line.verdict}
            for machine in self.machines
            for line in machine.lines
        ]
        return {"rows": rows, "cells": self.cells, "works": self.works, "memory_columns": self.memory_columns}

    def packed_records(self) -> bytes:
        """All records as they are in their files, a line each, compressed (gzip)."""
        lines = []
        for record in self.records:
            content = json.loads(record.model_dump_json(by_alias=True))
            lines.append(
                json.dumps(content | {"sha256": digest_of(content)}, separators=(",", ":"), ensure_ascii=False)
            )
        return gzip.compress("\n".join(lines).encode(), mtime=0)

    def packed_ratios(self) -> bytes:
        """The ratios as JSON, compressed (gzip)."""
        return gzip.compress(json.dumps(self.ratios, separators=(",", ":"), ensure_ascii=False).encode(), mtime=0)


def content_of(records: list[Record], words: Words) -> Content:
    """The content of the page for these records. Machines come in the order of their newest record, that first."""
    content = Content([words.heading(column.title) for column in MEMORY_COLUMNS[-4:]])
    by_machine: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_machine[record.hardware.place].append(record)
    newest = sorted(by_machine.values(), key=lambda runs: max(run.started_at for run in runs), reverse=True)
    for members in newest:
        content.machines.append(_machine(members, content, words))
    return content


def _machine(records: list[Record], content: Content, words: Words) -> MachinePart:
    ours = [record for record in records if record.peer is None]
    near, series = in_one_series(ours), _series(records)
    joined = sorted(join_cells(ours), key=lambda each: each.row.tuned)
    number = {id(cell): len(content.cells) + i for i, cell in enumerate(_cells(joined))}
    _add_cells(joined, near, content, words)
    keys: set[str] = set()
    lines: list[Line] = []
    for each in joined:
        lines.append(_line(each, len(content.lines) + len(lines) + 1, number, series, words, keys))
    comparisons = against_itself(ours)
    plain = [record for record in ours if record.aa is None]
    return MachinePart(
        key=records[0].hardware.place,
        name=_name(records),
        caveat=words.translated(measured_on(plain or records)),
        series=[words.say("series_line", **each) for each in _series_lines(records, series)],
        lines=lines,
        caption=words.translated(caption([line.row for line in lines])),
        noise=[words.translated(line) for line in noise_in_words(comparisons)] if comparisons else [],
        tables=[*_self_tables(ours, comparisons, words), *_peers(records, words), *_memory(records, words)],
    )


def _name(records: Sequence[Record]) -> str:
    """A machine's name for people: its GPUs or CPU, its cores, and the first digits of its digest."""
    hardware = records[-1].hardware
    gpus = [accelerator.name for accelerator in hardware.accelerators]
    what = f"{len(gpus)} × {gpus[0]}" if gpus else f"{hardware.cpu}, {hardware.cores} cores"
    return f"{what} ({hardware.machine[:8]})"


def _series(records: Iterable[Record]) -> dict[int, int]:
    """The number of each record's series of measurement, by its identity."""
    ordered = sorted(records, key=lambda record: record.started_at)
    near = in_one_series(ordered)
    numbers, current = {}, 1
    for before, record in itertools.pairwise([ordered[0], *ordered]):
        current += not near(before, record)
        numbers[id(record)] = current
    return numbers


def _series_lines(records: Iterable[Record], series: dict[int, int]) -> list[dict[str, Any]]:
    """Number, start, end and runs of each series."""
    starts: dict[int, list[str]] = defaultdict(list)
    for record in records:
        starts[series[id(record)]].append(record.started_at[:16].replace("T", " "))
    return [
        {"number": number, "first": min(times), "last": max(times), "runs": len(times)}
        for number, times in sorted(starts.items())
    ]


def _cells(joined: Iterable[Joined]) -> list[Cell]:
    """The cells of these rows, each once."""
    found = {id(cell): cell for each in joined for cell in (each.paddle, each.torch) if cell}
    return list(found.values())


def _add_cells(joined: list[Joined], near: Near, content: Content, words: Words) -> None:
    """Adds what rows share of their sides: runs, work, padding, memory, and the ratios to cells of the same work."""
    cells, first = _cells(joined), len(content.cells)
    works = {as_key(work): i for i, work in enumerate(content.works)}
    alike: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, cell in enumerate(cells):
        if cell.rate:
            alike[cell.first.framework, cell.work].append(i)
        if cell.work not in works:
            works[cell.work] = len(content.works)
            content.works.append(work_of(cell.first))
    ratios = _ratios(cells, alike.values(), near, words)
    content.ratios += [{first + j: ratio for j, ratio in ratios[i].items()} for i in range(len(cells))]
    for cell in cells:
        runs = range(len(content.records), len(content.records) + len(cell.records))
        content.records += cell.records
        (memory,) = memory_rows(cell.records)
        content.cells.append(
            {
                "framework": cell.first.framework,
                "setup": cell.heading,
                "work": works[cell.work],
                "runs": [
                    {
                        "record": index,
                        "name": _run_name(record),
                        "short": _short_name(record),
                        "command": command_of(record),
                    }
                    for index, record in zip(runs, cell.records, strict=True)
                ],
                "timed": bool(cell.rate),
                "taken": max(cell.shares_taken, default=None),
                "padding": padding_share(cell.records),
                "memory": [words.translated(column.text(memory)) for column in MEMORY_COLUMNS[-4:]],
                "reasons": list(dict.fromkeys(f"{r.status}: {r.reason}" for r in cell.records if r.status != "ok")),
            }
        )


def _ratios(
    cells: Sequence[Cell], groups: Iterable[Sequence[int]], near: Near, words: Words
) -> dict[int, dict[int, dict[str, Any]]]:
    """The rates of cells ÷ those of the other cells of their group, by both indices: verdicts, or why there is none."""
    found: dict[int, dict[int, dict[str, Any]]] = defaultdict(dict)
    for group in groups:
        for i, j in itertools.combinations(group, 2):
            rounds, refusal, _ = compare(cells[i], cells[j], near)
            found[i][j] = _ratio(rounds, refusal, words)
            found[j][i] = _ratio(Rounds([(b, a) for a, b in rounds.pairs], rounds.dropped), refusal, words)
    return found


def _ratio(rounds: Rounds, refusal: str | None, words: Words) -> dict[str, Any]:
    if not rounds.pairs:
        return {"refusal": words.say("not_one_series")}
    if refusal:
        return {"refusal": words.translated(refusal)}
    difference = math.expm1(statistics.fmean(rounds.log_ratios))
    # The noise of runs that are minutes apart is unknown, so that the verdict on one round has none.
    text = words.translated(verdict(difference, rounds.interval))
    minutes = max(itertools.starmap(minutes_apart, rounds.pairs))
    apart = words.say("minutes_apart", minutes=f"{minutes:.0f}") if minutes > MINUTES_APART else ""
    return {"text": text + apart, "value": round(difference, 5)}


def padding_share(records: Iterable[Record]) -> float | None:
    """The share of padding in the tokens of the timed steps; None without steps."""
    real = padded = 0
    for record in records:
        if record.steps:
            real += sum(record.steps.effective_tokens[record.timed_from :])
            padded += sum(record.steps.padded_tokens[record.timed_from :])
    return 1 - real / padded if padded else None


def command_of(record: Record) -> str:
    """The command line that made a record, for the repository's root."""
    folder = "peers" if record.peer else record.framework
    program = f"{folder}/{record.argv[0].rpartition('/')[2]}" if record.argv else folder
    return shlex.join(["python3", program, *record.argv[1:]])


def _run_name(record: Record) -> str:
    return " · ".join([_short_name(record), record.started_at[:19], record.status])


def _short_name(record: Record) -> str:
    """The side and the round; the start where the round has no number."""
    number = round_of(record)
    return f"{FRAMEWORKS[record.framework].title} {f'r{number}' if number else record.started_at[5:19]}"


def _line(
    joined: Joined, place: int, number: dict[int, int], series: dict[int, int], words: Words, keys: set[str]
) -> Line:
    row, sides = joined.row, (joined.paddle, joined.torch)
    ends = ends_of(joined)
    kind = kind_of(row)
    texts = []
    for column in HEADLINE:
        sort: float | str | None = getattr(row, SORT_KEYS[column.title]) if column.title in SORT_KEYS else None
        texts.append(Text(words.translated(column.text(row)), sort))
    found = sorted({series[id(record)] for cell in sides if cell for record in cell.records})
    setup = row.paddle_setup or row.torch_setup or NOT_AVAILABLE
    processes = words.say("processes", count=row.num_gpus) if row.num_gpus > 1 else words.say("one_process")
    intervals = [rate_interval(rates) for rates in _rates(joined)]
    data = {
        "label": f"{place} {row.model} {METHODS[row.method]}, {setup}, bsz {row.batch_size}, {processes}",
        "processes": processes,
        "model": row.model,
        "method": METHODS[row.method],
        "setups": sorted({setup for setup in (row.paddle_setup, row.torch_setup) if setup}),
        "rates": [row.paddle_effective_tokens_per_second, row.torch_effective_tokens_per_second],
        "intervals": intervals,
        "speedup": row.speedup,
        "interval": row.interval,
        "noise": row.noise,
        "parity": row.parity,
        "note": row.note,
    }
    return Line(
        key=_key(joined, keys),
        number=place,
        row=row,
        texts=texts,
        status=words.say_status(ends, [cell.first.status if cell else None for cell in sides], row.refusal),
        ends=ends,
        verdict=words.translated(next(column for column in COLUMNS if column.title == "Speedup").text(row)),
        kind=kind,
        series=found,
        cells=[number[id(cell)] if cell else None for cell in sides],
        data=data,
    )


def _rates(joined: Joined) -> list[list[float]]:
    """Both sides' rates that the row's rates are made of."""
    if joined.rounds.pairs:
        return list(joined.rounds.rates)
    return [cell.rates if cell else [] for cell in (joined.paddle, joined.torch)]


def _key(joined: Joined, keys: set[str]) -> str:
    """A name of a row for links: of its machine, group, setups and work. It is added to `keys`."""
    sides = [
        cell
        and [cell.first.hardware.place, cell.setup, cell.first.versions, cell.work, cell.first.status]
        + (list(map(str, attempt_of(cell.first))) if cell.first.status != "ok" else [])
        for cell in (joined.paddle, joined.torch)
    ]
    row = joined.row
    about = [row.model, row.method, row.num_gpus, row.batch_size, row.compared, sides]
    base = hashlib.sha256(as_key(about).encode()).hexdigest()[:8]
    key = next(key for i in itertools.count() if (key := base + (f"-{i}" if i else "")) not in keys)
    keys.add(key)
    return key


def ends_of(joined: Joined) -> list[str]:
    """How the runs of a row ended: statuses other than ok, disturbed, refused, of one side alone; else ok."""
    cells = [cell for cell in (joined.paddle, joined.torch) if cell]
    found: list[str] = [cell.first.status for cell in cells if cell.first.status != "ok"]
    found += [DISTURBED] * any(cell.disturbed for cell in cells)
    found += [REFUSED] * bool(joined.row.refusal and not joined.row.refusal.startswith("disturbed"))
    found += [ONE_SIDE] * (len(cells) < len(SIDES))
    return list(dict.fromkeys(found)) or [OK]


def kind_of(row: Row) -> str:
    """The kind of a row's verdict."""
    if row.speedup is None:
        return NO_SPEEDUP
    if row.interval is None:
        return ONE_ROUND
    if not is_across_zero(row.interval):
        return FASTER if row.speedup > 0 else SLOWER
    return WITHIN if is_within(row.interval) else UNCLEAR


def _self_tables(records: list[Record], comparisons: list[Any], words: Words) -> list[Table]:
    if not comparisons:
        return []
    caveat = measured_on([record for record in records if record.aa is not None])
    return [_table(words.say("noise_heading"), caveat, SELF_COLUMNS, comparisons, words, noise_in_words(comparisons))]


def _memory(records: list[Record], words: Words) -> list[Table]:
    rows = memory_rows(records)
    caveat = measured_on([record for record in records if record.peer is None])
    columns = [*MEMORY_COLUMNS, NOTE]
    return [_table(words.say("memory_heading"), caveat, columns, rows, words, [MEMORY_CAPTION])] if rows else []


def _table(
    heading: str, caveat: str, columns: Sequence[Column], rows: Sequence[Any], words: Words, remarks: list[str]
) -> Table:
    return Table(
        heading=heading,
        caveat=words.translated(caveat),
        columns=[words.heading(column.title) for column in columns],
        lines=[[words.translated(column.text(row)) for column in columns] for row in rows],
        about=[(row.model, METHODS[row.method]) for row in rows],
        remarks=[words.translated(remark) for remark in remarks],
    )


def _peers(records: list[Record], words: Words) -> list[Table]:
    tables = []
    for each in peer_tables(records):
        tables.append(
            Table(
                heading=words.translated(each.heading),
                caveat=words.translated(measured_on(each.members)),
                columns=[words.heading(column) for column in each.columns],
                lines=[[words.translated(text) for text in line] for line in each.lines],
                about=[(each.model, METHODS[each.method])] * len(each.lines),
                remarks=[words.translated(text) for text in (*each.remarks, PEERS_CAPTION)],
            )
        )
    return tables
