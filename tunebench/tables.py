"""Joins records into tables: which runs did the same work, how fast each side was, and what that makes of a speedup."""

import csv
import io
import itertools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from scipy import stats

from tunebench.cache import results_folder
from tunebench.errors import BadInput
from tunebench.presets import PRESETS
from tunebench.record import Record, read_record


class Tolerance(NamedTuple):
    """Largest relative differences of two curves, at any step, that still count as the same training."""

    first_loss: float  # of step 1, where only the start and the tokens count
    loss: float
    gradient: float  # of the gradient norms, which show faults that a loss hides


# Low precision: what its rounding alone may do. tests/test_precision.py allows torch as much against its own fp32.
TOLERANCES = {
    "fp32": Tolerance(1e-4, 1e-3, 1e-3),
    "bf16": Tolerance(1e-3, 1e-2, 5e-2),
    "fp16": Tolerance(5e-4, 5e-3, 2e-2),
}
METHODS = {"lora": "LoRA", "full": "Finetune"}
FAMILIES = {"llama": "Llama", "qwen2": "Qwen2", "glm": "ChatGLM2", "bloom": "Bloom"}
NOT_AVAILABLE = "N/A"
VERSIONS_SHOWN = ("torch", "transformers", "peft", "deepspeed", "paddlepaddle", "paddlepaddle-gpu", "paddlenlp")
VERSION_OF = {"torch": "torch", "paddle": "paddlenlp"}
COLUMNS = (
    "Model",
    "Method",
    "Num GPUs",
    "Batch Size",
    "Paddle Setup",
    "Paddle Effective Tokens/s",
    "Torch Setup",
    "Torch Effective Tokens/s",
    "Speedup",
    "95% Interval",
    "Compared",
)
SETUP_COLUMNS = ("Model", "Setup", "Paddle Effective Tokens/s", "Torch Effective Tokens/s", "Speedup")
LIKE_FOR_LIKE, BEST_OF_EACH = "like for like", "best of each"


@dataclass(frozen=True)
class Row:
    """One row of a table. Rates in effective tokens/s of the whole job; `speedup` is Paddle ÷ Torch − 1.

    `num_gpus` is the number of processes where there are no GPUs. A side that did not end ok has its status; a pair
    that cannot be compared has no speedup, `refusal` in its place and the fields that differ in `note`.
    `interval` is the 95% interval of the speedup, None with a single round or where one side has more runs.
    `compared` says whether both sides have the same setup or each its fastest one; None for a side alone.
    `parity` is the largest relative difference of the two loss curves at any step.
    """

    family: str
    model: str
    method: str
    num_gpus: int
    batch_size: int
    paddle_setup: str | None
    paddle_status: str | None
    paddle_effective_tokens_per_second: float | None
    paddle_runs: int
    torch_setup: str | None
    torch_status: str | None
    torch_effective_tokens_per_second: float | None
    torch_runs: int
    speedup: float | None
    interval: tuple[float, float] | None
    refusal: str | None
    compared: str | None
    parity: float | None
    note: str | None


@dataclass(frozen=True)
class Cell:
    """All runs of one side with one setup on one piece of work. `whole`: each of them ended ok."""

    records: list[Record]
    whole: bool = True

    @property
    def first(self) -> Record:
        """The run that stands for the others where they must agree."""
        return self.records[0]

    @property
    def rate(self) -> float | None:
        """The geometric mean of the runs, in effective tokens/s; None when they did not end ok."""
        if self.first.status != "ok":
            return None
        return statistics.geometric_mean(record.effective_tokens_per_second for record in self.records)


def load_records(paths: list[Path]) -> tuple[list[Record], list[str]]:
    """The records of files and folders (searched through, but for hidden and `published` ones), and what was broken."""
    records, broken = [], []
    for file in itertools.chain.from_iterable(_record_files(path) for path in paths):
        try:
            records.append(read_record(file))
        except BadInput as fault:
            broken.append(str(fault))
    return sorted(records, key=lambda record: record.started_at), broken


