"""The tables of other trainers, from kept records."""

from conftest import ROOT

from tunebench.report.load import load_records
from tunebench.report.peers import peer_tables


def test_ratios_are_to_the_first_trainer_that_ran():
    """The framework's own Trainer as it comes; without it, the next one of the list. The column names it."""
    kept, _ = load_records([ROOT / "results" / "measured" / "20261128-epyc-2-cores" / "peers"])
    for left_out, first in (None, "hf-trainer"), ("hf-trainer", "hf-trainer-grouped"):
        tables = peer_tables([record for record in kept if record.peer != left_out])
        bases = {"torch": first, "paddle": "paddlenlp-trainer"}
        assert {table.framework for table in tables} == set(bases)
        for table in tables:
            base = bases[table.framework]
            ratio = table.columns.index(f"÷ {base}")
            assert {line[0]: line[ratio] for line in table.lines}[base] == "1.00"
