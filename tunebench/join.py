"""Joins records into pairs: which runs did the same work, how fast each side was, and what that makes of a speedup."""

import bisect
import functools
import gc
import itertools
import json
import operator
import re
import statistics
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tunebench.cache import results_folder
from tunebench.errors import BadInput
from tunebench.presets import PRESETS
from tunebench.record import Record, read_record
from tunebench.stats import drift_in_words, drift_of, outlying, ratio_interval, spread


class Tolerance(NamedTuple):
    """Largest relative differences of two curves, at any step, that still count as the same training."""

    first_loss: float  # of step 1, where only the start and the tokens count
    loss: float
    gradient: float  # of the gradient norms, which show faults that a loss hides


# Float32: at least 47 times what docs/models.md has as measured. Low precision: what its rounding alone may do, as
# tests/test_precision.py allows torch against its own float32.
TOLERANCES = {
    "fp32": Tolerance(1e-5, 1e-4, 1e-4),
    "bf16": Tolerance(1e-3, 1e-2, 5e-2),
    "fp16": Tolerance(5e-4, 5e-3, 2e-2),
}
METHODS = {"lora": "LoRA", "full": "Finetune"}
VERSION_OF = {"torch": "torch", "paddle": "paddlenlp"}
LIKE_FOR_LIKE, BEST_OF_EACH = "like for like", "best of each"


@dataclass(frozen=True)
class Row:
    """One row of a table. Rates in effective tokens/s of the whole job; `speedup` is Paddle ÷ Torch − 1.

    `num_gpus` is the number of processes where there are no GPUs. A side that did not end ok has its status; a pair
    that cannot be compared has no speedup, `refusal` in its place and the fields that differ in `note`.
    A side's `spread` is the standard deviation of its runs' log rates, None with a single run.
    `interval` is the 95% interval of the speedup, None with a single round or where one side has more runs.
    `compared` says whether both sides have the same setup or each its fastest one; None for a side alone.
    `parity` is the largest relative difference of the two loss curves at any step, `parity_first` that of the first
    step, and `parity_norm` that of the gradient norms.
    """

    family: str
    model: str
    method: str
    num_gpus: int
    batch_size: int
    paddle_setup: str | None
    paddle_status: str | None
    paddle_effective_tokens_per_second: float | None
    paddle_spread: float | None
    paddle_runs: int
    torch_setup: str | None
    torch_status: str | None
    torch_effective_tokens_per_second: float | None
    torch_spread: float | None
    torch_runs: int
    speedup: float | None
    interval: tuple[float, float] | None
    refusal: str | None
    compared: str | None
    parity: float | None
    note: str | None
    tuned: bool = False
    parity_first: float | None = None
    parity_norm: float | None = None


@dataclass(frozen=True)
class Itself:
    """A side against itself (A/A): `difference` is b ÷ a − 1, with its 95% interval; 0 but for noise."""

    family: str
    model: str
    method: str
    num_gpus: int
    batch_size: int
    framework: str
    setup: str
    runs: tuple[int, int]
    difference: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Cell:
    """All runs of one side with one setup on one piece of work. `whole`: each of them ended ok."""

    records: list[Record]
    whole: bool = True

    @property
    def first(self) -> Record:
        """The run that stands for the others where they must agree."""
        return self.records[0]

    @functools.cached_property
    def work(self) -> str:
        """What was done: equal where `differences` finds none."""
        return _as_key(_work(self.first))

    @functools.cached_property
    def setup(self) -> str:
        """How it was split and computed."""
        return setup_of(self.first)

    @functools.cached_property
    def split(self) -> tuple[str, ...]:
        """The same but for the precision."""
        return tuple(_split(self.first))

    @functools.cached_property
    def rates(self) -> list[float]:
        """The runs in effective tokens/s, by round; none when they did not end ok."""
        return [record.effective_tokens_per_second for record in self.records if record.status == "ok"]

    @functools.cached_property
    def rate(self) -> float | None:
        """The geometric mean of the runs, in effective tokens/s; None when they did not end ok."""
        return statistics.geometric_mean(self.rates) if self.rates else None


