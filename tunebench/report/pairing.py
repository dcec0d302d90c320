"""Pairs the runs of both sides into the rows of tables, and the A/A runs of one side."""

import itertools
import math
import operator
import statistics
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from tunebench.record import Record
from tunebench.report.cells import Cell, cells_of, disturbed_by
from tunebench.report.identity import differences, group_of, place_of
from tunebench.report.load import without_collector
from tunebench.report.parity import disagreement
from tunebench.report.remarks import on_what, remarks_of_rounds, remarks_of_side, runner_up
from tunebench.report.rounds import (
    APART,
    RUNS_APART,
    Near,
    Rounds,
    beside,
    in_one_series,
    minutes_apart,
    pair_rounds,
    versus_of,
)
from tunebench.report.stats import Noise, pooled_noise, rounds_to_tell, spread

LIKE_FOR_LIKE, BEST_OF_EACH = "like for like", "best of each"
MINUTES_APART = 2  # from here on a row says how far apart its sides ran
SIDES = ("paddle", "torch")  # the sides of a row; the speedup is the first ÷ the second - 1


@dataclass(frozen=True)
class Row:
    """One row of a table. Rates are in effective tokens/s of the whole job. `speedup` is Paddle ÷ Torch − 1.

    - `num_gpus`: processes, where there are no GPUs.
    - `…_status`: how a side ended. `…_spread`: the standard deviation of its runs' log rates, None with one run.
      `…_disturbance`: the largest share of a core or a GPU that others took during one of its runs.
    - `refusal`: why a pair has no speedup, in a few words. `note` has the differing fields and other remarks.
    - `rounds`: the complete rounds. Rates and speedup come from these where there are some. `dropped`: the others.
    - `interval`: the 95% interval of the speedup, None with one round. `round_noise`: the standard deviation of the
      rounds' log ratios. `noise`: what a difference of this many rounds is worth by the machine's A/A runs.
    - `until`: the target by which --until chose the number of rounds. `rounds_for_5`: the rounds that would tell a true
      difference of 5% (`rounds_to_tell`), by the row's own round noise, with one round by the machine's A/A runs.
    - `compared`: whether both sides have the same setup, or each its fastest one; None for a single side.
    - `parity`, `parity_first`, `parity_norm`: the largest relative difference of the loss curves at any step, of the
      first loss, and of the gradient norms.
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
    log_ratios: tuple[float, ...] = ()
    until: float | None = None
    rounds_for_5: int | None = None
    paddle_disturbance: float | None = None
    torch_disturbance: float | None = None


@dataclass(frozen=True)
class SelfComparison:
    """A side against itself (A/A). `difference` is b ÷ a − 1 with its 95% interval. Only noise moves it from 0.

    `log_ratios` has a value for each complete round. `dropped` counts the other rounds.
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


class Joined(NamedTuple):
    """A row, the cells of its two sides, and the complete rounds that its figures come from."""

    row: Row
    paddle: Cell | None
    torch: Cell | None
    rounds: Rounds


class Comparison(NamedTuple):
    """The rounds of two cells, and why they have no ratio, in a few words and in full; None where they have one."""

    rounds: Rounds
    refusal: str | None
    note: str | None


class Parity(NamedTuple):
    """The fields of `Row` that say how far apart the curves of two sides are."""

    parity: float | None = None
    parity_first: float | None = None
    parity_norm: float | None = None


def join(records: list[Record]) -> list[Row]:
    """The rows: like for like first, then the best of each side, then the remaining runs.

    It leaves out A/A runs, peers and the runs of --versus.
    """
    return [joined.row for joined in join_cells(records)]


@without_collector()
def join_cells(records: list[Record]) -> list[Joined]:
    """The rows of `join`, each with what it was made of."""
    groups: dict[tuple[Any, ...], dict[str, list[Record]]] = {}
    for record in records:
        if record.aa is None and record.peer is None and record.framework in SIDES and not versus_of(record):
            groups.setdefault(group_of(record), {side: [] for side in SIDES})[record.framework].append(record)
    rows = []
    near, noises = in_one_series(records), noise_by_machine(against_itself(records))
    for group in sorted(groups, key=place_of):
        cells = {framework: cells_of(members) for framework, members in groups[group].items()}
        same_work = {framework: _by(members, "work") for framework, members in cells.items()}
        pairs = _pairs(**cells, near=near)
        members = [[cell for cell in pair if cell] for _, *pair in pairs]
        headings = [(pair[0] == BEST_OF_EACH, sides[0].heading) for pair, sides in zip(pairs, members, strict=True)]
        counts = Counter(headings)
        for (compared, paddle, torch), sides, heading in zip(pairs, members, headings, strict=True):
            row, rounds = _row(group, compared, paddle, torch, told_apart=counts[heading] > 1, near=near)
            noise = noises.get(sides[0].first.hardware.place)
            # A/A runs are next to each other. The sides of a row "best of each" are not, so their noise is unknown.
            if compared == BEST_OF_EACH:
                lines = [
                    row.note,
                    *(runner_up(cell, same_work[cell.first.framework][cell.work], near) for cell in sides),
                ]
                row = replace(row, note="; ".join(filter(None, lines)) or None)
            elif noise and row.rounds:
                row = replace(row, noise=noise.worth(row.rounds))
                if row.rounds == 1 and row.speedup is not None:
                    row = replace(row, rounds_for_5=rounds_to_tell(noise.deviation))
            rows.append(Joined(row, paddle, torch, rounds))
    return rows


