"""The tables of peers: other trainers beside this project's scripts, on the same samples."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from tunebench.frameworks import FRAMEWORKS
from tunebench.peers import PEERS
from tunebench.record import Record
from tunebench.report.cells import Cell
from tunebench.report.identity import METHODS, heading_of, model_of, rank_of
from tunebench.report.markdown import figure, markdown, measured_on
from tunebench.report.rounds import Near, Rounds, in_one_series, round_of, turn
from tunebench.report.stats import spread
from tunebench.report.tables import NOT_AVAILABLE

COLUMNS = ("What", "Effective Tokens/s", "Spread", "Of Its Input Real", "MFU", "÷ {}", "95% Interval", "Rounds")
CAVEAT = (
    "Ratios to the trainer that the column names, by rounds that alternate, each within one series of runs. The tokens "
    "of every row were counted by us, from what the model was given. MFU: useful operations ÷ what the framework's own "
    "matrix product does, the median of those timed in our runs here."
)


class PeerTable(NamedTuple):
    """The trainers of one framework, model, method and number of samples.

    Columns, lines of texts, the runs, and remarks on disturbed ones.
    """

    framework: str
    model: str
    method: str
    samples: int | None
    columns: list[str]
    lines: list[list[str]]
    members: list[Record]
    remarks: list[str]

    @property
    def heading(self) -> str:
        """The words above the table."""
        of = f"{FRAMEWORKS[self.framework].title}, {self.model}, {METHODS[self.method]}"
        return f"{of}{f', {self.samples:,} samples' if self.samples else ''}: beside other trainers"


def peer_tables(records: list[Record]) -> list[PeerTable]:
    """A table for each framework, model, method and number of samples of a peer."""
    near = in_one_series(records)
    tables = []
    for about, samples, members in sorted(_groups(records), key=lambda group: _place(group[0])):
        framework, _, model, method = about
        baseline = _baseline(framework, members)
        columns = [column.format(baseline) for column in COLUMNS]
        remarks = [
            f"{record.peer or 'ours'} was disturbed, and left out: {record.disturbance[1]}"
            for record in members
            if record.disturbance and record.disturbed
        ]
        lines = _lines(members, baseline, near)
        tables.append(PeerTable(framework, model, method, samples, columns, lines, members, remarks))
    return tables


def render_peers(records: list[Record]) -> str:
    """The tables of peers as Markdown; empty without peers."""
    parts = []
    for each in peer_tables(records):
        parts += [f"### {each.heading}\n", measured_on(each.members) + "\n"]
        parts += [markdown(each.columns, each.lines) + "\n", *(f"{remark}\n" for remark in each.remarks)]
    return "\n".join([*parts, CAVEAT]) if parts else ""


def _groups(records: list[Record]) -> Iterator[tuple[tuple[str, str, str, str], int | None, list[Record]]]:
    """The runs of peers, together with the scripts' runs of the same model, samples, machine and commit.

    What they are of, their number of samples, and they.
    """
    groups: dict[tuple, list[Record]] = defaultdict(list)
    for record in records:
        if record.aa is None:
            about = record.framework, *model_of(record), record.method
            groups[(about, record.hardware.place, record.git.revision, record.plan and record.plan.samples)].append(
                record
            )
    for (about, *_, samples), members in groups.items():
        if any(record.peer for record in members):
            yield about, samples, members


def _baseline(framework: str, members: list[Record]) -> str:
    """The trainer to which ratios are: the framework's own as it comes, or where it has no rate, the first that has."""
    own = FRAMEWORKS[framework].trainer
    rated = {record.peer for record in members if record.status == "ok" and not record.disturbed}
    return next((name for name in (own, *PEERS) if name in rated), own)


def _place(about: tuple[str, str, str, str]) -> tuple:
    framework, _, model, method = about
    return framework != "torch", rank_of(model), list(METHODS).index(method)


def _lines(members: list[Record], baseline: str, near: Near) -> list[list[str]]:
    rows: dict[str, list[Record]] = defaultdict(list)
    for record in members:
        rows[record.peer or f"ours: {heading_of(record)}"].append(record)
    cells = {
        name: Cell(sorted((r for r in runs if r.status == "ok" and not r.disturbed), key=turn))
        for name, runs in rows.items()
    }
    peaks = [sum(r.matmul_flops) for r in members if r.matmul_flops]
    peak = statistics.median(peaks) if peaks else None
    base = cells.get(baseline, Cell([]))
    lines = []
    for name, cell in sorted(cells.items(), key=lambda item: item[1].rate or 0.0):
        if not cell.records:
            lines.append(
                [
                    name,
                    figure(None, "disturbed" if rows[name][0].disturbed else rows[name][0].status),
                    *[NOT_AVAILABLE] * (len(COLUMNS) - 2),
                ]
            )
            continue
        by_round = [{round_of(record): record for record in each.records} for each in (cell, base)]
        both = [(by_round[0][n], by_round[1][n]) for n in sorted(by_round[0].keys() & by_round[1].keys())]
        rounds = Rounds([pair for pair in both if near(*pair)], 0)
        ratio = math.exp(statistics.fmean(rounds.log_ratios)) if rounds.pairs else None
        first, spread_of = cell.first.steps, spread(cell.rates)
        used = [share for record in cell.records if (share := record.mfu(peak)) is not None]
        mfu = statistics.median(used) if len(used) == len(cell.records) else None
        assert first is not None
        lines.append(
            [
                name,
                f"{cell.rate:.0f}",
                NOT_AVAILABLE if spread_of is None else f"{spread_of:.1%}",
                f"{sum(first.effective_tokens) / sum(first.padded_tokens):.0%}",
                NOT_AVAILABLE if mfu is None else f"{mfu:.2f}",
                NOT_AVAILABLE if ratio is None else f"{ratio:.2f}",
                NOT_AVAILABLE
                if rounds.interval is None
                else "{:.2f} to {:.2f}".format(*(1 + end for end in rounds.interval)),
                str(len(cell.records)),
            ]
        )
    return lines
