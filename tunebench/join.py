"""Joins records into pairs: which runs did the same work, how fast each side was, and what that makes of a speedup."""

import itertools
import json
import re
import statistics
from collections import defaultdict
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


# Low precision: what its rounding alone may do. tests/test_precision.py allows torch as much against its own fp32.
TOLERANCES = {
    "fp32": Tolerance(1e-4, 1e-3, 1e-3),
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

    @property
    def rates(self) -> list[float]:
        """The runs in effective tokens/s, by round; none when they did not end ok."""
        return [record.effective_tokens_per_second for record in self.records if record.status == "ok"]

    @property
    def rate(self) -> float | None:
        """The geometric mean of the runs, in effective tokens/s; None when they did not end ok."""
        return statistics.geometric_mean(self.rates) if self.rates else None


def load_records(paths: list[Path]) -> tuple[list[Record], list[str]]:
    """The records of files and folders (searched through, but for hidden and `published` ones), and what was broken."""
    records, broken = [], []
    for file in itertools.chain.from_iterable(record_files(path) for path in paths):
        try:
            records.append(read_record(file))
        except BadInput as fault:
            broken.append(str(fault))
    return sorted(records, key=lambda record: record.started_at), broken


def join(records: list[Record]) -> list[Row]:
    """The rows: like for like first, then the best of each side, then what is left of either. A/A runs are left out."""
    groups: dict[tuple[Any, ...], dict[str, list[Record]]] = {}
    for record in records:
        if record.aa is None:
            groups.setdefault(_group(record), {"paddle": [], "torch": []})[record.framework].append(record)
    rows = []
    for group in sorted(groups, key=_place):
        cells = {framework: _cells(members) for framework, members in groups[group].items()}
        pairs = _pairs(**cells)
        headings = [(compared == BEST_OF_EACH, setup_of((paddle or torch).first)) for compared, paddle, torch in pairs]
        rows.extend(
            _row(group, *pair, told_apart=headings.count(heading) > 1)
            for pair, heading in zip(pairs, headings, strict=True)
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
                found.append(Itself(*group, setup_of(cell.first), runs, b.rate / a.rate - 1, _interval(b, a)))
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
    return max(_relative("loss", paddle, torch))


def disagreement(paddle: Record, torch: Record) -> str | None:
    """Why two curves are not those of one training: field, step and both values; None when they are."""
    skipped = [[i for i, norm in enumerate(r.steps.grad_norm, 1) if norm is None] for r in (paddle, torch)]
    if skipped[0] != skipped[1]:
        return f"steps.grad_norm: the skipped steps differ: {skipped[0] or 'none'} ≠ {skipped[1] or 'none'}"
    loss, gradients = _relative("loss", paddle, torch), _relative("grad_norm", paddle, torch)
    tolerance = TOLERANCES[paddle.setup.dtype]
    for curve, found, limit in (
        ("loss", loss[:1], tolerance.first_loss),
        ("loss", loss, tolerance.loss),
        ("grad_norm", gradients, tolerance.gradient),
    ):
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


def _relative(curve: str, paddle: Record, torch: Record) -> list[float]:
    """The relative differences at each step; 0 at steps that a side skipped."""
    pairs = zip(getattr(paddle.steps, curve), getattr(torch.steps, curve), strict=True)
    return [0.0 if None in (a, b) else abs(a - b) / max(abs(b), 1e-12) for a, b in pairs]


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
    for runs in by_key.values():
        runs.sort(key=_turn)
    return [Cell(runs, _attempt(runs[0]) not in failed) for runs in (*by_key.values(), *ended.values())]


def _turn(record: Record) -> tuple[int, str]:
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
    ok = [(a, b) for a in ours for b in theirs if a.rate and b.rate and not differences(a.first, b.first)]
    same = [(a, b) for a, b in ok if not disagreement(a.first, b.first)]
    like: list[tuple[Cell, Cell]] = []
    for a, b in ok:
        if setup_of(a.first) == setup_of(b.first) and not any(a is c or b is d for c, d in like):
            like.append((a, b))
    pairs += [(LIKE_FOR_LIKE, a, b) for a, b in sorted(like, key=lambda pair: _order(pair[0].first))]
    best: list[tuple[Cell, Cell]] = []
    for a, b in same:  # fastest first, so the first one of each work is it
        if all(differences(a.first, other.first) for _, other in best):
            best.append((a, b))
    pairs += [(BEST_OF_EACH, a, b) for a, b in best if setup_of(a.first) != setup_of(b.first)]
    shown = [id(cell) for _, *pair in pairs for cell in pair]
    ours, theirs = ([cell for cell in cells if id(cell) not in shown] for cells in (ours, theirs))
    for a in ours:
        b = next((b for how in (setup_of, _split) for b in theirs if how(a.first) == how(b.first)), None)
        theirs = [cell for cell in theirs if cell is not b]
        pairs.append((LIKE_FOR_LIKE if b and setup_of(a.first) == setup_of(b.first) else None, a, b))
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
        parity=agreement,
        note="; ".join(filter(None, [note, *notes, *what])) or None,
    )


def _interval(ours: Cell, theirs: Cell) -> tuple[float, float] | None:
    """The 95% interval of ours ÷ theirs − 1; None where a round has one side alone."""
    rounds = [[_turn(record)[0] for record in cell.records] for cell in (ours, theirs)]
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
        f"{framework}_setup": setup_of(cell.first) if cell else None,
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


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text