def compare(ours: Cell, theirs: Cell, near: Near) -> Comparison:
    """The rounds of two cells with rates, in which both did the same work within one series of measurement."""
    if ours.work != theirs.work:
        refusal = "not the same work"
        return Comparison(Rounds([], 0), refusal, f"{refusal}: {'; '.join(differences(ours.first, theirs.first))}")
    rounds = pair_rounds(ours.records, theirs.records, near)
    return Comparison(rounds, *_refusal(ours, theirs, rounds))


def against_itself(records: list[Record]) -> list[SelfComparison]:
    """The A/A comparisons of each side that have both halves."""
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in records:
        if record.aa is not None:
            groups[(*group_of(record), record.framework)].append(record)
    found = []
    for group in sorted(groups, key=place_of):
        for cell in cells_of(groups[group]):
            a, b = ([r for r in cell.records if r.aa == side and r.status == "ok"] for side in ("a", "b"))
            rounds = pair_rounds(b, a, beside)
            if rounds.pairs:
                ratios = rounds.log_ratios
                family, model, method, devices, bsz, framework = group
                found.append(
                    SelfComparison(
                        family=family,
                        model=model,
                        method=method,
                        num_gpus=devices,
                        batch_size=bsz,
                        framework=framework,
                        setup=cell.heading,
                        machine=cell.first.hardware.place,
                        log_ratios=ratios,
                        dropped=rounds.dropped,
                        difference=math.expm1(statistics.fmean(ratios)),
                        interval=rounds.interval,
                        disturbed=cell.disturbed,
                    )
                )
    return found


def noise_by_machine(comparisons: list[SelfComparison]) -> dict[str, Noise]:
    """Each machine's noise, from its undisturbed A/A comparisons."""
    rows: dict[str, list[list[float]]] = defaultdict(list)
    for each in comparisons:
        if not each.disturbed:
            rows[each.machine].append(each.log_ratios)
    found = {machine: pooled_noise(ratios) for machine, ratios in rows.items()}
    return {machine: noise for machine, noise in found.items() if noise}


def _pairs(paddle: list[Cell], torch: list[Cell], near: Near) -> list[tuple[str | None, Cell | None, Cell | None]]:
    """The cells of each row with the kind of row: like for like, the best of each on the same work, then the rest.

    A cell of the rest stands alone, or beside the other side's cell of the same setup or of another precision. Where
    others disturbed all runs of a side, a disturbed cell counts as its best.
    """
    ours, theirs = (sorted(cells, key=lambda cell: -(cell.rate or 0.0)) for cells in (paddle, torch))
    pairs: list[tuple[str | None, Cell | None, Cell | None]] = []
    timed = [cell for cell in theirs if cell.rate]
    same_work = _by(timed, "work")
    # Each library of a framework has its own pairs with the other side's cells.
    alike = {library: _by(timed, "work", "setup") for library in {cell.library for cell in ours}}
    like: list[tuple[Cell, Cell]] = []
    best: dict[tuple[str | None, str], tuple[Cell, Cell]] = {}
    for a in (cell for cell in ours if cell.rate):
        if waiting := alike[a.library][a.work, a.setup]:
            like.append((a, waiting.popleft()))
    for a in sorted((cell for cell in ours if cell.rate), key=lambda cell: cell.wholly_disturbed):
        if (a.library, a.work) not in best:
            # Cells are sorted by rate, so that the first ones of the same work are the best. Disturbed ones come last.
            calm = sorted(same_work[a.work], key=lambda cell: cell.wholly_disturbed)
            b = next((b for b in calm if _is_one_training(a, b, near)), None)
            if b:
                best[a.library, a.work] = a, b
    pairs += [
        (LIKE_FOR_LIKE, a, b) for a, b in sorted(like, key=lambda pair: (pair[0].library or "", _order(pair[0].first)))
    ]
    pairs += [(BEST_OF_EACH, a, b) for a, b in best.values() if a.setup != b.setup]
    shown = {id(cell) for _, *pair in pairs for cell in pair}
    same_setup, same_split = _by(theirs, "setup"), _by(theirs, "split")
    for a in ours:
        if id(a) not in shown:
            b = _take(same_setup[a.setup], shown) or _take(same_split[a.split], shown)
            pairs.append((LIKE_FOR_LIKE if b and a.setup == b.setup else None, a, b))
    return pairs + [(None, None, b) for b in theirs if id(b) not in shown]


