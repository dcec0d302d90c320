"""The published record: its runs as data, its tables computed from them, and own runs beside it."""

import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from tunebench.bootstrap import ROOT
from tunebench.errors import BadInput
from tunebench.record import Record, first_fault
from tunebench.record import Strict as Part
from tunebench.report.identity import METHODS, heading_of, model_of, rank_of
from tunebench.report.load import load_files, record_files
from tunebench.report.markdown import NOT_AVAILABLE, figure
from tunebench.report.pairing import BEST_OF_EACH, LIKE_FOR_LIKE, Row, join
from tunebench.report.tables import Column, as_csv, verdict
from tunebench.report.tables import table as as_markdown

FOLDER = ROOT / "results" / "published"
FAMILIES = {"bloom": "Bloom", "llama": "Llama", "chatglm": "ChatGLM"}
WORK = {"full": "fine-tuning", "lora": "LoRA"}


class Strict(Part):
    """A part of a published record. Unknown fields and values of another type are errors."""

    model_config = ConfigDict(strict=True)


class Source(Strict):
    """The source of a figure: a document and a revision that has it. `added_later`: the first revision lacks it."""

    document: str
    commit: str
    added_later: bool


class Names(Strict):
    """The names of a run's model and setup in a table. `setup` is empty where nothing was split or recomputed."""

    model: str
    setup: str


class Setup(Strict):
    """How a run was split. `mp` 1 and `zero` 0 mean that it was not."""

    zero: int = Field(ge=0, le=3)
    mp: PositiveInt
    recompute: bool
    accumulation: PositiveInt


class PublishedRecord(Strict):
    """One published run. Its rate is in effective tokens/s of the whole job, None where it ran out of memory.

    `model` is the preset's name where there is one. `names` has the names of model and setup in each kind of table that
    shows the run. `bsz` is the global batch size in samples. Computed values, such as speedups, are not stored.
    """

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    schema_: Literal["published-1"] = Field(alias="schema")
    status: Literal["published"]
    reason: Literal["oom"] | None
    source: Source
    framework: Literal["torch", "paddle"]
    method: Literal["full", "lora"]
    family: Literal["bloom", "llama", "chatglm"]
    model: str
    names: dict[Literal["headline", "multi_gpu"], Names] = Field(min_length=1)
    num_gpus: PositiveInt
    bsz: PositiveInt
    setup: Setup
    data: str
    precision: str
    hardware: str
    effective_tokens_per_second: PositiveFloat | None

    @model_validator(mode="after")
    def _figure_or_reason(self) -> Self:
        if (self.effective_tokens_per_second is None) != (self.reason is not None):
            raise ValueError("a run has either effective_tokens_per_second or a reason why not")
        return self

    @property
    def work(self) -> tuple[Any, ...]:
        """The key of a row in a headline table."""
        return self.model, self.method, self.num_gpus, self.bsz

    @property
    def like(self) -> tuple[Any, ...]:
        """A key that is equal for runs which are like for like."""
        return *self.work, *_split(self.setup)

    @property
    def result(self) -> str:
        """The text of its rate in tables."""
        return figure(self.effective_tokens_per_second, self.reason)

    def named(self, kind: Literal["headline", "multi_gpu"]) -> Names:
        """Its names in tables of a kind. Where no such table shows the run, those of the other kind."""
        return self.names.get(kind) or next(iter(self.names.values()))


@dataclass(frozen=True)
class Pair:
    """A row of a published table: each side's run, None where there was none."""

    paddle: PublishedRecord | None
    torch: PublishedRecord | None

    @property
    def either(self) -> PublishedRecord:
        """One of the runs, for what both have in common."""
        run = self.paddle or self.torch
        assert run is not None
        return run

    def model(self, kind: Literal["headline", "multi_gpu"]) -> str:
        """The model's name in tables of a kind. A run that no such table shows has the other kind's."""
        runs = [run for run in (self.paddle, self.torch) if run]
        return next((run for run in runs if kind in run.names), runs[0]).named(kind).model

    @property
    def speedup(self) -> float | None:
        """Paddle ÷ Torch − 1; None unless both have a rate."""
        rates = [run and run.effective_tokens_per_second for run in (self.paddle, self.torch)]
        return rates[0] / rates[1] - 1 if rates[0] and rates[1] else None