def load_records(paths: list[Path]) -> tuple[list[Record], list[str]]:
    """The records of files and folders (searched through, but for hidden and `published` ones), and what was broken."""
    records, broken = [], []
    gc.disable()  # it would look through all that was read so far again and again, and records hold no cycles
    try:
        for file in itertools.chain.from_iterable(record_files(path) for path in paths):
            try:
                records.append(read_record(file))
            except BadInput as fault:
                broken.append(str(fault))
    finally:
        gc.enable()
    return sorted(records, key=lambda record: record.started_at), broken


def join(records: list[Record]) -> list[Row]:
    """The rows: like for like first, then the best of each side, then what is left of either. A/A runs are left out."""
    groups: dict[tuple[Any, ...], dict[str, list[Record]]] = {}
    for record in records:
        if record.aa is None and record.peer is None:
            groups.setdefault(_group(record), {"paddle": [], "torch": []})[record.framework].append(record)
    rows = []
    for group in sorted(groups, key=_place):
        cells = {framework: _cells(members) for framework, members in groups[group].items()}
        pairs = _pairs(**cells)
        headings = [(compared == BEST_OF_EACH, (paddle or torch).setup) for compared, paddle, torch in pairs]
        counts = Counter(headings)
        rows.extend(
            _row(group, *pair, told_apart=counts[heading] > 1) for pair, heading in zip(pairs, headings, strict=True)
        )
    return rows


def against_itself(records: list[Record]) -> list[Itself]:
    """Each side's A/A comparisons; work of which either half is missing is left out."""
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in records:
        if record.aa is not None:
            groups[(*_group(record), record.framework)].append(record)
    found = []
    for group in sorted(groups, key=_place):
        for cell in _cells(groups[group]):
            a, b = (Cell([r for r in cell.records if r.aa == side], cell.whole) for side in ("a", "b"))
            if a.rate and b.rate:
                runs = len(a.rates), len(b.rates)
                found.append(Itself(*group, cell.setup, runs, b.rate / a.rate - 1, _interval(b, a)))
    return found


def differences(paddle: Record, torch: Record) -> list[str]:
    """Why two runs did not do the same work: each differing field with both values; empty when they did."""
    ours, theirs = _work(paddle), _work(torch)
    fields = dict.fromkeys((*ours, *theirs))
    return [
        f"{field}: {_short(ours.get(field))} ≠ {_short(theirs.get(field))}"
        for field in fields
        if ours.get(field) != theirs.get(field)
    ]


def parity(paddle: Record, torch: Record) -> float:
    """The largest relative difference of two loss curves at any step."""
    return max(_relative("loss", [paddle], [torch]))


def disagreement(paddle: Record, torch: Record) -> str | None:
    """Why two runs are not one training: field, step and both values of the model or a curve; None when they are."""
    if built := _contradiction(paddle, torch):
        return f"model.built{built}"
    ours, theirs = _skipped(paddle), _skipped(torch)
    if ours != theirs:
        return f"steps.grad_norm: the skipped steps differ: {ours or 'none'} ≠ {theirs or 'none'}"
    for curve, found, limit in _limited([paddle], [torch]):
        worst = max(range(len(found)), key=found.__getitem__)
        if not found[worst] <= limit:
            values = [getattr(record.steps, curve)[worst] for record in (paddle, torch)]
            where, apart = f"steps.{curve} of step {worst + 1}", f"{found[worst]:.1e} apart, allowed are {limit:g}"
            return f"{where}: {values[0]:.8g} ≠ {values[1]:.8g}, {apart}"
    return None


def setup_of(record: Record) -> str:
    """How a run was split and computed, in the words of the published record."""
    return ", ".join([*_split(record), f"{record.setup.dtype} {record.setup.amp or ''}".strip()])


def model_of(record: Record) -> tuple[str, str]:
    """Family and name; of a run whose checkpoint was never read, by its flags."""
    if record.model is not None:
        return record.model.family, record.model.name
    name = _flags(record).get("--model", "unknown")
    return (PRESETS[name].config["model_type"] if name in PRESETS else "other"), Path(name).name


def rank_of(model: str) -> tuple[int, str]:
    """Where a model stands in tables: presets in their order, then others by name."""
    presets = list(PRESETS)
    return presets.index(model) if model in presets else len(presets), model


