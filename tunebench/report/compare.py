"""Compares the speedups of two folders of stored records, as advice: `summarize.py --compare OLD NEW`.

Rates of different series cannot be compared, since the machine changes between them. A speedup compares two runs that
stood next to each other, so that most of that change is in both.
"""

import itertools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from scipy import special

from tunebench.errors import BadInput
from tunebench.record import Record
from tunebench.report.identity import METHODS, place_of, unequal, work_of
from tunebench.report.load import load_records
from tunebench.report.markdown import NOT_AVAILABLE, measured_on
from tunebench.report.pairing import LIKE_FOR_LIKE, Joined, join_cells
from tunebench.report.rounds import versus_of
from tunebench.report.stats import PLAIN, WIDENED, is_across_zero
from tunebench.report.tables import Column, as_csv, table

ADVICE = (
    "ADVICE, no verdict: Paddle ÷ Torch of two series. Change = (1 + new speedup) ÷ (1 + old speedup) - 1, with "
    "the 95% interval of two independent means of log ratios (Welch). It cannot say which side changed. It misses "
    "much: with 5 rounds each it finds a change of 10% in 83 to 94 of 100 cases, one of 5% in 19 to 25. It holds for "
    "series that lie near each other in time. `bash run_all.sh --versus OTHER` measures both in one series."
)


# The fields of identity.work_of that say what was trained.
OF_WORK = ("plan.", "model.", "setup.", "steps", "timed_from")


@dataclass(frozen=True)
class SpeedupChange:
    """A row of the table: the speedups of one setup, like for like, in two series. Changes are shares.

    `interval` is None where one of them has a single round. `reason` says why there is no change.
    """

    family: str
    model: str
    method: str
    num_gpus: int
    batch_size: int
    setup: str
    old_speedup: float | None
    new_speedup: float | None
    change: float | None
    interval: tuple[float, float] | None
    old_rounds: int
    new_rounds: int
    reason: str | None


Key = tuple[str, str, str, int, int, str]


def compare(old: list[Record], new: list[Record]) -> list[SpeedupChange]:
    """The changes of all rows that are like for like, also of those that one series alone has."""
    both = [_rows(records) for records in (old, new)]
    return [_change(key, *(rows.get(key, []) for rows in both)) for key in sorted({*both[0], *both[1]}, key=_place)]


def welch(old: Sequence[float], new: Sequence[float], quantile: float = PLAIN) -> tuple[float, float]:
    """The interval of the difference of two means of log ratios, new - old, of two or more each (B. L. Welch, 1947)."""
    errors = [statistics.variance(ratios) / len(ratios) for ratios in (old, new)]
    difference, error = statistics.fmean(new) - statistics.fmean(old), math.sqrt(sum(errors))
    if error == 0:
        return difference, difference
    freedom = sum(errors) ** 2 / sum(e**2 / (len(r) - 1) for e, r in zip(errors, (old, new), strict=True))
    margin = float(special.stdtrit(freedom, quantile)) * error
    return difference - margin, difference + margin


def _rows(records: list[Record]) -> dict[Key, list[Joined]]:
    found: dict[Key, list[Joined]] = defaultdict(list)
    for joined in join_cells(records):
        row = joined.row
        if row.compared == LIKE_FOR_LIKE and row.paddle_setup:
            key = row.family, row.model, row.method, row.num_gpus, row.batch_size, row.paddle_setup
            found[key].append(joined)
    return found


def _other_work(old: Joined, new: Joined) -> list[str]:
    """The fields of data, model and steps in which two rows differ. Those of the machine and of the code may differ."""
    works = [
        {name: value for name, value in work_of(joined.paddle.first).items() if name.startswith(OF_WORK)}
        for joined in (old, new)
        if joined.paddle
    ]
    return unequal(*works)


def _place(key: Key) -> tuple:
    return place_of(key[:5]), key[5]