def _by(cells: list[Cell], *fields: str) -> dict[Any, deque[Cell]]:
    """The cells by the values of `fields`. Each queue keeps their order."""
    found: dict[Any, deque[Cell]] = defaultdict(deque)
    for cell in cells:
        found[operator.attrgetter(*fields)(cell)].append(cell)
    return found


def _take(waiting: deque[Cell], shown: set[int]) -> Cell | None:
    """Takes the first cell that is not in `shown` and adds it there; None where all are."""
    while waiting:
        cell = waiting.popleft()
        if id(cell) not in shown:
            shown.add(id(cell))
            return cell
    return None


def _order(record: Record) -> tuple[int, ...]:
    """A sort key for setups: tensor parallelism first, then the most sharded, as in the published record."""
    return -record.setup.mp, -record.setup.zero, record.setup.accumulation


def _row(
    group: tuple[Any, ...], compared: str | None, paddle: Cell | None, torch: Cell | None, told_apart: bool, near: Near
) -> tuple[Row, Rounds]:
    family, model, method, devices, bsz = group
    refusal = note = None
    rounds, parity = Rounds([], 0), Parity()
    if paddle and torch and paddle.rate and torch.rate:
        rounds, refusal, note = compare(paddle, torch, near if compared == BEST_OF_EACH else beside)
        parity = _parity(rounds)
    sides = [cell for cell in (paddle, torch) if cell]
    notes = [note, *remarks_of_rounds(rounds)]
    minutes = max(itertools.starmap(minutes_apart, rounds.pairs), default=0)
    if compared == BEST_OF_EACH and minutes > MINUTES_APART:
        notes.append(
            f"its sides ran up to {minutes:.0f} minutes apart: run both beside each other before you rely on it"
        )
    notes += [f"{cell.first.framework} {remark}" for cell in sides for remark in remarks_of_side(cell)]
    if any(cell.rate for cell in sides):
        unknown = [cell.first.framework for cell in sides if any(r.conditions is None for r in cell.records)]
        notes += [f"conditions not recorded ({' and '.join(unknown)})"] * bool(unknown)
    notes += [on_what(cell.first) for cell in sides if cell.rate and told_apart][:1]
    ratios = rounds.log_ratios
    round_noise = rounds.deviation
    row = Row(
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
        round_noise=round_noise,
        log_ratios=tuple(ratios),
        until=rounds.until,
        rounds_for_5=rounds_to_tell(round_noise) if round_noise is not None and not refusal else None,
        **parity._asdict(),
    )
    return row, rounds


def _refusal(paddle: Cell, torch: Cell, rounds: Rounds) -> tuple[str | None, str | None]:
    """Why two cells of the same work have no speedup, in a few words and in full. None where they have one."""
    sides = zip(*rounds.pairs, strict=True) if rounds.pairs else [cell.records for cell in (paddle, torch)]
    disturbed = "; ".join(filter(None, map(disturbed_by, sides))) if paddle.disturbed or torch.disturbed else ""
    if not rounds.pairs and not disturbed:
        plans = [{record.plan.sha256 for record in cell.records if record.plan} for cell in (paddle, torch)]
        if not plans[0] & plans[1]:
            ours, theirs = (min(plan)[:12] for plan in plans)
            return "not the same work", f"not the same work: plan.sha256: {ours} ≠ {theirs}"
        return "no complete round", (
            f"no complete round: the two sides of each started more than {APART / 60:g} minutes and {RUNS_APART} runs "
            "apart; run them beside each other"
        )
    faults = (disagreement(*pair, apart) for pair, apart in zip(rounds.pairs, rounds.apart, strict=True))
    if fault := next(filter(None, faults), None):
        return ("models differ" if fault.startswith("model.") else "losses differ"), fault
    if disturbed:
        return (
            f"disturbed: {disturbed}",
            "disturbed rounds say nothing: run_all.sh without --anyway measures them again",
        )
    return None, None


def _parity(rounds: Rounds) -> Parity:
    """The largest relative differences between the two sides of any round."""
    if not rounds.pairs:
        return Parity()
    return Parity(
        parity=max(max(apart.loss) for apart in rounds.apart),
        parity_first=max(apart.loss[0] for apart in rounds.apart),
        parity_norm=max(max(apart.grad_norm) for apart in rounds.apart),
    )


def _is_one_training(a: Cell, b: Cell, near: Near) -> bool:
    pairs = pair_rounds(a.records, b.records, near).pairs
    return bool(pairs) and not any(itertools.starmap(disagreement, pairs))


def _side(framework: str, cell: Cell | None, rates: list[float]) -> dict[str, Any]:
    """The fields of a row for one side. `rates` are those of the complete rounds."""
    rates = rates or (cell.rates if cell else [])
    return {
        f"{framework}_setup": cell.heading if cell else None,
        f"{framework}_status": cell.first.status if cell else None,
        f"{framework}_effective_tokens_per_second": statistics.geometric_mean(rates) if rates else None,
        f"{framework}_spread": spread(rates),
        f"{framework}_runs": len(cell.records) if cell else 0,
        f"{framework}_disturbance": max(cell.shares_taken, default=None) if cell else None,
    }