def record_files(path: Path) -> list[Path]:
    """The record file that `path` is, or those in the folder; the folder of results need not be there yet."""
    try:
        if path.is_file():
            return [path]
        is_folder = path.is_dir()
    except OSError as error:
        raise BadInput(f"{str(path)[:80]}: {error.strerror}; name record files or folders of them") from None
    if not is_folder:
        if path == results_folder():
            return []
        raise BadInput(f"{path}: no such file or folder; name record files or folders of them")
    return sorted(file for file in path.rglob("*.json") if not _is_kept_apart(file.relative_to(path)))


def _is_kept_apart(file: Path) -> bool:
    return any(part.startswith(".") or part == "published" for part in file.parts)


def _group(record: Record) -> tuple[Any, ...]:
    """What rows and comparisons stand together by: family, model, method, GPUs and batch size."""
    return (*model_of(record), record.method, record.devices, record.setup.bsz)


def _place(group: tuple[Any, ...]) -> tuple[Any, ...]:
    return group[0], rank_of(group[1]), list(METHODS).index(group[2]), group[3:]


def _first_disagreement(paddle: list[Record], torch: list[Record]) -> str | None:
    """The first `disagreement` of each run with each of the other side, without looking at each pair."""
    if not _disagree(paddle, torch):
        return None
    first = bisect.bisect_left(range(len(paddle)), True, key=lambda i: _disagree(paddle[: i + 1], torch))
    return next(filter(None, (disagreement(paddle[first], other) for other in torch)))


def _disagree(paddle: list[Record], torch: list[Record]) -> bool:
    """Whether any run disagrees with any of the other side."""
    skipped = {tuple(_skipped(record)) for record in (*paddle, *torch)}
    if any(_contradiction(ours, theirs) for ours, theirs in itertools.product(_models(paddle), _models(torch))):
        return True
    return len(skipped) > 1 or any(not max(found) <= limit for _, found, limit in _limited(paddle, torch))


def _models(records: list[Record]) -> list[Record]:
    """One record for each model that was built."""
    return list({record.model and record.model.model_dump_json(): record for record in records}.values())


def _contradiction(paddle: Record, torch: Record) -> str | None:
    """What the models that two runs built differ in; older records do not say what was built."""
    built = [record.model and record.model.built for record in (paddle, torch)]
    if None in built:
        return None if built == [None, None] else ": known of one side alone"
    found = built[0].contradiction(built[1])
    return found and f".{found}"


def _skipped(record: Record) -> list[int]:
    return [i for i, norm in enumerate(record.steps.grad_norm, 1) if norm is None]


def _limited(paddle: list[Record], torch: list[Record]) -> Iterator[tuple[str, list[float], float]]:
    """Each curve, its largest relative differences by step, and what is allowed of them."""
    tolerance = TOLERANCES[paddle[0].setup.dtype]
    loss = _relative("loss", paddle, torch)
    yield "loss", loss[:1], tolerance.first_loss
    yield "loss", loss, tolerance.loss
    yield "grad_norm", _relative("grad_norm", paddle, torch), tolerance.gradient


def _relative(curve: str, paddle: list[Record], torch: list[Record]) -> list[float]:
    """The largest relative difference of any two runs at each step; 0 at steps that a side skipped."""
    found = []
    by_step = [zip(*(getattr(record.steps, curve) for record in runs), strict=True) for runs in (paddle, torch)]
    for ours, theirs in zip(*by_step, strict=True):
        known = [a for a in ours if a is not None]
        ends = {min(known), max(known)} if known else ()  # nothing between them is further from any b
        apart = (abs(a - b) / max(abs(b), 1e-12) for b in theirs if b is not None for a in ends)
        found.append(max(apart, default=0.0))
    return found


def _cells(records: list[Record]) -> list[Cell]:
    """One side's runs by setup and work. Runs that did not end ok count only where none of their setup did."""
    by_key: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.status == "ok":
            # Runs of other versions are no repeats of each other, though each may have its pair.
            by_key[_as_key([vars(record.setup), record.versions, _work(record)])].append(record)
    bad = [(_attempt(record), record) for record in records if record.status != "ok"]
    done = {_attempt(runs[0]) for runs in by_key.values()}
    ended: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for attempt, record in bad:
        if attempt not in done:
            ended[(*attempt, record.status)].append(record)
    failed = {attempt for attempt, _ in bad}
    for runs in by_key.values():
        runs.sort(key=turn)
    return [Cell(runs, _attempt(runs[0]) not in failed) for runs in (*by_key.values(), *ended.values())]


