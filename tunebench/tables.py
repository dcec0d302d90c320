"""Shows joined records: tables as Markdown, CSV or JSON, what they were measured on, and what a difference is worth."""

import csv
import io
import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tunebench.join import (
    BEST_OF_EACH,
    METHODS,
    Itself,
    Row,
    against_itself,
    join,
    load_records,
    model_of,
    noise_by_machine,
    rank_of,
)
from tunebench.record import Record
from tunebench.stats import SAME, is_across_zero, is_within

FAMILIES = {"llama": "Llama", "qwen2": "Qwen2", "glm": "ChatGLM2", "bloom": "Bloom"}
TUNED = ", tuned: each side with the fast flags (`--tuned`)"
NOT_AVAILABLE = "N/A"
VERSIONS_SHOWN = ("torch", "transformers", "peft", "deepspeed", "paddlepaddle", "paddlepaddle-gpu", "paddlenlp")
COLUMNS = (
    "Model",
    "Method",
    "Num GPUs",
    "Batch Size",
    "Paddle Setup",
    "Paddle Effective Tokens/s",
    "Paddle Spread",
    "Torch Setup",
    "Torch Effective Tokens/s",
    "Torch Spread",
    "Speedup",
    "95% Interval",
    "Round Noise",
    "Rounds",
    "Compared",
)
PARITY = "Parity (first loss, loss, norm)"
SETUP_COLUMNS = ("Model", "Setup", "Paddle Effective Tokens/s", "Torch Effective Tokens/s", "Speedup")
ITSELF_COLUMNS = (
    "Model",
    "Method",
    "Num GPUs",
    "Batch Size",
    "Side",
    "Difference",
    "95% Interval",
    "Rounds",
    "Verdict",
)


def render(rows: list[Row], form: str, records: list[Record], parity: bool = False) -> str:
    """The rows as `md` (a table per model family, what it was measured on above it), `csv` or `json`.

    `parity` adds a column to the first two: the largest relative differences of the pair's first losses, losses and
    gradient norms.
    """
    if form == "json":
        return json.dumps([asdict(row) for row in rows], indent=1)
    columns = (*COLUMNS, PARITY) if parity else COLUMNS
    lines = [_texts(row) + [_parity(row)] * parity for row in rows]
    if form == "csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("Family", *columns, "Note"))
        writer.writerows((row.family, *line, row.note or "") for row, line in zip(rows, lines, strict=True))
        return text.getvalue().rstrip("\n")
    parts = []
    kinds = sorted(zip(rows, lines, strict=True), key=lambda pair: pair[0].tuned)  # a table of the tuned ones, last
    for (tuned, family), group in itertools.groupby(kinds, key=lambda pair: (pair[0].tuned, pair[0].family)):
        members, texts = zip(*group, strict=True)
        parts.append(f"### {FAMILIES.get(family, family)}{TUNED * tuned}\n")
        parts.append(measured_on([r for r in records if model_of(r)[0] == family and r.aa is None]) + "\n")
        parts.append(markdown(columns, texts) + "\n")
        parts.extend(_notes(members))
    parts.extend(_setup_tables(rows))
    parts.extend(_noise(records))
    parts.append(_caption(rows))
    return "\n".join(parts)


def _caption(rows: list[Row]) -> str:
    """What the figures above it mean, and how often they miss."""
    known = sum(row.interval is not None for row in rows)
    lines = ["Speedup = Paddle ÷ Torch - 1. Effective tokens/s leave padding out; warm-up and start-up are not timed."]
    if known:
        lines.append(
            "The interval is Student's t of the rounds' log ratios: 95% per row, this series, this machine, these "
            f"batches; of {known} row(s) about {known / 20:.2g} would miss."
        )
        lines.append(
            f"within ±{SAME:.0%}: the whole interval lies there. not told apart: the interval has 0 in it. Spread: the "
            "standard deviation of a side's runs, mostly the machine's drift. Round noise: that of the rounds' ratios."
        )
    if any(row.rounds == 1 for row in rows):
        lines.append("One round is a look: repeat it before you trust a difference (`run_all.sh --repeats 4`).")
    return " ".join(lines)