def _change(key: Key, old: list[Joined], new: list[Joined]) -> SpeedupChange:
    def made(
        change: float | None = None, interval: tuple[float, float] | None = None, reason: str | None = None
    ) -> SpeedupChange:
        return SpeedupChange(
            *key,
            old_speedup=old[0].row.speedup if len(old) == 1 else None,
            new_speedup=new[0].row.speedup if len(new) == 1 else None,
            change=change,
            interval=interval,
            old_rounds=sum(joined.row.rounds for joined in old),
            new_rounds=sum(joined.row.rounds for joined in new),
            reason=reason,
        )

    for side, rows in (("OLD", old), ("NEW", new)):
        if not rows:
            return made(reason=f"only in {'NEW' if side == 'OLD' else 'OLD'}")
        if len(rows) > 1:
            return made(reason=f"{side} has {len(rows)} such rows, such as of several commits: name a folder of one")
        if rows[0].row.speedup is None:
            return made(reason=f"no speedup in {side}: {rows[0].row.refusal or 'no complete round'}")
    if fields := _other_work(old[0], new[0]):
        return made(reason=f"OLD and NEW are not the same work: {'; '.join(fields)}")
    before, after = old[0].row.log_ratios, new[0].row.log_ratios
    change = math.expm1(statistics.fmean(after) - statistics.fmean(before))
    if min(len(before), len(after)) < 2:
        return made(change)
    low, high = welch(before, after, WIDENED if old[0].row.until or new[0].row.until else PLAIN)
    return made(change, (math.expm1(low), math.expm1(high)))


COLUMNS = [
    Column("Model", lambda row: row.model),
    Column("Method", lambda row: METHODS[row.method]),
    Column("Num GPUs", lambda row: str(row.num_gpus)),
    Column("Batch Size", lambda row: str(row.batch_size)),
    Column("Setup", lambda row: row.setup),
    Column("Old Speedup", lambda row: _share(row.old_speedup)),
    Column("New Speedup", lambda row: _share(row.new_speedup)),
    Column("Change", lambda row: _share(row.change)),
    Column("95% Interval", lambda row: _interval(row)),
    Column("Rounds", lambda row: f"{row.old_rounds}, {row.new_rounds}"),
    Column("Advice", lambda row: _advice(row)),
]


def render_comparison(paths: Sequence[Path], form: str) -> tuple[str, list[str]]:
    """The table of two folders, OLD and NEW, as `md`, `csv` or `json`, and a line for each broken record.

    Raises `BadInput` where a comparison makes no sense.
    """
    if paths[0].resolve() == paths[1].resolve():
        raise BadInput(f"--compare {paths[0]} with itself says nothing; name the folders of two series")
    loaded = [load_records([path]) for path in paths]
    for path, (records, _) in zip(paths, loaded, strict=True):
        if not records:
            raise BadInput(f"--compare: {path} has no records; name a folder such as results/quick")
        if any(map(versus_of, records)):
            raise BadInput(f"--compare: {path} has runs of --versus, old and new; print it by: summarize.py {path}")
    old, new = (records for records, _ in loaded)
    machines = [{_machine(record) for record in records} for records in (old, new)]
    if not machines[0] & machines[1]:
        said = " and ".join("; ".join(sorted(" x ".join(map(str, each)) for each in kinds)) for kinds in machines)
        raise BadInput(f"--compare: speedups of different kinds of machines say nothing of the code: {said}")
    rows = compare(old, new)
    if not any(row.change is not None for row in rows):
        why = next((f" ({row.reason})" for row in rows if row.reason), "")
        raise BadInput(f"--compare: no row of {paths[0]} and {paths[1]} can be compared{why}; name series of one suite")
    broken = [line for _, lines in loaded for line in lines]
    if form == "json":
        return json.dumps([asdict(row) for row in rows], indent=1), broken
    if form == "csv":
        return as_csv(COLUMNS, rows), broken
    parts = ["### Speedups of two series, old and new: advice\n"]
    parts += [f"{name}: {measured_on(records)}\n" for name, records in (("Old", old), ("New", new))]
    count = sum(row.change is not None for row in rows)
    parts += [table(COLUMNS, rows) + "\n", ADVICE + "\n", f"{count} row(s) compared, {len(rows) - count} not."]
    return "\n".join(parts), broken


def _machine(record: Record) -> tuple[str | int, ...]:
    hardware = record.hardware
    gpus = ", ".join(
        f"{len(list(same))} {name}" for name, same in itertools.groupby(gpu.name for gpu in hardware.accelerators)
    )
    return hardware.cores, hardware.cpu, gpus or "no GPU"


def _advice(row: SpeedupChange) -> str:
    if row.change is None:
        return row.reason or NOT_AVAILABLE
    if row.interval is None:
        return "one round: a look"
    if is_across_zero(row.interval):
        return "not told apart"
    return f"look at it: Paddle {'gained on' if row.change > 0 else 'lost to'} Torch"


def _share(share: float | None) -> str:
    return NOT_AVAILABLE if share is None else f"{share:+.1%}"


def _interval(row: SpeedupChange) -> str:
    return "{:+.1%} to {:+.1%}".format(*row.interval) if row.interval else NOT_AVAILABLE