def turn(record: Record) -> tuple[int, str]:
    """The round that a suite gave a run, by its file's name, and when it started: a round may have been run again."""
    number = re.search(r"-r(\d+)\.json$", _out(record))
    return int(number[1]) if number else 0, record.started_at


def _attempt(record: Record) -> tuple[Any, ...]:
    """What was tried: the setup, the commit and the command but for its --out."""
    out = _out(record)
    return setup_of(record), record.git.revision, *(w for w in record.argv if w not in ("--out", out, f"--out={out}"))


def _pairs(paddle: list[Cell], torch: list[Cell]) -> list[tuple[str | None, Cell | None, Cell | None]]:
    """Which cells make a row, and what kind: like for like, the best of each on the same work, then the rest.

    Of the rest, a cell is shown alone, or beside the other side's of the same setup or one that differs in precision.
    """
    ours, theirs = (sorted(cells, key=lambda cell: -(cell.rate or 0.0)) for cells in (paddle, torch))
    pairs: list[tuple[str | None, Cell | None, Cell | None]] = []
    timed = [cell for cell in theirs if cell.rate]
    same_work, alike = _by(timed, "work"), _by(timed, "work", "setup")
    like: list[tuple[Cell, Cell]] = []
    best: dict[str, tuple[Cell, Cell]] = {}
    for a in (cell for cell in ours if cell.rate):
        if waiting := alike[a.work, a.setup]:
            like.append((a, waiting.popleft()))
        if a.work not in best:
            # Fastest first, so the first two of the same work are its best.
            b = next((b for b in same_work[a.work] if not disagreement(a.first, b.first)), None)
            if b:
                best[a.work] = a, b
    pairs += [(LIKE_FOR_LIKE, a, b) for a, b in sorted(like, key=lambda pair: _order(pair[0].first))]
    pairs += [(BEST_OF_EACH, a, b) for a, b in best.values() if a.setup != b.setup]
    shown = {id(cell) for _, *pair in pairs for cell in pair}
    same_setup, same_split = _by(theirs, "setup"), _by(theirs, "split")
    for a in ours:
        if id(a) not in shown:
            b = _take(same_setup[a.setup], shown) or _take(same_split[a.split], shown)
            pairs.append((LIKE_FOR_LIKE if b and a.setup == b.setup else None, a, b))
    return pairs + [(None, None, b) for b in theirs if id(b) not in shown]


def _by(cells: list[Cell], *fields: str) -> dict[Any, deque[Cell]]:
    """The cells by one or more of their fields, in their order."""
    found: dict[Any, deque[Cell]] = defaultdict(deque)
    for cell in cells:
        found[operator.attrgetter(*fields)(cell)].append(cell)
    return found


def _take(waiting: deque[Cell], shown: set[int]) -> Cell | None:
    """The first that is not shown, which it then is."""
    while waiting:
        cell = waiting.popleft()
        if id(cell) not in shown:
            shown.add(id(cell))
            return cell
    return None


def _order(record: Record) -> tuple[int, ...]:
    """Tensor parallelism first, then the most sharded, as the published record has it."""
    return -record.setup.mp, -record.setup.zero, record.setup.accumulation


def _row(
    group: tuple[Any, ...], compared: str | None, paddle: Cell | None, torch: Cell | None, told_apart: bool
) -> Row:
    family, model, method, devices, bsz = group
    speedup = interval = refusal = note = None
    apart: dict[str, float] = {}
    if paddle and torch and paddle.rate and torch.rate:
        if paddle.work != torch.work:
            different = differences(paddle.first, torch.first)
            refusal, note = "not the same work", f"not the same work: {'; '.join(different)}"
        else:
            loss, norm = (_relative(curve, paddle.records, torch.records) for curve in ("loss", "grad_norm"))
            apart = {"parity": max(loss), "parity_first": loss[0], "parity_norm": max(norm)}
            note = _first_disagreement(paddle.records, torch.records)
            if note:
                refusal = "models differ" if note.startswith("model.") else "losses differ"
            else:
                speedup = paddle.rate / torch.rate - 1
                interval = _interval(paddle, torch)
    sides = [cell for cell in (paddle, torch) if cell]
    notes = [f"{cell.first.framework} {remark}" for cell in sides for remark in _remarks(cell)]
    what = [_on_what(cell.first) for cell in sides if cell.rate and told_apart][:1]
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
        parity=apart.get("parity"),
        parity_first=apart.get("parity_first"),
        parity_norm=apart.get("parity_norm"),
        note="; ".join(filter(None, [note, *notes, *what])) or None,
        tuned=all(cell.first.setup.tuned for cell in sides),
    )


