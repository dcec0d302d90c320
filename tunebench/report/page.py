"""A whole report: all tables of some records."""

from pathlib import Path

from tunebench.record import Record
from tunebench.report.load import load_records
from tunebench.report.pairing import join
from tunebench.report.peers import render_peers
from tunebench.report.tables import render


def print_tables(paths: list[Path]) -> None:
    """Prints the Markdown tables of the records under `paths`, and names the broken ones."""
    records, broken = load_records(paths)
    for fault in broken:
        print(f"skipped {fault}")
    if records:
        print(combined(records), flush=True)


def combined(records: list[Record], parity: bool = False) -> str:
    """All tables of these records as Markdown. Peers have their own."""
    ours = [record for record in records if record.peer is None]
    pairs = [render(join(ours), "md", ours, parity)] if ours else []
    return "\n\n".join(filter(None, [*pairs, render_peers(records)]))