def join(records: list[Record]) -> list[Row]:
    """The rows: like for like first, then the best of each side, then what is left of either."""
    groups: dict[tuple[Any, ...], dict[str, list[Record]]] = {}
    for record in records:
        group = (*_model_of(record), record.method, record.devices, record.setup.bsz)
        groups.setdefault(group, {"paddle": [], "torch": []})[record.framework].append(record)
    rows = []
    for group in sorted(groups, key=lambda g: (g[0], _rank(g[1]), list(METHODS).index(g[2]), g[3:])):
        cells = {framework: _cells(members) for framework, members in groups[group].items()}
        pairs = _pairs(**cells)
        headings = [(compared == BEST_OF_EACH, _setup((paddle or torch).first)) for compared, paddle, torch in pairs]
        rows.extend(
            _row(group, *pair, told_apart=headings.count(heading) > 1)
            for pair, heading in zip(pairs, headings, strict=True)
        )
    return rows


def speedup_interval(paddle: list[Record], torch: list[Record]) -> tuple[float, float] | None:
    """The 95% interval of Paddle ÷ Torch − 1, by Student's t of the rounds' log ratios.

    The k-th run of one side and the k-th of the other, by when they started, are a round. None with fewer than two
    rounds, or where one side has more runs.
    """
    if len(paddle) != len(torch) or len(paddle) < 2:
        return None
    rates = [[record.effective_tokens_per_second for record in side] for side in (paddle, torch)]
    ratios = [math.log(ours / theirs) for ours, theirs in zip(*rates, strict=True)]
    interval = stats.ttest_1samp(ratios, 0.0).confidence_interval(0.95)
    return math.expm1(interval.low), math.expm1(interval.high)


def differences(paddle: Record, torch: Record) -> list[str]:
    """Why two runs did not do the same work: each differing field with both values; empty when they did."""
    ours, theirs = _work(paddle), _work(torch)
    return [
        f"{field}: {_short(ours[field])} ≠ {_short(theirs[field])}" for field in ours if ours[field] != theirs[field]
    ]


def parity(paddle: Record, torch: Record) -> float:
    """The largest relative difference of two loss curves at any step."""
    return max(_relative("loss", paddle, torch))


def disagreement(paddle: Record, torch: Record) -> str | None:
    """Why two curves are not those of one training; None when they are."""
    skipped = [[i for i, norm in enumerate(r.steps.grad_norm, 1) if norm is None] for r in (paddle, torch)]
    if skipped[0] != skipped[1]:
        return f"the steps that were skipped differ: {skipped[0] or 'none'} ≠ {skipped[1] or 'none'}"
    loss, gradients = _relative("loss", paddle, torch), _relative("grad_norm", paddle, torch)
    tolerance = TOLERANCES[paddle.setup.dtype]
    for what, difference, limit in (
        ("the losses of step 1", loss[0], tolerance.first_loss),
        ("the losses", max(loss), tolerance.loss),
        ("the gradient norms", max(gradients, default=0.0), tolerance.gradient),
    ):
        if not difference <= limit:
            return f"{what} differ by {difference:.1e}, more than {limit:g}"
    return None


def _relative(curve: str, paddle: Record, torch: Record) -> list[float]:
    pairs = zip(getattr(paddle.steps, curve), getattr(torch.steps, curve), strict=True)
    return [abs(a - b) / max(abs(b), 1e-12) for a, b in pairs if None not in (a, b)]


def render(rows: list[Row], form: str, records: list[Record]) -> str:
    """The rows as `md` (a table per model family, what it was measured on above it), `csv` or `json`."""
    if form == "json":
        return json.dumps([asdict(row) for row in rows], indent=1)
    if form == "csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("Family", *COLUMNS, "Note"))
        writer.writerows((row.family, *_texts(row), row.note or "") for row in rows)
        return text.getvalue().rstrip("\n")
    parts = []
    for family, members in itertools.groupby(rows, key=lambda row: row.family):
        parts.append(f"### {FAMILIES.get(family, family)}\n")
        parts.append(_measured_on([r for r in records if _model_of(r)[0] == family]) + "\n")
        members = list(members)
        parts.append(_markdown(COLUMNS, list(map(_texts, members))) + "\n")
        parts.extend(_notes(members))
    parts.extend(_setup_tables(rows))
    parts.append(
        "Speedup = Paddle ÷ Torch − 1. Effective tokens/s leave padding out; warm-up and start-up are not timed. "
        "The interval is Student's t of the rounds' log ratios; one round has none: repeat with "
        "`run_all.sh --repeats N` before you trust a small difference."
    )
    return "\n".join(parts)


