"""Joins records into pairs: which runs did the same work, how fast each side was, and what that makes of a speedup."""

import functools
import gc
import itertools
import json
import math
import operator
import statistics
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from tunebench.cache import results_folder
from tunebench.errors import BadInput
from tunebench.presets import PRESETS
from tunebench.record import DISTURBED, MARKED, Record, read_record
from tunebench.rounds import (
    APART,
    RUNS_APART,
    Near,
    Rounds,
    beside,
    flags_of,
    in_one_series,
    minutes_apart,
    out_of,
    pair_rounds,
    round_of,
    turn,
)
from tunebench.stats import (
    Noise,
    drift_between,
    drift_in_words,
    drift_of,
    is_across_zero,
    outlying,
    pooled_noise,
    spread,
)


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
LEAST_SECONDS = 5.0  # timed, so that ticks of 10 ms tell 1% of a core
LIKE_FOR_LIKE, BEST_OF_EACH = "like for like", "best of each"


@dataclass(frozen=True)
class Row:
    """One row of a table. Rates in effective tokens/s of the whole job; `speedup` is Paddle ÷ Torch − 1.

    `num_gpus` is the number of processes where there are no GPUs. A side that did not end ok has its status; a pair
    that cannot be compared has no speedup, `refusal` in its place and the fields that differ in `note`.
    Rates and speedup are those of the complete `rounds` where there are some; `dropped` is how many more there were.
    A side's `spread` is the standard deviation of its runs' log rates, None with a single run. `round_noise` is that of
    the rounds' log ratios, and `noise` what a difference of so many rounds is worth by this machine's A/A runs.
    `interval` is the 95% interval of the speedup, None with a single round. A side's `disturbance` is the largest share
    of a core or a GPU that others took in one of its runs.
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
    note: str | None
    tuned: bool = False
    parity: float | None = None
    parity_first: float | None = None
    parity_norm: float | None = None
    rounds: int = 0
    dropped: int = 0
    round_noise: float | None = None
    noise: float | None = None
    paddle_disturbance: float | None = None
    torch_disturbance: float | None = None


@dataclass(frozen=True)
class Itself:
    """A side against itself (A/A): `difference` is b ÷ a − 1, with its 95% interval; 0 but for noise.

    `log_ratios` are the complete rounds', `dropped` is how many more there were.
    """

    family: str
    model: str
    method: str
    num_gpus: int
    batch_size: int
    framework: str
    setup: str
    machine: str
    log_ratios: list[float]
    dropped: int
    difference: float
    interval: tuple[float, float] | None
    disturbed: str | None


@dataclass(frozen=True)
class Cell:
    """All runs of one side with one setup on one piece of work."""

    records: list[Record]

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
    def disturbed(self) -> str | None:
        """By what the most disturbed of its runs was, where one was."""
        return disturbed_by(self.records)

    @functools.cached_property
    def wholly_disturbed(self) -> bool:
        """Whether each of its runs was, so that nothing is known of its rate."""
        return all(record.disturbed for record in self.records)

    @functools.cached_property
    def rates(self) -> list[float]:
        """The runs in effective tokens/s, by round; none when they did not end ok."""
        return [record.effective_tokens_per_second for record in self.records if record.status == "ok"]

    @functools.cached_property
    def rate(self) -> float | None:
        """The geometric mean of the runs, in effective tokens/s; None when they did not end ok."""
        return statistics.geometric_mean(self.rates) if self.rates else None


def disturbed_by(records: Iterable[Record]) -> str | None:
    """By what the most disturbed of a side's runs was, where one was."""
    found = [(*record.disturbance, record.framework) for record in records if record.disturbance and record.disturbed]
    return "{2}: {1}".format(*max(found)) if found else None


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
    near, noises = in_one_series(records), noise_by_machine(against_itself(records))
    for group in sorted(groups, key=_place):
        cells = {framework: _cells(members) for framework, members in groups[group].items()}
        pairs = _pairs(**cells, near=near)
        headings = [(compared == BEST_OF_EACH, (paddle or torch).setup) for compared, paddle, torch in pairs]
        counts = Counter(headings)
        for (compared, paddle, torch), heading in zip(pairs, headings, strict=True):
            row = _row(group, compared, paddle, torch, told_apart=counts[heading] > 1, near=near)
            noise = noises.get((paddle or torch).first.hardware.machine)
            if compared == BEST_OF_EACH:  # A/A runs, which are beside each other, do not tell what such rows are worth
                lines = [row.note, *(_runners_up(cell, cells[cell.first.framework], near) for cell in (paddle, torch))]
                row = replace(row, note="; ".join(filter(None, lines)) or None)
            elif noise and row.rounds:
                row = replace(row, noise=noise.worth(row.rounds))
            rows.append(row)
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
            a, b = ([r for r in cell.records if r.aa == side and r.status == "ok"] for side in ("a", "b"))
            rounds = pair_rounds(b, a, beside)
            if rounds.pairs:
                ratios, machine = rounds.log_ratios, cell.first.hardware.machine
                found.append(
                    Itself(
                        *group,
                        setup=cell.setup,
                        machine=machine,
                        log_ratios=ratios,
                        dropped=rounds.dropped,
                        difference=math.expm1(statistics.fmean(ratios)),
                        interval=rounds.interval,
                        disturbed=cell.disturbed,
                    )
                )
    return found