def _noise(records: list[Record]) -> list[str]:
    """What a difference is worth, by machine: the comparisons of a side with itself and their pooled noise."""
    comparisons = against_itself(records)
    if not comparisons:
        return ["Noise: not measured; `bash run_all.sh --aa` runs each side against itself.\n"]
    parts = [
        "### Each side against itself (A/A)\n",
        measured_on([record for record in records if record.aa is not None]) + "\n",
        markdown(ITSELF_COLUMNS, list(map(_itself_texts, comparisons))) + "\n",
    ]
    for noise in noise_by_machine(comparisons).values():
        worth = ", ".join(f"±{noise.worth(n):.1%} of {n}" for n in (1, 3, 5))
        parts.append(
            f"Noise: the rounds of a side against itself scatter by {noise.deviation:.1%} (pooled, {noise.freedom} "
            f"degrees of freedom). A difference of rounds is worth that much, at 95%: {worth}.\n"
        )
    sure = [each for each in comparisons if each.interval and not each.disturbed]
    if sure:
        claims = sum(not is_across_zero(each.interval) for each in sure)
        parts.append(
            f"{claims} of {len(sure)} comparisons claimed a difference where there is none; chance makes "
            f"{len(sure) / 20:.2g} of them.\n"
        )
    else:
        parts.append("No comparison has two rounds that nothing disturbed: repeat with --repeats 4.\n")
    return parts


def _itself_texts(comparison: Itself) -> list[str]:
    return [
        comparison.model,
        METHODS[comparison.method],
        str(comparison.num_gpus),
        str(comparison.batch_size),
        f"{comparison.framework}, {comparison.setup}",
        f"{comparison.difference:+.1%}",
        _interval(comparison.interval),
        str(len(comparison.log_ratios)),
        f"disturbed: {comparison.disturbed}"
        if comparison.disturbed
        else verdict(comparison.difference, comparison.interval),
    ]


def _setup_tables(rows: list[Row]) -> list[str]:
    """For several processes: each setup like for like, the fastest figure of each model and batch size in bold."""
    split = [row for row in rows if row.num_gpus > 1 and row.compared != BEST_OF_EACH]
    parts = []
    for (method, devices), members in _grouped(split, lambda row: (row.method, row.num_gpus)):
        lines = []
        for _, setups in _grouped(members, lambda row: (rank_of(row.model), row.batch_size)):
            best = max((rate for row in setups if not row.refusal for rate in _rates(row) if rate), default=None)
            for row in setups:
                setup = (row.paddle_setup or row.torch_setup or "").split(", ")
                setup.sort(key=lambda part: "*" not in part)  # how it is accumulated stands beside the batch size
                setup = " ".join(f"({part})" if "*" in part else part for part in setup)
                texts = [f"**{t}**" if r and r == best else t for t, r in zip(_figures(row), _rates(row), strict=True)]
                lines.append([row.model, f"bsz {row.batch_size} {setup}", *texts, _verdict(row)])
        parts.append(f"### {METHODS[method]} with {devices} GPUs (or processes, where there are none), by setup\n")
        parts.append(markdown(SETUP_COLUMNS, lines) + "\n")
        parts.append("Bold: the fastest of its model and batch size.\n")
        parts.extend(_notes(members))
    return parts


def _notes(rows: Sequence[Row]) -> list[str]:
    return [f"{row.model} {METHODS[row.method]} bsz {row.batch_size}: {row.note}\n" for row in rows if row.note]


def _grouped(rows: list[Row], key: Callable[[Row], Any]) -> Iterator[tuple[Any, list[Row]]]:
    for value, members in itertools.groupby(sorted(rows, key=key), key=key):
        yield value, list(members)


def print_tables(paths: list[Path]) -> None:
    """Prints the Markdown tables of the records under `paths`, and names the broken ones."""
    records, broken = load_records(paths)
    for fault in broken:
        print(f"skipped {fault}")
    if records:
        print(combined(records), flush=True)


def combined(records: list[Record], parity: bool = False) -> str:
    """All tables of these records as Markdown."""
    from tunebench.peers import render_peers

    ours = [record for record in records if record.peer is None]
    return "\n\n".join(filter(None, [render(join(ours), "md", ours, parity), render_peers(records)]))


