"""Records kept in the repository: complete, and without names or paths of the machine that made them."""

import pytest
from conftest import ROOT, refusal, run_program

from tunebench.record import parse_record, read_record

LINE = (ROOT / "tests" / "data" / "quick.jsonl").read_bytes().splitlines()[0]


def written(folder, **changes):
    """A real record with changes, written to a results folder as a run writes it."""
    record = parse_record(LINE)
    argv = [*record.argv[:-1], "--out=/home/somebody/results/quick/pair/paddle-r1.json"]
    record = record.model_copy(update={"argv": argv, "log": ["/home/somebody"]} | changes)
    (folder / "pair").mkdir(parents=True)
    record.write(folder / "pair" / "paddle-r1.json")
    return record


def test_a_kept_record_is_the_same_but_for_its_path_and_log(tmp_path):
    record = written(tmp_path / "results")
    done = run_program("summarize.py", tmp_path / "results", "--keep", tmp_path / "kept", check=True)
    assert "1 records copied" in done.stdout
    kept = read_record(tmp_path / "kept" / "pair" / "paddle-r1.json")
    assert kept == record.model_copy(update={"argv": [*record.argv[:-1], "--out=pair/paddle-r1.json"], "log": []})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"argv": ["finetune_full.py", "--data=/home/somebody/x.json", "--out=a.json"]},
            "--data=/home/somebody/x.json",
        ),
        ({"argv": ["finetune_full.py", "--data", "/home/somebody/x.json", "--out=a.json"]}, "/home/somebody/x.json"),
    ],
)
def test_a_record_that_names_a_folder_is_refused_in_one_line(tmp_path, changes, named):
    written(tmp_path / "results", **changes)
    line = refusal(run_program("summarize.py", tmp_path / "results", "--keep", tmp_path / "kept"))
    assert named in line
    assert not (tmp_path / "kept").exists()
