"""The table of memory: predicted and measured peaks of real records, some of them edited to be of GPUs."""

import csv
import io
import json

import pytest
from conftest import ROOT, refusal, run_program

from tunebench.flags import parse_flags
from tunebench.forecast.formula import predict
from tunebench.models.checkpoint import find_checkpoint
from tunebench.plan import load_plan
from tunebench.record import Record, parse_record, read_record
from tunebench.report.memory import MEMORY_COLUMNS, memory_rows, render_memory
from tunebench.run import run as runs
from tunebench.world import ALONE


@pytest.fixture(scope="module")
def quick() -> list[Record]:
    """Two rounds of four pairs on a CPU, written before records had a prediction."""
    return [parse_record(line) for line in (ROOT / "tests" / "data" / "quick.jsonl").read_bytes().splitlines()]


def on_gpus(record: Record, peaks: list[int], predicted: int | None) -> Record:
    """A record as a run on GPUs would have written it, with these peaks of its processes."""
    hardware = record.hardware.model_copy(update={"device": "NVIDIA H200"})
    update = {"hardware": hardware, "peak_memory_bytes": peaks, "predicted_peak_memory_bytes": predicted}
    return record.model_copy(update=update)


def one_side(records: list[Record]) -> list[Record]:
    """The two rounds of Torch's llama-tiny with LoRA."""
    found = [r for r in records if (r.framework, r.model.name, r.method) == ("torch", "llama-tiny", "lora")]
    assert len(found) == 2
    return found


def ended(record: Record, status: str) -> Record:
    """A record as a run with this end would have written it."""
    update = {"status": status, "reason": "no room", "steps": None, "peak_memory_bytes": []}
    return record.model_copy(update=update)


def test_older_records_have_measured_peaks_alone(quick):
    rows = memory_rows(quick)
    assert [(row.method, row.framework) for row in rows[:4]] == [
        *(("lora", "paddle"), ("lora", "torch"), ("full", "paddle"), ("full", "torch"))
    ]
    assert len(rows) == 8
    for row in rows:
        rounds = [r for r in quick if (r.framework, r.method, r.model.name) == (row.framework, row.method, row.model)]
        assert row.measured_peak_memory_bytes == max(r.peak_memory_bytes[0] for r in rounds)
        assert (row.predicted_peak_memory_bytes, row.error) == (None, None)
        assert (row.counter, row.refusal) == ("resident memory", "none: no prediction")


def test_a_process_on_a_cpu_is_not_compared_with_tensors_on_a_gpu(quick):
    (row,) = memory_rows([r.model_copy(update={"predicted_peak_memory_bytes": 10**9}) for r in one_side(quick)])
    assert (row.predicted_peak_memory_bytes, row.counter) == (10**9, "resident memory")
    assert (row.error, row.refusal) == (None, "none: other counters")


def test_the_error_is_that_of_the_run_with_the_largest_peak(quick):
    first, second = one_side(quick)
    records = [on_gpus(first, [9 * 10**9, 10**10], 11 * 10**9), on_gpus(second, [8 * 10**9], 4 * 10**9)]
    (row,) = memory_rows(records)
    assert (row.measured_peak_memory_bytes, row.predicted_peak_memory_bytes) == (10**10, 11 * 10**9)
    assert (row.counter, row.refusal) == ("max_memory_allocated", None)
    assert row.error == pytest.approx(0.1)
    assert " | 11.00             | 10.00            | max_memory_allocated | +10.0% |" in render_memory(records, "md")


@pytest.mark.parametrize(("status", "said"), [("oom", "out of memory"), ("failed", "failed")])
def test_a_run_that_ended_otherwise_shows_its_prediction(quick, status, said):
    record = ended(on_gpus(one_side(quick)[0], [], 150 * 10**9), status)
    (line,) = csv.DictReader(io.StringIO(render_memory([record], "csv")))
    assert (line["Predicted Peak GB"], line["Measured Peak GB"]) == ("150.00", said)
    assert (line["Counter"], line["Error"], line["Note"]) == ("N/A", "N/A", f"torch {status}: no room")


