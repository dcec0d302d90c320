"""The tables of other trainers, from kept records."""

import pytest
from conftest import ROOT

from tunebench.report.load import load_records
from tunebench.report.peers import peer_tables


@pytest.fixture(scope="module")
def kept():
    records, _ = load_records([ROOT / "results" / "measured" / "20261201-epyc-2-cores" / "peers"])
    return records


def test_a_table_names_its_number_of_samples(kept):
    more, _ = load_records([ROOT / "results" / "measured" / "20261130-epyc-2-cores" / "peers-grouped"])
    headings = [table.heading for table in peer_tables([*kept, *more]) if table.framework == "torch"]
    assert sorted(headings) == [
        f"Torch, llama-65b-tiny, {method}, {samples} samples: beside other trainers"
        for method in ("Finetune", "LoRA")
        for samples in ("1,600", "96")
    ]


@pytest.mark.parametrize("without", ["no record", "failed"])
def test_ratios_are_to_the_first_trainer_that_has_a_rate(kept, without):
    """The framework's own Trainer as it comes; without it, the next one of the list. The column names it."""
    changes = {"no record": None, "failed": {"status": "failed", "reason": "it stopped", "steps": None}}
    theirs = [record for record in kept if record.peer == "hf-trainer"]
    rest = [record for record in kept if record.peer != "hf-trainer"]
    failed = [record.model_copy(update=changes[without]) for record in theirs if changes[without]]
    for records, first in (kept, "hf-trainer"), ([*rest, *failed], "hf-trainer-grouped"):
        tables = peer_tables(records)
        bases = {"torch": first, "paddle": "paddlenlp-trainer"}
        assert {table.framework for table in tables} == set(bases)
        for table in tables:
            base = bases[table.framework]
            ratio = table.columns.index(f"÷ {base}")
            assert {line[0]: line[ratio] for line in table.lines}[base] == "1.00"