def noise_by_machine(comparisons: list[Itself]) -> dict[str, Noise]:
    """The noise of each machine, from the comparisons of a side with itself that nothing disturbed."""
    rows: dict[str, list[list[float]]] = defaultdict(list)
    for each in comparisons:
        if not each.disturbed:
            rows[each.machine].append(each.log_ratios)
    found = {machine: pooled_noise(ratios) for machine, ratios in rows.items()}
    return {machine: noise for machine, noise in found.items() if noise}


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
    """Why two runs are not one training: field, step and both values of the model or a curve; None when they are."""
    if built := _contradiction(paddle, torch):
        return f"model.built{built}"
    ours, theirs = _skipped(paddle), _skipped(torch)
    if ours != theirs:
        return f"steps.grad_norm: the skipped steps differ: {ours or 'none'} ≠ {theirs or 'none'}"
    for curve, found, limit in _limited(paddle, torch):
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
    name = flags_of(record).get("--model", "unknown")
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


def _contradiction(paddle: Record, torch: Record) -> str | None:
    """What the models that two runs built differ in; older records do not say what was built."""
    built = [record.model and record.model.built for record in (paddle, torch)]
    if None in built:
        return None if built == [None, None] else ": known of one side alone"
    found = built[0].contradiction(built[1])
    return found and f".{found}"


def _skipped(record: Record) -> list[int]:
    return [i for i, norm in enumerate(record.steps.grad_norm, 1) if norm is None]


def _limited(paddle: Record, torch: Record) -> Iterator[tuple[str, list[float], float]]:
    """Each curve, its relative differences by step, and what is allowed of them."""
    tolerance = TOLERANCES[paddle.setup.dtype]
    loss = _relative("loss", paddle, torch)
    yield "loss", loss[:1], tolerance.first_loss
    yield "loss", loss, tolerance.loss
    yield "grad_norm", _relative("grad_norm", paddle, torch), tolerance.gradient


def _relative(curve: str, paddle: Record, torch: Record) -> list[float]:
    """The relative differences of a curve at each step; 0 at steps that a side skipped."""
    steps = zip(getattr(paddle.steps, curve), getattr(torch.steps, curve), strict=True)
    return [0.0 if a is None or b is None else abs(a - b) / max(abs(b), 1e-12) for a, b in steps]


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
    for runs in by_key.values():
        runs.sort(key=turn)
    return [Cell(runs) for runs in (*by_key.values(), *ended.values())]


def _attempt(record: Record) -> tuple[Any, ...]:
    """What was tried: the setup, the commit and the command but for what changes from round to round."""
    out = out_of(record)
    words = (w for w in record.argv if w not in ("--out", out, f"--out={out}") and not w.startswith("--plan-seed"))
    return setup_of(record), record.git.revision, *words