def _setup_tables(rows: list[Row]) -> list[str]:
    """For several processes: each setup like for like, the fastest figure of each model and batch size in bold."""
    split = [row for row in rows if row.num_gpus > 1 and row.compared != BEST_OF_EACH]
    parts = []
    for (method, devices), members in _grouped(split, lambda row: (row.method, row.num_gpus)):
        lines = []
        for _, setups in _grouped(members, lambda row: (_rank(row.model), row.batch_size)):
            best = max((rate for row in setups if not row.refusal for rate in _rates(row) if rate), default=None)
            for row in setups:
                setup = (row.paddle_setup or row.torch_setup or "").split(", ")
                setup.sort(key=lambda part: "*" not in part)  # how it is accumulated stands beside the batch size
                setup = " ".join(f"({part})" if "*" in part else part for part in setup)
                texts = [f"**{t}**" if r and r == best else t for t, r in zip(_figures(row), _rates(row), strict=True)]
                lines.append([row.model, f"bsz {row.batch_size} {setup}", *texts, _verdict(row)])
        parts.append(f"### {METHODS[method]} with {devices} GPUs (or processes, where there are none), by setup\n")
        parts.append(_markdown(SETUP_COLUMNS, lines) + "\n")
        parts.append("Bold: the fastest of its model and batch size.\n")
        parts.extend(_notes(members))
    return parts


def _notes(rows: list[Row]) -> list[str]:
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
        print(render(join(records), "md", records), flush=True)


def _record_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        if path == results_folder():
            return []
        raise BadInput(f"{path}: no such file or folder; name record files or folders of them")
    return sorted(file for file in path.rglob("*.json") if not _is_kept_apart(file.relative_to(path)))


def _is_kept_apart(file: Path) -> bool:
    return any(part.startswith(".") or part == "published" for part in file.parts)


def _model_of(record: Record) -> tuple[str, str]:
    """Family and name; of a run whose checkpoint was never read, by its flags."""
    if record.model is not None:
        return record.model.family, record.model.name
    arguments = itertools.chain.from_iterable(argument.split("=", 1) for argument in record.argv)
    name = next((value for flag, value in itertools.pairwise(arguments) if flag == "--model"), "unknown")
    return (PRESETS[name].config["model_type"] if name in PRESETS else "other"), Path(name).name


def _rank(model: str) -> tuple[int, str]:
    """Where a model stands in tables: presets in their order, then others by name."""
    presets = list(PRESETS)
    return presets.index(model) if model in presets else len(presets), model


def _cells(records: list[Record]) -> list[Cell]:
    """One side's runs by setup and work. Runs that did not end ok count only where none of their setup did."""
    by_key: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.status == "ok":
            # Runs of other versions are no repeats of each other, though each may have its pair.
            key = [record.setup.model_dump(), record.versions, _work(record)]
            by_key[json.dumps(key, sort_keys=True, default=str)].append(record)
    done = {_attempt(runs[0]) for runs in by_key.values()}
    bad = [record for record in records if record.status != "ok"]
    ended: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in bad:
        if _attempt(record) not in done:
            ended[(*_attempt(record), record.status)].append(record)
    failed = set(map(_attempt, bad))
    return [Cell(runs, _attempt(runs[0]) not in failed) for runs in (*by_key.values(), *ended.values())]


def _attempt(record: Record) -> tuple[str, str | None]:
    return _setup(record), record.git.revision


