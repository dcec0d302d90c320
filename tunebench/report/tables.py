"""Writes rows as Markdown, CSV or JSON, with what they were measured on and what a difference is worth."""

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from tunebench.models.families import FAMILIES
from tunebench.record import Record
from tunebench.report.identity import METHODS, model_of, rank_of
from tunebench.report.markdown import NOT_AVAILABLE, figure, markdown, measured_on
from tunebench.report.pairing import BEST_OF_EACH, Row, SelfComparison, against_itself, noise_by_machine
from tunebench.report.stats import MOST_FREEDOM, POWER, SAME, TOLD, is_across_zero, is_within

TUNED = ", tuned: each side with the fast flags (`--tuned`)"
SETUP_COLUMNS = ("Model", "Setup", "Paddle Effective Tokens/s", "Torch Effective Tokens/s", "Speedup")


class Column(NamedTuple):
    """A column of a table: its title, and the function that gives its text for a row."""

    title: str
    text: Callable[[Any], str]


COLUMNS = [
    Column("Model", lambda row: row.model),
    Column("Method", lambda row: METHODS[row.method]),
    Column("Num GPUs", lambda row: str(row.num_gpus)),
    Column("Batch Size", lambda row: str(row.batch_size)),
    Column("Paddle Setup", lambda row: row.paddle_setup or NOT_AVAILABLE),
    Column("Paddle Effective Tokens/s", lambda row: _figures(row)[0]),
    Column("Paddle Spread", lambda row: _spread(row.paddle_spread)),
    Column("Torch Setup", lambda row: row.torch_setup or NOT_AVAILABLE),
    Column("Torch Effective Tokens/s", lambda row: _figures(row)[1]),
    Column("Torch Spread", lambda row: _spread(row.torch_spread)),
    Column("Speedup", lambda row: verdict_on(row)),
    Column("95% Interval", lambda row: NOT_AVAILABLE if row.speedup is None else _interval(row.interval)),
    Column("Round Noise", lambda row: _spread(row.round_noise)),
    Column("Rounds", lambda row: str(row.rounds) if row.rounds else NOT_AVAILABLE),
    Column(f"Rounds for {TOLD:.0%}", lambda row: str(row.rounds_for_5 or NOT_AVAILABLE)),
    Column("Compared", lambda row: row.compared or NOT_AVAILABLE),
]
NOTE = Column("Note", lambda row: row.note or "")
PARITY = Column("Parity (first loss, loss, norm)", lambda row: _parity(row))
SELF_COLUMNS = [
    *COLUMNS[:4],
    Column("Side", lambda comparison: f"{comparison.framework}, {comparison.setup}"),
    Column("Difference", lambda comparison: f"{comparison.difference:+.1%}"),
    Column("95% Interval", lambda comparison: _interval(comparison.interval)),
    Column("Rounds", lambda comparison: str(len(comparison.log_ratios))),
    Column("Verdict", lambda comparison: _self_verdict(comparison)),
]


def as_csv(columns: Sequence[Column], rows: Iterable[Any]) -> str:
    """These rows as CSV, with a line of titles."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(column.title for column in columns)
    writer.writerows([column.text(row) for column in columns] for row in rows)
    return text.getvalue().rstrip("\n")


def table(columns: Sequence[Column], rows: Iterable[Any]) -> str:
    """A Markdown table of these rows."""
    return markdown([column.title for column in columns], [[column.text(row) for column in columns] for row in rows])


def render(rows: list[Row], form: str, records: list[Record], parity: bool = False) -> str:
    """The rows as `md`, `csv` or `json`. Markdown has a table for each model family, with its machine above it.

    `parity` adds a column to `md` and `csv`: the largest relative differences of first losses, losses and gradient
    norms.
    """
    if form == "json":
        return json.dumps([asdict(row) for row in rows], indent=1)
    columns = [*COLUMNS, PARITY] if parity else COLUMNS
    if form == "csv":
        return as_csv([Column("Family", lambda row: row.family), *columns, NOTE], rows)
    parts = []
    kinds = sorted(rows, key=lambda row: row.tuned)  # tuned rows have their own tables, which come last
    for (tuned, family), group in itertools.groupby(kinds, key=lambda row: (row.tuned, row.family)):
        members = list(group)
        parts.append(f"### {FAMILIES[family].title if family in FAMILIES else family}{TUNED * tuned}\n")
        parts.append(measured_on([r for r in records if model_of(r)[0] == family and r.aa is None]) + "\n")
        parts.append(table(columns, members) + "\n")
        parts.extend(notes(members))
    parts.extend(_setup_tables(rows))
    parts.extend(_noise(records))
    parts.append(caption(rows))
    return "\n".join(parts)


def caption(rows: list[Row]) -> str:
    """The caption of all tables: what the figures mean, and how often intervals miss."""
    known = sum(row.interval is not None for row in rows)
    lines = ["Speedup = Paddle ÷ Torch - 1. Effective tokens/s leave padding out; warm-up and start-up are not timed."]
    if known:
        lines.append(
            "The interval is Student's t of the rounds' log ratios: 95% per row, this series, this machine, these "
            f"batches; of {known} row(s) about {known / 20:.2g} would miss."
        )
        lines.append(
            f"within ±{SAME:.0%}: the whole interval lies there. not told apart: the interval has 0 in it. Spread: the "
            "standard deviation of a side's runs, mostly the machine's drift. Round noise: that of the rounds' ratios. "
            f"Rounds for {TOLD:.0%}: about so many would find a true difference of {TOLD:.0%} in {POWER:.0%} of cases."
        )
    if any(row.rounds == 1 for row in rows):
        lines.append("One round is a look: repeat it before you trust a difference (`run_all.sh --repeats 4`).")
    return " ".join(lines)


def _noise(records: list[Record]) -> list[str]:
    """The A/A comparisons, and each machine's pooled noise."""
    comparisons = against_itself(records)
    if not comparisons:
        return ["Noise: not measured; `bash run_all.sh --aa` runs each side against itself.\n"]
    parts = [
        "### Each side against itself (A/A)\n",
        measured_on([record for record in records if record.aa is not None]) + "\n",
        table(SELF_COLUMNS, comparisons) + "\n",
    ]
    return [*parts, *(f"{line}\n" for line in noise_in_words(comparisons))]