@dataclass(frozen=True)
class Table:
    """A published table. Headline tables compare each side's best setup. Multi-GPU tables compare like for like."""

    name: str
    heading: str
    kind: Literal["headline", "multi_gpu"]
    pairs: list[Pair]

    def is_best(self, pair: Pair) -> bool:
        """Whether a pair's Paddle run is the fastest of its model and batch size. These were printed bold."""
        rate = pair.paddle and pair.paddle.effective_tokens_per_second
        group = [other.paddle for other in self.pairs if other.either.work == pair.either.work]
        rates = [run.effective_tokens_per_second for run in group if run and run.effective_tokens_per_second]
        return self.kind == "multi_gpu" and rate is not None and rate == max(rates)

    def setup(self, side: PublishedRecord | None) -> str | None:
        """A side's setup in the table's words. Headline tables leave out the accumulation."""
        if side is None:
            return None
        steps, words = side.setup.accumulation, side.named(self.kind).setup
        return f"({side.bsz // steps}*{steps}) {words}" if steps > 1 and self.kind == "multi_gpu" else words


class Printed(NamedTuple):
    """A row of a published table, with its table."""

    table: Table
    pair: Pair

    @property
    def run(self) -> PublishedRecord:
        """One of the pair's runs, for what both have in common."""
        return self.pair.either


@dataclass(frozen=True)
class Against:
    """A published run beside an own run of the same model, method, GPUs, batch size, setup and framework.

    Rates are in effective tokens/s of the whole job. `ratio` is here ÷ published. Both are None where a rate is
    missing. Speedups (Paddle ÷ Torch − 1) are like for like. `here_interval` is the 95% interval.
    """

    model: str
    method: str
    num_gpus: int
    batch_size: int
    setup: str
    framework: str
    published_status: str
    published_effective_tokens_per_second: float | None
    here_setup: str | None
    here_status: str | None
    here_effective_tokens_per_second: float | None
    ratio: float | None
    published_speedup: float | None
    here_speedup: float | None
    here_interval: tuple[float, float] | None
    here_noise: float | None = None
    here_refusal: str | None = None


HEADLINE_COLUMNS = [
    Column("Model", lambda row: row.pair.model(row.table.kind)),
    Column("Method", lambda row: METHODS[row.run.method]),
    Column("Num GPUs", lambda row: str(row.run.num_gpus)),
    Column("Batch Size", lambda row: str(row.run.bsz)),
    Column("Paddle Setup", lambda row: row.table.setup(row.pair.paddle) or ""),
    Column("Paddle Effective Tokens/s", lambda row: _result(row.pair.paddle)),
    Column("Torch Setup", lambda row: row.table.setup(row.pair.torch) or ""),
    Column("Torch Effective Tokens/s", lambda row: _result(row.pair.torch)),
    Column("Speedup", lambda row: _percent(row.pair.speedup)),
]
MULTI_GPU_COLUMNS = [
    HEADLINE_COLUMNS[0],
    Column("Setup", lambda row: f"bsz {row.run.bsz} {row.table.setup(row.run)}"),
    Column("Paddle Effective Tokens/s", lambda row: _bold(_result(row.pair.paddle), row.table.is_best(row.pair))),
    Column("Torch Effective Tokens/s", lambda row: _result(row.pair.torch)),
    Column("Speedup", lambda row: _percent(row.pair.speedup, sign="-")),
]
AGAINST_COLUMNS = [
    Column("Model", lambda row: row.model),
    Column("Method", lambda row: METHODS[row.method]),
    Column("Num GPUs", lambda row: str(row.num_gpus)),
    Column("Batch Size", lambda row: str(row.batch_size)),
    Column("Setup", lambda row: row.setup),
    Column("Framework", lambda row: row.framework),
    Column(
        "Published Effective Tokens/s",
        lambda row: figure(row.published_effective_tokens_per_second, row.published_status),
    ),
    Column("Here Setup", lambda row: row.here_setup or NOT_AVAILABLE),
    Column("Here Effective Tokens/s", lambda row: figure(row.here_effective_tokens_per_second, row.here_status)),
    Column("Here ÷ Published", lambda row: NOT_AVAILABLE if row.ratio is None else f"{row.ratio:.2f}"),
    Column("Published Speedup", lambda row: _percent(row.published_speedup)),
    Column("Here Speedup", lambda row: _here_speedup(row)),
]