def _pairs(paddle: list[Cell], torch: list[Cell]) -> list[tuple[str | None, Cell | None, Cell | None]]:
    """Which cells make a row, and what kind: like for like, the best of each on the same work, then the rest.

    Of the rest, a cell is shown alone, or beside the other side's of the same setup or one that differs in precision.
    """
    ours, theirs = (sorted(cells, key=lambda cell: -(cell.rate or 0.0)) for cells in (paddle, torch))
    pairs: list[tuple[str | None, Cell | None, Cell | None]] = []
    ok = [(a, b) for a in ours for b in theirs if a.rate and b.rate and not differences(a.first, b.first)]
    same = [(a, b) for a, b in ok if not disagreement(a.first, b.first)]
    like: list[tuple[Cell, Cell]] = []
    for a, b in ok:
        if _setup(a.first) == _setup(b.first) and not any(a is c or b is d for c, d in like):
            like.append((a, b))
    pairs += [(LIKE_FOR_LIKE, a, b) for a, b in sorted(like, key=lambda pair: _order(pair[0].first))]
    best: list[tuple[Cell, Cell]] = []
    for a, b in same:  # fastest first, so the first one of each work is it
        if all(differences(a.first, other.first) for _, other in best):
            best.append((a, b))
    pairs += [(BEST_OF_EACH, a, b) for a, b in best if _setup(a.first) != _setup(b.first)]
    shown = [id(cell) for _, *pair in pairs for cell in pair]
    ours, theirs = ([cell for cell in cells if id(cell) not in shown] for cells in (ours, theirs))
    for a in ours:
        b = next((b for how in (_setup, _split) for b in theirs if how(a.first) == how(b.first)), None)
        theirs = [cell for cell in theirs if cell is not b]
        pairs.append((LIKE_FOR_LIKE if b and _setup(a.first) == _setup(b.first) else None, a, b))
    return pairs + [(None, None, b) for b in theirs]


def _order(record: Record) -> tuple[int, ...]:
    """Tensor parallelism first, then the most sharded, as the published record has it."""
    return -record.setup.mp, -record.setup.zero, record.setup.accumulation


def _row(
    group: tuple[Any, ...], compared: str | None, paddle: Cell | None, torch: Cell | None, told_apart: bool
) -> Row:
    family, model, method, devices, bsz = group
    speedup = interval = refusal = agreement = note = None
    if paddle and torch and paddle.rate and torch.rate:
        different = differences(paddle.first, torch.first)
        if different:
            refusal, note = "not the same work", f"not the same work: {'; '.join(different)}"
        else:
            runs = list(itertools.product(paddle.records, torch.records))
            agreement = max(itertools.starmap(parity, runs))
            note = next(filter(None, itertools.starmap(disagreement, runs)), None)
            if note:
                refusal = "losses differ"
            else:
                speedup = paddle.rate / torch.rate - 1
                if paddle.whole and torch.whole:  # or it is not known which runs make a round
                    interval = speedup_interval(paddle.records, torch.records)
    skipped = [
        f"{c.first.framework} skipped {sum(r.skipped_steps for r in c.records)} steps (float16 overflowed)"
        for c in (paddle, torch)
        if c and any(r.skipped_steps for r in c.records)
    ]
    kernels = [
        f"{c.first.framework} ran {' and '.join(c.first.kernels.attention)}"
        for c in (paddle, torch)
        if c and c.rate and c.first.kernels and c.first.setup.attention != "eager"
    ]
    what = [_on_what(c.first) for c in (paddle, torch) if c and c.rate and told_apart][:1]
    reasons = [f"{c.first.framework} {c.first.status}: {c.first.reason}" for c in (paddle, torch) if c and not c.rate]
    return Row(
        family=family,
        model=model,
        method=method,
        num_gpus=devices,
        batch_size=bsz,
        **_side("paddle", paddle),
        **_side("torch", torch),
        speedup=speedup,
        interval=interval,
        refusal=refusal,
        compared=compared,
        parity=agreement,
        note="; ".join(filter(None, [note, *reasons, *skipped, *kernels, *what])) or None,
    )


def _on_what(record: Record) -> str:
    """What tells rows with the same headings apart."""
    assert record.plan is not None
    assert record.steps is not None
    plan, timed = record.plan, len(record.steps.seconds) - record.timed_from
    return (
        f"{timed} steps of {plan.data} (plan {plan.sha256[:8]}), {record.framework} "
        f"{record.versions.get(VERSION_OF[record.framework], '?')}, revision {(record.git.revision or 'no git')[:10]}"
    )


def _side(framework: str, cell: Cell | None) -> dict[str, Any]:
    return {
        f"{framework}_setup": _setup(cell.first) if cell else None,
        f"{framework}_status": cell.first.status if cell else None,
        f"{framework}_effective_tokens_per_second": cell.rate if cell else None,
        f"{framework}_runs": len(cell.records) if cell else 0,
    }


