"""A whole report: all tables of some records."""

from pathlib import Path

from tunebench.record import Record
from tunebench.report.load import load_records
from tunebench.report.pairing import join
from tunebench.report.peers import render_peers
from tunebench.report.regressions import THRESHOLD, render_regressions
from tunebench.report.rounds import versus_of
from tunebench.report.tables import render


def print_tables(paths: list[Path]) -> None:
    """Prints the Markdown tables of the records under `paths`, and names the broken ones."""
    records, broken = load_records(paths)
    for fault in broken:
        print(f"skipped {fault}")
    if records:
        print(combined(records), flush=True)


def combined(records: list[Record], parity: bool = False, threshold: float = THRESHOLD) -> str:
    """All tables of these records as Markdown. Peers and the runs of --versus have their own.

    `threshold` is the least change that counts as a regression, a share.
    """
    versus = [record for record in records if versus_of(record)]
    others = [record for record in records if not versus_of(record)]
    ours = [record for record in others if record.peer is None]
    pairs = [render(join(ours), "md", ours, parity)] if ours else []
    return "\n\n".join(filter(None, [*pairs, render_peers(others), render_regressions(versus, "md", threshold)]))