def load(paths: list[Path]) -> tuple[list[Record], list[PublishedRecord], list[str]]:
    """The own records and the published records of files and folders, and a line for each broken file.

    It searches folders as `load_records` does, so that it leaves out `published` folders unless they are named.
    """
    published: dict[tuple[Any, str], PublishedRecord] = {}
    broken: list[str] = []

    def is_published(file: Path, content: bytes) -> bool:
        try:
            run = _parse(file, content)
        except BadInput as fault:
            broken.append(str(fault))
            return True
        if run is not None and published.setdefault((run.like, run.framework), run) != run:
            broken.append(f"{file}: not a record: another one of the same published run has other values")
        return run is not None

    files = list(itertools.chain.from_iterable(record_files(path) for path in paths))
    records, others = load_files(files, is_published)
    return records, list(published.values()), broken + others


def tables(published: Iterable[PublishedRecord]) -> list[Table]:
    """The tables in the order of their publication. Rows are sorted by method, model, batch size and setup."""
    found = []
    for later, members in _grouped(published, lambda run: run.source.added_later):
        for family, runs in _grouped(members, lambda run: list(FAMILIES).index(run.family)):
            name, models = list(FAMILIES)[family], sorted({run.model for run in runs})
            heading = f"A later revision's {FAMILIES[name]} rows ({', '.join(models)})" if later else FAMILIES[name]
            beside = [same for _, same in _grouped(runs, lambda run: (run.method != "lora", _place(run)))]
            found.append(Table(name, heading, "headline", [_pair(same, fastest=True) for same in beside]))
        split = [run for run in members if run.num_gpus > 1]
        for (_, gpus), runs in _grouped(split, lambda run: (run.method != "lora", run.num_gpus)):
            rows = [
                _pair(same)
                for _, of_model in _grouped(runs, lambda run: rank_of(run.model))
                if _tried_several(of_model)
                for _, same in _grouped(of_model, lambda run: (_place(run), _order(run.setup)))
            ]
            if rows:
                heading = f"Multi-GPU record: {WORK[runs[0].method]} with {gpus} GPUs"
                found.append(Table("multi-gpu", heading, "multi_gpu", rows))
    return found


def against(records: list[Record], published: Iterable[PublishedRecord]) -> list[Against]:
    """Each published run beside each own run like it. A run without any has a row of its own."""
    here = _sides(records)
    found = []
    for _, runs in _grouped(published, lambda run: (_place(run), run.method != "lora", _order(run.setup))):
        pair = _pair(runs)
        for run in (pair.paddle, pair.torch):
            if run is None:
                continue
            rows: list[Row | None] = [*here.get((run.like, run.framework), [])]
            for row in rows or [None]:
                rate = getattr(row, f"{run.framework}_effective_tokens_per_second", None)
                paired = row if row is not None and row.compared == LIKE_FOR_LIKE else None
                theirs = run.effective_tokens_per_second
                model, method, gpus, bsz = run.work
                found.append(
                    Against(
                        model=model,
                        method=method,
                        num_gpus=gpus,
                        batch_size=bsz,
                        setup=_words(run),
                        framework=run.framework,
                        published_status=run.reason or run.status,
                        published_effective_tokens_per_second=theirs,
                        here_setup=getattr(row, f"{run.framework}_setup", None),
                        here_status=getattr(row, f"{run.framework}_status", None),
                        here_effective_tokens_per_second=rate,
                        ratio=rate / theirs if rate and theirs else None,
                        published_speedup=pair.speedup,
                        here_speedup=paired.speedup if paired else None,
                        here_interval=paired.interval if paired else None,
                        here_noise=paired.noise if paired else None,
                        here_refusal=paired.refusal if paired else None,
                    )
                )
    return found