def _pairs(paddle: list[Cell], torch: list[Cell], near: Near) -> list[tuple[str | None, Cell | None, Cell | None]]:
    """Which cells make a row, and what kind: like for like, the best of each on the same work, then the rest.

    Of the rest, a cell is shown alone, or beside the other side's of the same setup or one that differs in precision.
    Of a side whose runs were all disturbed a disturbed one is the best.
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
    for a in sorted((cell for cell in ours if cell.rate), key=lambda cell: cell.wholly_disturbed):
        if a.work not in best:
            # Fastest first, so the first two of the same work are its best; after them those that were disturbed.
            calm = sorted(same_work[a.work], key=lambda cell: cell.wholly_disturbed)
            b = next((b for b in calm if _is_one_training(a, b, near)), None)
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
    group: tuple[Any, ...], compared: str | None, paddle: Cell | None, torch: Cell | None, told_apart: bool, near: Near
) -> Row:
    family, model, method, devices, bsz = group
    refusal = note = None
    rounds, apart = Rounds([], 0), {}
    if paddle and torch and paddle.rate and torch.rate:
        if paddle.work != torch.work:
            refusal = "not the same work"
            note = f"{refusal}: {'; '.join(differences(paddle.first, torch.first))}"
        else:
            near = near if compared == BEST_OF_EACH else beside
            rounds = pair_rounds(paddle.records, torch.records, near)
            refusal, note = _refusal(paddle, torch, rounds)
            apart = _apart(rounds)
    sides = [cell for cell in (paddle, torch) if cell]
    notes = [note, *_remarks_of_rounds(rounds)]
    if compared == BEST_OF_EACH and (minutes := max(itertools.starmap(minutes_apart, rounds.pairs), default=0)) > 2:
        notes.append(
            f"its sides ran up to {minutes:.0f} minutes apart: run both beside each other before you rely on it"
        )
    notes += [f"{cell.first.framework} {remark}" for cell in sides for remark in _remarks(cell)]
    if any(cell.rate for cell in sides):
        unknown = [cell.first.framework for cell in sides if any(r.conditions is None for r in cell.records)]
        notes += [f"conditions not recorded ({' and '.join(unknown)})"] * bool(unknown)
    notes += [_on_what(cell.first) for cell in sides if cell.rate and told_apart][:1]
    ratios = rounds.log_ratios
    return Row(
        family=family,
        model=model,
        method=method,
        num_gpus=devices,
        batch_size=bsz,
        **_side("paddle", paddle, rounds.rates[0]),
        **_side("torch", torch, rounds.rates[1]),
        speedup=None if refusal or not ratios else math.expm1(statistics.fmean(ratios)),
        interval=None if refusal else rounds.interval,
        refusal=refusal,
        compared=compared,
        note="; ".join(filter(None, notes)) or None,
        tuned=all(cell.first.setup.tuned for cell in sides),
        rounds=len(rounds.pairs),
        dropped=rounds.dropped,
        round_noise=statistics.stdev(ratios) if len(ratios) > 1 else None,
        **apart,
    )


def _refusal(paddle: Cell, torch: Cell, rounds: Rounds) -> tuple[str | None, str | None]:
    """Why two cells of the same work have no speedup, in a few words and in full."""
    sides = zip(*rounds.pairs, strict=True) if rounds.pairs else [cell.records for cell in (paddle, torch)]
    disturbed = "; ".join(filter(None, map(disturbed_by, sides)))
    if not rounds.pairs and not disturbed:
        plans = [{record.plan.sha256 for record in cell.records if record.plan} for cell in (paddle, torch)]
        if not plans[0] & plans[1]:
            ours, theirs = (min(plan)[:12] for plan in plans)
            return "not the same work", f"not the same work: plan.sha256: {ours} ≠ {theirs}"
        return "no complete round", (
            f"no complete round: the two sides of each started more than {APART / 60:g} minutes and {RUNS_APART} runs "
            "apart; run them beside each other"
        )
    if fault := next(filter(None, itertools.starmap(disagreement, rounds.pairs)), None):
        return ("models differ" if fault.startswith("model.") else "losses differ"), fault
    if disturbed:
        return f"disturbed: {disturbed}", "disturbed rounds say nothing: run_all.sh measures them again"
    return None, None


def _apart(rounds: Rounds) -> dict[str, float]:
    """The largest relative differences of the two sides of any round."""
    found: dict[str, float] = {}
    for ours, theirs in rounds.pairs:
        loss, norm = (_relative(curve, ours, theirs) for curve in ("loss", "grad_norm"))
        for name, value in (("parity", max(loss)), ("parity_first", loss[0]), ("parity_norm", max(norm))):
            found[name] = max(found.get(name, 0.0), value)
    return found


def _is_one_training(a: Cell, b: Cell, near: Near) -> bool:
    pairs = pair_rounds(a.records, b.records, near).pairs
    return bool(pairs) and not any(itertools.starmap(disagreement, pairs))


def _remarks_of_rounds(rounds: Rounds) -> list[str]:
    """What a reader must know of the rounds of a pair."""
    remarks = []
    if rounds.pairs and rounds.dropped:
        remarks.append(
            f"{rounds.dropped} round(s) left out: of one side alone, or with sides that started too far apart"
        )
    for i in outlying([math.exp(ratio) for ratio in rounds.log_ratios]):
        ratio = math.expm1(rounds.log_ratios[i])
        number = round_of(rounds.pairs[i][0]) or i + 1
        remarks.append(f"round {number} stands apart by its ratio ({ratio:+.1%})")
    if change := drift_between(rounds.pairs):
        remarks.append(f"paddle's steps ÷ torch's changed by {change:+.0%} in the second half of the timed ones")
    return remarks


def _runners_up(best: Cell, cells: list[Cell], near: Near) -> str | None:
    """The next setup of the same framework on the same work, and whether the rounds tell it from the best."""
    others = [cell for cell in cells if cell is not best and cell.rate and cell.work == best.work]
    others = [cell for cell in others if cell.setup != best.setup and not cell.disturbed]
    if not others:
        return None
    second = max(others, key=lambda cell: cell.rate or 0.0)
    rounds = pair_rounds(second.records, best.records, near)
    text = f"{best.first.framework}'s runner-up is {second.setup}"
    if not rounds.pairs:
        return f"{text}, in no round with the best"
    text += f" ({math.expm1(statistics.fmean(rounds.log_ratios)):+.1%}"
    if rounds.interval is None:
        return f"{text}, one round)"
    return f"{text}, {'a tie' if is_across_zero(rounds.interval) else 'told apart'})"


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
    known = [record for record in cell.records if record.conditions]
    taken = [record.disturbance for record in known if record.disturbance]
    if taken and MARKED <= max(taken)[0] < DISTURBED:
        remarks.append(f"was marked: {max(taken)[1]}")
    remarks += dict.fromkeys(remark for record in known for remark in record.conditions.remarks())
    if known and (seconds := min(record.conditions.seconds for record in known)) < LEAST_SECONDS:
        remarks.append(f"was timed for {seconds:.1f} s alone, and {LEAST_SECONDS:g} s tell what others took")
    for i in outlying(cell.rates):
        remarks.append(
            f"run {i + 1} of {runs} stands apart ({cell.rates[i]:.0f} for a median of "
            f"{statistics.median(cell.rates):.0f}, {out_of(cell.records[i])}): see what else ran then, and measure the "
            "pair again (--fresh --only), or add rounds (--repeats)"
        )
    return remarks


def _on_what(record: Record) -> str:
    """What tells rows with the same headings apart."""
    assert record.plan is not None
    assert record.steps is not None
    plan, timed = record.plan, len(record.steps.seconds) - record.timed_from
    return (
        f"{timed} steps of {plan.data} (plan {plan.sha256[:8]}), {record.framework} "
        f"{record.versions.get(VERSION_OF[record.framework], '?')}, revision {(record.git.revision or 'no git')[:10]}"
    )


def _side(framework: str, cell: Cell | None, rates: list[float]) -> dict[str, Any]:
    """What a row says of one side; `rates` are those of the complete rounds."""
    rates = rates or (cell.rates if cell else [])
    taken = [record.disturbance[0] for record in (cell.records if cell else []) if record.disturbance]
    return {
        f"{framework}_setup": cell.setup if cell else None,
        f"{framework}_status": cell.first.status if cell else None,
        f"{framework}_effective_tokens_per_second": statistics.geometric_mean(rates) if rates else None,
        f"{framework}_spread": spread(rates),
        f"{framework}_runs": len(cell.records) if cell else 0,
        f"{framework}_disturbance": max(taken, default=None),
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
        # Rounds have batches of their own, drawn from the same samples.
        "plan.drawn_from" if plan and plan.drawn_from else "plan.sha256": plan and (plan.drawn_from or plan.sha256),
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