def noise_in_words(comparisons: list[SelfComparison]) -> list[str]:
    """The sentences below the A/A comparisons: each machine's noise, and how many comparisons claimed a difference."""
    lines = []
    for noise in noise_by_machine(comparisons).values():
        worth = ", ".join(f"±{noise.worth(n):.1%} of {n}" for n in (1, 3, 5))
        limited = f", of which {MOST_FREEDOM} count" * (noise.freedom > MOST_FREEDOM)
        lines.append(
            f"Noise: the rounds of a side against itself scatter by {noise.deviation:.1%} (pooled, {noise.freedom} "
            f"degrees of freedom{limited}). A difference of rounds is worth that much, at 95%: {worth}."
        )
    sure = [each.interval for each in comparisons if each.interval and not each.disturbed]
    if sure:
        claims = sum(not is_across_zero(interval) for interval in sure)
        lines.append(
            f"{claims} of {len(sure)} comparisons claimed a difference where there is none; chance makes "
            f"{len(sure) / 20:.2g} of them."
        )
    else:
        lines.append("No comparison has two rounds that nothing disturbed: repeat with --repeats 4.")
    return lines


def _setup_tables(rows: list[Row]) -> list[str]:
    """The tables of runs with several processes, by setup. The fastest rate of a model and batch size is bold."""
    split = [row for row in rows if row.num_gpus > 1 and row.compared != BEST_OF_EACH]
    parts = []
    for (method, devices), members in _grouped(split, lambda row: (row.method, row.num_gpus)):
        lines = []
        for _, setups in _grouped(members, lambda row: (rank_of(row.model), row.batch_size)):
            best = max((rate for row in setups if not row.refusal for rate in _rates(row) if rate), default=None)
            for row in setups:
                words = (row.paddle_setup or row.torch_setup or "").split(", ")
                words.sort(key=lambda part: "*" not in part)  # the accumulation stands beside the batch size
                setup = " ".join(f"({part})" if "*" in part else part for part in words)
                texts = [f"**{t}**" if r and r == best else t for t, r in zip(_figures(row), _rates(row), strict=True)]
                lines.append([row.model, f"bsz {row.batch_size} {setup}", *texts, verdict_on(row)])
        parts.append(f"### {METHODS[method]} with {devices} GPUs (or processes, where there are none), by setup\n")
        parts.append(markdown(SETUP_COLUMNS, lines) + "\n")
        parts.append("Bold: the fastest of its model and batch size.\n")
        parts.extend(notes(members))
    return parts


def notes(rows: Iterable[Any]) -> list[str]:
    """The notes of rows, as paragraphs for below their table."""
    return [f"{row.model} {METHODS[row.method]} bsz {row.batch_size}: {row.note}\n" for row in rows if row.note]


def _grouped(rows: list[Row], key: Callable[[Row], Any]) -> Iterator[tuple[Any, list[Row]]]:
    for value, members in itertools.groupby(sorted(rows, key=key), key=key):
        yield value, list(members)


def _rates(row: Row) -> tuple[float | None, float | None]:
    return row.paddle_effective_tokens_per_second, row.torch_effective_tokens_per_second


def _figures(row: Row) -> tuple[str, str]:
    """The texts of both sides' rates."""
    paddle, torch = _rates(row)
    return figure(paddle, row.paddle_status), figure(torch, row.torch_status)


def verdict_on(row: Row) -> str:
    """The text of a row's speedup, or why it has none."""
    if row.speedup is None:
        return row.refusal or NOT_AVAILABLE
    return verdict(row.speedup, row.interval, row.noise)


def verdict(difference: float, interval: tuple[float, float] | None, noise: float | None = None) -> str:
    """The verdict on a difference.

    The difference itself where its interval excludes 0. Otherwise `within ±3%` or `not told apart`. One round has no
    interval: the difference, with the machine's A/A noise where that is known.
    """
    if interval is None:
        worth = f" ± {noise:.{0 if noise >= 0.02 else 1}%} (one round, A/A noise)" if noise else " (one round)"
        return _percent(difference) + worth
    if not is_across_zero(interval):
        return _percent(difference)
    if is_within(interval):
        return f"within ±{SAME:.0%}"
    return f"not told apart ({interval[0] * 100:+.1f} to {interval[1]:+.1%})"


def _self_verdict(comparison: SelfComparison) -> str:
    if comparison.disturbed:
        return f"disturbed: {comparison.disturbed}"
    return verdict(comparison.difference, comparison.interval)


def _percent(share: float) -> str:
    return f"{share:+.0%}" if abs(share) >= 0.1 else f"{share:+.1%}"


def _interval(interval: tuple[float, float] | None) -> str:
    return f"{interval[0]:+.1%} to {interval[1]:+.1%}" if interval else "none: one round"


def _spread(spread: float | None) -> str:
    return NOT_AVAILABLE if spread is None else f"{spread:.1%}"


def _parity(row: Row) -> str:
    if row.parity is None or row.parity_first is None or row.parity_norm is None:
        return NOT_AVAILABLE
    return f"{row.parity_first:.0e}, {row.parity:.0e}, {row.parity_norm:.0e}"