def _setup(record: Record) -> str:
    """How a run was split and computed, in the words of the published record."""
    return ", ".join([*_split(record), f"{record.setup.dtype} {record.setup.amp or ''}".strip()])


def _split(record: Record) -> list[str]:
    """The same but for the precision."""
    setup = record.setup
    replicas = record.devices // setup.mp
    parts = [f"MP {setup.mp}"] * (setup.mp > 1) + [f"ZeRO {setup.zero}"] * (setup.zero > 0)
    parts += [f"DP {replicas}"] * (replicas > 1 and not setup.zero)
    parts += [f"{setup.micro_bsz * replicas}*{setup.accumulation}"] * (setup.accumulation > 1)
    parts += ["recompute"] * setup.recompute + ["tuned"] * setup.tuned
    return parts + [f"{setup.attention} attention"] * (setup.attention != "eager")


def _work(record: Record) -> dict[str, Any]:
    """What must be equal for two runs to have done the same work on the same machine."""
    plan, model, steps, hardware = record.plan, record.model, record.steps, record.hardware
    return {
        "plan.sha256": plan and plan.sha256,
        "model.parameters": model and model.parameters,
        "model.trainable_parameters": model and model.trainable_parameters,
        "model.config_sha256": model and model.config_sha256,
        "model.weights_sha256": model and model.weights_sha256,
        "setup.dtype": record.setup.dtype,
        "setup.amp": record.setup.amp,
        "steps": steps and len(steps.seconds),
        "timed_from": record.timed_from,
        "hardware.cpu": hardware.cpu,
        "hardware.cores": hardware.cores,
        "hardware.threads": hardware.threads,
        "hardware.environment": hardware.environment,
        "hardware.device": hardware.device,
        "hardware.driver": hardware.driver,
        "git.revision": record.git.revision,
    }


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text


def _texts(row: Row) -> list[str]:
    paddle, torch = _figures(row)
    return [
        row.model,
        METHODS[row.method],
        str(row.num_gpus),
        str(row.batch_size),
        row.paddle_setup or NOT_AVAILABLE,
        paddle,
        row.torch_setup or NOT_AVAILABLE,
        torch,
        _verdict(row),
        _rounds(row),
        row.compared or NOT_AVAILABLE,
    ]


def _rates(row: Row) -> tuple[float | None, float | None]:
    return row.paddle_effective_tokens_per_second, row.torch_effective_tokens_per_second


def _figures(row: Row) -> tuple[str, str]:
    """Both sides' rates, or what became of them."""

    def figure(rate: float | None, status: str | None) -> str:
        if rate is not None:
            return f"{rate:.2f}"
        return {"oom": "OOM", None: NOT_AVAILABLE}.get(status, str(status))

    paddle, torch = _rates(row)
    return figure(paddle, row.paddle_status), figure(torch, row.torch_status)


def _verdict(row: Row) -> str:
    if row.speedup is None:
        return row.refusal or NOT_AVAILABLE
    if row.interval and row.interval[0] <= 0 <= row.interval[1]:
        return "no difference"
    return f"{row.speedup:+.0%}"


def _rounds(row: Row) -> str:
    if row.interval:
        return f"{row.interval[0]:+.0%} to {row.interval[1]:+.0%}, {row.paddle_runs} rounds"
    if row.speedup is None:
        return NOT_AVAILABLE
    return (
        "one round" if row.paddle_runs == row.torch_runs == 1 else f"none: {row.paddle_runs} and {row.torch_runs} runs"
    )


def _markdown(columns: Sequence[str], lines: list[list[str]]) -> str:
    table = [list(columns), *lines]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in table]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _measured_on(records: list[Record]) -> str:
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
    environment = {f"{k}={v}" for r in done for k, v in r.hardware.environment.items() if k == "MKL_DEBUG_CPU_TYPE"}
    return (
        f"Measured on: {'; '.join(texts)}; {', '.join(sorted(versions))}; steps timed: {', '.join(sorted(steps))}"
        f"{'; ' + ', '.join(environment) if environment else ''}; revision {', '.join(sorted(revisions))}.{caveat}"
    )