def test_rows_with_equal_headings_are_told_apart(quick):
    first, second = one_side(quick)
    other = second.model_copy(update={"versions": second.versions | {"torch": "2.0.0"}})
    notes = [row.note for row in memory_rows([first, other])]
    assert any("torch 2.0.0" in note for note in notes)
    assert notes[0] != notes[1]


def test_peers_have_no_row(quick):
    assert memory_rows([record.model_copy(update={"peer": "hf-trainer"}) for record in quick]) == []


class TestProgram:
    @pytest.fixture
    def folder(self, quick, tmp_path):
        """The records of a CPU, and two edited ones: on a GPU, and out of memory there."""
        done, short = one_side(quick)
        setup = short.setup.model_copy(update={"bsz": 64, "micro_bsz": 64})
        short = ended(on_gpus(short, [], 3 * 10**11), "oom").model_copy(update={"setup": setup})
        for i, record in enumerate([*quick, on_gpus(done, [2 * 10**9], 10**9), short]):
            record.write(tmp_path / f"{i}.json")
        return tmp_path

    def test_one_table_in_each_form(self, folder):
        text, lines, rows = (
            run_program("summarize.py", folder, "--memory", "--format", form, check=True).stdout
            for form in ("md", "csv", "json")
        )
        assert text.index("### Bloom: peaks of memory") < text.index("### Llama: peaks of memory")
        assert "Speedup" not in text
        lines, rows = list(csv.DictReader(io.StringIO(lines))), json.loads(rows)
        assert list(lines[0]) == ["Family", *(column.title for column in MEMORY_COLUMNS), "Note"]
        assert len(lines) == len(rows) == 10
        assert [row["error"] for row in rows if row["error"] is not None] == [-0.5]
        assert [row["predicted_peak_memory_bytes"] for row in rows if row["status"] == "oom"] == [3 * 10**11]
        for line in lines:
            for cell in (line["Measured Peak GB"], line["Error"]):
                assert f"| {cell} " in text
        assert [line["Error"] for line in lines].count("-50.0%") == 1

    def test_without_records(self, tmp_path):
        for paths in ([tmp_path], [ROOT / "results" / "published"]):
            assert "no records in" in run_program("summarize.py", *paths, "--memory", check=True).stdout

    @pytest.mark.parametrize("other", ["--parity", "--against=published", "--pack=results/cpu", "--docs"])
    def test_options_of_other_tables_are_refused(self, folder, other):
        said = refusal(run_program("summarize.py", folder, "--memory", other))
        assert said == f"summarize.py: --memory prints a table of its own; leave {other.split('=')[0]} out"


@pytest.fixture
def job(tmp_path):
    """A short run's job."""
    flags = ["--model=llama-tiny", "--bsz=2", "--samples=10", "--steps=2", f"--out={tmp_path / 'r.json'}"]
    flags = parse_flags("full", flags, framework="torch")
    checkpoint = find_checkpoint("llama-tiny", "random", 0)
    return runs.Job(flags, checkpoint, load_plan(flags, checkpoint), ALONE)


@pytest.mark.parametrize("status", ["oom", "failed", "unsupported"])
def test_every_end_of_a_run_leaves_the_prediction(job, status):
    """But where the framework does not offer the run."""
    runs.Run("torch", "full", job).fail(status, "no room")
    memory = predict("torch", "full", job.flags, job.checkpoint, job.plan)
    record = read_record(job.flags.out)
    assert record.predicted_peak_memory_bytes == (None if status == "unsupported" else memory.peak)


def test_a_formula_that_fails_ends_no_run(job, monkeypatch, capsys):
    monkeypatch.setattr(runs, "predict", lambda *_: 1 // 0)
    runs.Run("torch", "full", job).fail("oom", "no room")
    record = read_record(job.flags.out)
    assert (record.status, record.predicted_peak_memory_bytes) == ("oom", None)
    assert "warning: the peak of memory cannot be predicted: ZeroDivisionError" in capsys.readouterr().out