def _interval(ours: Cell, theirs: Cell) -> tuple[float, float] | None:
    """The 95% interval of ours ÷ theirs − 1; None where a round has one side alone."""
    rounds = [[turn(record)[0] for record in cell.records] for cell in (ours, theirs)]
    whole = ours.whole and theirs.whole and rounds[0] == rounds[1]
    return ratio_interval(ours.rates, theirs.rates) if whole else None


def _remarks(cell: Cell) -> list[str]:
    """What a reader must know of one side: how it ended, and what is odd about its runs."""
    first, runs = cell.first, len(cell.records)
    if not cell.rate:
        return [f"{first.status}: {first.reason}"]
    remarks = []
    if skipped := sum(record.skipped_steps for record in cell.records):
        remarks.append(f"skipped {skipped} steps (float16 overflowed)")
    if first.kernels and first.setup.attention != "eager":
        remarks.append(f"ran {' and '.join(first.kernels.attention)}")
    if change := drift_of(cell.records):
        remarks.append(drift_in_words(change))
    for i in outlying(cell.rates):
        remarks.append(
            f"run {i + 1} of {runs} stands apart ({cell.rates[i]:.0f} for a median of "
            f"{statistics.median(cell.rates):.0f}, {_out(cell.records[i])}): see what else ran then, and measure the "
            "pair again (--fresh --only), or add rounds (--repeats)"
        )
    return remarks


def _out(record: Record) -> str:
    """Which file it was, by its flags, which need not name one."""
    return _flags(record).get("--out", record.started_at)


def _flags(record: Record) -> dict[str, str]:
    """The value of each flag that was given one (of a bare flag, the word after it)."""
    words = list(itertools.chain.from_iterable(word.split("=", 1) for word in record.argv))
    return {flag: value for flag, value in itertools.pairwise(words) if flag.startswith("--")}


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
        f"{framework}_setup": cell.setup if cell else None,
        f"{framework}_status": cell.first.status if cell else None,
        f"{framework}_effective_tokens_per_second": cell.rate if cell else None,
        f"{framework}_spread": spread(cell.rates) if cell else None,
        f"{framework}_runs": len(cell.records) if cell else 0,
    }


def _split(record: Record) -> list[str]:
    """The same but for the precision."""
    setup = record.setup
    replicas = record.devices // setup.mp
    parts = [f"MP {setup.mp}"] * (setup.mp > 1) + [f"ZeRO {setup.zero}"] * (setup.zero > 0)
    parts += [f"DP {replicas}"] * (replicas > 1 and not setup.zero)
    parts += [f"{setup.micro_bsz * replicas}*{setup.accumulation}"] * (setup.accumulation > 1)
    parts += ["recompute"] * setup.recompute
    parts += [f"packed {setup.packing}"] * (setup.packing > 0) + ["grouped"] * (setup.order == "grouped")
    if setup.tuned:
        return [*parts, "tuned"]
    parts += ["padding-free"] * (setup.padding_free and not setup.packing)
    parts += ["labels only"] * (setup.head == "labels") + ["lean"] * setup.lean + ["compiled"] * setup.compile
    parts += ["memory kept"] * setup.keep_memory
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
        "setup.nnodes": record.setup.nnodes,
        "setup.dtype": record.setup.dtype,
        "setup.amp": record.setup.amp,
        "steps": steps and len(steps.seconds),
        "timed_from": record.timed_from,
        "git.revision": record.git.revision,
        "git.changes": record.git.changes,
        "hardware.device": hardware.device,
        **{f"hardware.{name}": value for name, value in hardware.lasting().items()},
    }


def _as_key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text