def render_published(published: list[PublishedRecord], form: str) -> str:
    """The published tables as `md`, or their rows as `csv` or `json`, with the same columns for all tables."""
    printed = [(table, [Printed(table, pair) for pair in table.pairs]) for table in tables(published)]
    every = [row for _, rows in printed for row in rows]
    if form == "json":
        return json.dumps([_fields(row.table, row.pair) for row in every], indent=1)
    if form == "csv":
        return as_csv([Column("Table", lambda row: row.table.name), *HEADLINE_COLUMNS], every)
    parts = []
    for table, rows in printed:
        columns = HEADLINE_COLUMNS if table.kind == "headline" else MULTI_GPU_COLUMNS
        parts.append(f"### {table.heading}\n\n{as_markdown(columns, rows)}")
    sources = {f"{run.source.document} at {run.source.commit[:10]}" for run in published}
    parts.append(
        f"Published, not measured here ({'; '.join(sorted(sources))}), on {_hardware(published)}; speedups computed "
        "from the figures, bold the best Paddle figure of its model and batch size. Not to be compared as they stand: "
        f"the first tables set unequal setups side by side, precision differs ({_precision(published)}), warm-up and "
        "start-up are inside the timing, each figure is of one run; see results/published/README.md."
    )
    return "\n\n".join(parts)


def render_against(records: list[Record], published: list[PublishedRecord], form: str) -> str:
    """The comparison with the published record: a `md` table with its caveat, or its rows as `csv` or `json`."""
    rows = against(records, published)
    if form == "json":
        return json.dumps([{"table": "against published", **asdict(row)} for row in rows], indent=1)
    if form == "csv":
        return as_csv(AGAINST_COLUMNS, rows)
    heading = "### Against the published record\n\n"
    if not any(row.here_status for row in rows):
        return (
            f"{heading}No record here has a published counterpart: one of the same model, method, number of GPUs, "
            "batch size and setup (try suites/a100x4.toml on four GPUs)."
        )
    return (
        f"{heading}{_ran_on(records, published)} Published on {_hardware(published)} ({_precision(published)}).\n\n"
        f"{as_markdown(AGAINST_COLUMNS, rows)}\n\n"
        "Here ÷ Published compares machines and years of software as much as frameworks, and not the same work: "
        "precision differs (see Here Setup), the published timing has warm-up and start-up inside, and its padding and "
        "LoRA layers are others. Speedups are like for like on both sides. N/A: no such run. The suite a100x4 runs "
        "chatglm2-6b in place of chatglm-6b, which so has no counterpart."
    )


def combine(parts: list[str], form: str) -> str:
    """Joins several renderings of one form: JSON lists become one list, tables follow each other."""
    if form == "json":
        return json.dumps([row for part in parts for row in json.loads(part)], indent=1)
    return "\n\n".join(parts)


def _parse(file: Path, text: bytes) -> PublishedRecord | None:
    """A published run's record; None for any other file. Raises `BadInput` with the first fault."""
    try:
        content = json.loads(text) if b"published" in text else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or not str(content.get("schema")).startswith("published"):
        return None
    try:
        return PublishedRecord.model_validate_json(text)
    except ValidationError as error:
        raise BadInput(f"{file}: not a record: {' '.join(first_fault(error).split())}") from None


def _grouped(runs: Iterable[PublishedRecord], key: Callable[[PublishedRecord], Any]) -> list[tuple[Any, list[Any]]]:
    return [(value, list(members)) for value, members in itertools.groupby(sorted(runs, key=key), key=key)]


def _place(run: PublishedRecord) -> tuple[Any, ...]:
    return rank_of(run.model), run.num_gpus, run.bsz


def _split(setup: Any) -> tuple[Any, ...]:
    """A key that is equal for setups which are like for like, of published and of own runs."""
    return setup.zero, setup.mp, setup.recompute, setup.accumulation


def _order(setup: Setup) -> tuple[Any, ...]:
    """A sort key for setups: tensor parallelism first, then the most sharded."""
    return -setup.mp, -setup.zero, setup.recompute, setup.accumulation


def _pair(runs: list[PublishedRecord], fastest: bool = False) -> Pair:
    """The first run of each side; with `fastest`, the fastest one."""
    ranked = sorted(runs, key=lambda run: -(run.effective_tokens_per_second or 0.0)) if fastest else runs
    paddle, torch = (next((r for r in ranked if r.framework == side), None) for side in ("paddle", "torch"))
    return Pair(paddle, torch)


