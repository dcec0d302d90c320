"""Runs of another library of models in the tables: real records, of which copies name PaddleFormers' package."""

import csv
import io
import json
from dataclasses import replace

import pytest
from conftest import ROOT

from tunebench.frameworks import other_library
from tunebench.record import parse_record
from tunebench.report.load import load_records
from tunebench.report.memory import memory_rows
from tunebench.report.pairing import BEST_OF_EACH, join
from tunebench.report.regressions import render_regressions


def on_paddleformers(record, **changes):
    """The record as if it had PaddleFormers in place of PaddleNLP."""
    versions = {name: version for name, version in record.versions.items() if name != "paddlenlp"}
    return record.model_copy(update={"versions": versions | {"paddleformers": "1.2.0"}} | changes)


@pytest.fixture(scope="module")
def records():
    return [parse_record(line) for line in (ROOT / "tests" / "data" / "quick.jsonl").read_bytes().splitlines()]


def test_paddlenlp_is_taken_where_both_are_installed():
    assert other_library({"paddleformers": "1.2.0"}) == "PaddleFormers"
    assert other_library({"paddlenlp": "3.0.0b4"}) is None
    assert other_library({"paddleformers": "1.2.0", "paddlenlp": "3.0.0b4"}) is None


def test_each_library_has_a_row_of_its_own_beside_the_same_runs_of_torch(records):
    theirs = [on_paddleformers(record) for record in records if record.framework == "paddle"]
    alone, both = join(records), join([*theirs, *records])
    assert len(alone) == 4
    assert [row for row in both if "PaddleFormers" not in row.paddle_setup] == alone
    formers = [row for row in both if "PaddleFormers" in row.paddle_setup]
    assert formers == [replace(row, paddle_setup=f"{row.paddle_setup}, PaddleFormers") for row in alone]


def test_the_best_of_each_is_of_one_library(records):
    """PaddleFormers is twice as fast in a second setup. PaddleNLP's rows do not change by it."""
    theirs = [
        on_paddleformers(
            record,
            setup=record.setup.model_copy(update={"keep_memory": True}),
            steps=record.steps.model_copy(update={"seconds": [each / 2 for each in record.steps.seconds]}),
        )
        for record in records
        if record.framework == "paddle"
    ]
    alone, both = join(records), join([*records, *theirs])
    assert [row for row in both if "PaddleFormers" not in row.paddle_setup] == alone
    best = [row for row in both if row.compared == BEST_OF_EACH]
    assert [row.paddle_setup for row in best] == ["memory kept, fp32, PaddleFormers"] * len(alone)
    assert not any("runner-up" in (row.note or "") for row in best)


def test_peaks_of_memory_name_the_library(records):
    ours = next(record for record in records if record.framework == "paddle")
    assert [row.setup for row in memory_rows([ours, on_paddleformers(ours)])] == ["fp32", "fp32, PaddleFormers"]


def test_csv_and_json_name_the_packages_of_each_side():
    kept, _ = load_records([ROOT / "results" / "measured" / "20261130-epyc-2-cores" / "versus-paddleformers-of-quick"])
    old, new = (
        f"{library}, paddlepaddle 3.3.1, revision 64d93a954d"
        for library in ("paddleformers 1.2.0", "paddlenlp 3.0.0b4")
    )
    rows = list(csv.DictReader(io.StringIO(render_regressions(kept, "csv"))))
    assert [(row["Old Code"], row["New Code"]) for row in rows] == [(old, new)] * 2
    rows = json.loads(render_regressions(kept, "json"))
    assert [(row["old_code"], row["new_code"]) for row in rows] == [(old, new)] * 2