def _texts(row: Row) -> list[str]:
    paddle, torch = _figures(row)
    return [
        row.model,
        METHODS[row.method],
        str(row.num_gpus),
        str(row.batch_size),
        row.paddle_setup or NOT_AVAILABLE,
        paddle,
        _spread(row.paddle_spread),
        row.torch_setup or NOT_AVAILABLE,
        torch,
        _spread(row.torch_spread),
        _verdict(row),
        _interval(row.interval) if row.speedup is not None else NOT_AVAILABLE,
        _spread(row.round_noise),
        str(row.rounds) if row.rounds else NOT_AVAILABLE,
        row.compared or NOT_AVAILABLE,
    ]


def _rates(row: Row) -> tuple[float | None, float | None]:
    return row.paddle_effective_tokens_per_second, row.torch_effective_tokens_per_second


def _figures(row: Row) -> tuple[str, str]:
    """Both sides' rates, or what became of them."""
    paddle, torch = _rates(row)
    return figure(paddle, row.paddle_status), figure(torch, row.torch_status)


def figure(rate: float | None, status: str | None) -> str:
    """A rate as tables print it, or what became of the run; N/A where there was none."""
    if rate is not None:
        return f"{rate:.2f}"
    return {"oom": "OOM", None: NOT_AVAILABLE}.get(status, str(status))


def _verdict(row: Row) -> str:
    if row.speedup is None:
        return row.refusal or NOT_AVAILABLE
    return verdict(row.speedup, row.interval, row.noise)


def verdict(difference: float, interval: tuple[float, float] | None, noise: float | None = None) -> str:
    """What a difference says: itself where its interval leaves 0 out, that it is small, or that the sides are not told
    apart. Of one round, the difference and what it is worth by the machine's A/A noise, where that is known."""
    if interval is None:
        worth = f" ± {noise:.{0 if noise >= 0.02 else 1}%} (one round, A/A noise)" if noise else " (one round)"
        return _percent(difference) + worth
    if not is_across_zero(interval):
        return _percent(difference)
    if is_within(interval):
        return f"within ±{SAME:.0%}"
    return f"not told apart ({interval[0] * 100:+.1f} to {interval[1]:+.1%})"


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


def markdown(columns: Sequence[str], lines: Iterable[list[str]]) -> str:
    """A Markdown table, its columns aligned."""
    table = [list(columns), *lines]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in table]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def measured_on(records: list[Record]) -> str:
    """The caveat above a table: machine, versions, steps and runs, read from its records."""
    done = [record for record in records if record.status == "ok"]
    if not done:
        return "No run ended ok."
    machines: dict[tuple[str | None, str, int], set[int]] = defaultdict(set)
    for r in done:
        machines[r.hardware.device, r.hardware.cpu, r.hardware.cores].add(r.hardware.threads)
    texts = []
    for (device, cpu, cores), threads in sorted(machines.items()):
        gpu = "no GPU" if device == "cpu" else f"one {device} per process"
        per_process = " or ".join(map(str, sorted(threads))) + f" thread{'s' * (max(threads) > 1)} per process"
        texts.append(f"{gpu}, {cpu} with {cores} cores, {per_process}")
    versions = {f"{name} {r.versions[name]}" for r in done for name in VERSIONS_SHOWN if name in r.versions}
    steps = {f"{len(r.steps.seconds) - r.timed_from} of {len(r.steps.seconds)}" for r in done if r.steps}
    caveat = (
        ""
        if all(machine[0] != "cpu" for machine in machines)
        else " It compares CPU kernels: it says nothing about GPUs."
    )
    revisions = {f"{(r.git.revision or 'no git')[:10]}{' changed' if r.git.dirty else ''}" for r in done}
    environment = [r.hardware.environment.get("MKL_DEBUG_CPU_TYPE") for r in done]
    kernels = "".join(f"; MKL_DEBUG_CPU_TYPE={value}" for value in sorted(set(filter(None, environment))))
    return (
        f"Measured on: {'; '.join(texts)}; {', '.join(sorted(versions))}; steps timed: {', '.join(sorted(steps))}"
        f"{kernels}; revision {', '.join(sorted(revisions))}.{caveat}"
    )