def _tried_several(runs: list[PublishedRecord]) -> bool:
    """Whether a side ran the same work in more than one setup."""
    setups = defaultdict(set)
    for run in runs:
        setups[run.work, run.framework].add(_split(run.setup))
    return any(len(found) > 1 for found in setups.values())


def _sides(records: list[Record]) -> dict[tuple[Any, ...], list[Row]]:
    """The own rows by (`like`, framework). Each side's rate is there once, from a like-for-like row if there is one."""
    likes = {(*_like(record)[:4], heading_of(record)): _like(record) for record in records}
    rows = sorted(join(records), key=lambda row: row.compared == BEST_OF_EACH)
    found, seen = defaultdict(list), set()
    for row, side in itertools.product(rows, ("paddle", "torch")):
        text, rate = getattr(row, f"{side}_setup"), getattr(row, f"{side}_effective_tokens_per_second")
        work = row.model, row.method, row.num_gpus, row.batch_size
        if text is not None and (side, *work, text, rate) not in seen:
            seen.add((side, *work, text, rate))
            found[likes[*work, text], side].append(row)
    return found


def _like(record: Record) -> tuple[Any, ...]:
    """The key `PublishedRecord.like` of an own record."""
    return model_of(record)[1], record.method, record.devices, record.setup.bsz, *_split(record.setup)


def _words(run: PublishedRecord) -> str:
    setup = run.setup
    parts = [f"MP {setup.mp}"] * (setup.mp > 1) + [f"ZeRO {setup.zero}"] * (setup.zero > 0)
    parts += [f"{run.bsz // setup.accumulation}*{setup.accumulation}"] * (setup.accumulation > 1)
    return ", ".join(parts + ["recompute"] * setup.recompute)


def _result(run: PublishedRecord | None) -> str:
    return run.result if run else NOT_AVAILABLE


def _bold(text: str, bold: bool) -> str:
    return f"**{text}**" if bold else text


def _percent(speedup: float | None, sign: str = "+") -> str:
    return NOT_AVAILABLE if speedup is None else f"{speedup:{sign}.0%}"


def _fields(table: Table, pair: Pair) -> dict[str, Any]:
    """A row with the field names of `Row`."""
    run = pair.either
    fields: dict[str, Any] = {
        "table": f"published {table.name}",
        "family": run.family,
        "model": run.model,
        "method": run.method,
        "num_gpus": run.num_gpus,
        "batch_size": run.bsz,
    }
    for side, member in (("paddle", pair.paddle), ("torch", pair.torch)):
        fields[f"{side}_setup"] = table.setup(member)
        fields[f"{side}_status"] = member and (member.reason or member.status)
        fields[f"{side}_effective_tokens_per_second"] = member and member.effective_tokens_per_second
    compared = BEST_OF_EACH if table.kind == "headline" else LIKE_FOR_LIKE
    return fields | {"speedup": pair.speedup, "compared": compared, "best": table.is_best(pair)}


def _here_speedup(row: Against) -> str:
    if row.here_speedup is None:
        return row.here_refusal or NOT_AVAILABLE
    return verdict(row.here_speedup, row.here_interval, row.here_noise)


def _hardware(published: list[PublishedRecord]) -> str:
    return " or ".join(sorted({run.hardware for run in published}))


def _precision(published: list[PublishedRecord]) -> str:
    """The precision of each side."""
    words = sorted({(run.framework, run.precision) for run in published})
    return "; ".join(f"{framework}: {precision}" for framework, precision in words)


def _ran_on(records: list[Record], published: list[PublishedRecord]) -> str:
    """The machines and data of the own records that have a published counterpart."""
    likes = {run.like for run in published}
    compared = [record for record in records if record.aa is None and _like(record) in likes]
    machines = set()
    for record in compared:
        device, cpu = record.hardware.device, f"{record.hardware.cpu} with {record.hardware.cores} cores"
        if device is not None:  # None where the run ended before it knew
            machines.add(f"no GPU, {cpu}" if device == "cpu" else f"one {device} per process, {cpu}")
    data = {record.plan.data for record in compared if record.plan}
    return (
        f"Here on {'; '.join(sorted(machines)) or 'what no record tells'}; data: {', '.join(sorted(data)) or 'none'}."
    )
