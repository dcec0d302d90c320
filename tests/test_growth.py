"""The benchmark of growth at its smallest: tables of numbers, and a join with as many rows as its records make."""

import math
import os

import pytest
from conftest import refusal, run_program

from tunebench.report.growth import read_growth

QUICK = "benchmarks/growth.py", "--quick", "--only"


def table(text: str) -> list[dict[str, str]]:
    """The lines of the only table in a text, by column; of columns with the same name, the last."""
    header, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line)
    return [dict(zip(header, line, strict=True)) for line in lines]


@pytest.mark.frameworks
def test_joins_of_two_sizes_have_the_rows_of_their_records():
    lines = table(run_program(*QUICK, "records", check=True).stdout)
    assert [(line["Shape"], line["Records"], line["Rows"]) for line in lines if line["Records"] != "exponent"] == [
        *(("many rounds", "100", "4"), ("many rounds", "400", "4")),
        # A row for each pair of two rounds, and one for each commit with several setups: the best of each.
        *(("many cells in one group", "100", "29"), ("many cells in one group", "400", "117")),
        # Pairs of three rounds; work is told apart by four kinds of training and by batch size.
        *(("many groups", "100", "21"), ("many groups", "400", "79")),
    ]
    exponents = [line for line in lines if line["Records"] == "exponent"]
    assert len(exponents) == 3
    assert all(math.isfinite(float(line[name])) for line in exponents for name in ("Reading s", "Joining s"))


@pytest.mark.frameworks
def test_training_by_samples_of_a_step_with_two_processes():
    """Two trainings of two steps."""
    printed = run_program(*QUICK, "batch", "--nproc=2", "--model=llama-tiny", check=True).stdout
    lines = table(printed)
    assert "### Samples of a step: llama-tiny" in printed
    assert [(line["Processes"], line["Samples"]) for line in lines] == [
        ("2, ZeRO 2", "4"),
        ("2, ZeRO 2", "8"),
        ("2, ZeRO 2", "exponent"),
    ]
    assert all(math.isfinite(float(line["Seconds per Step"].replace(",", ""))) for line in lines)


@pytest.mark.frameworks
def test_data_preparation_by_samples(tmp_path):
    file = tmp_path / "growth.json"
    printed = run_program(*QUICK, "samples", "--samples=300", "--out", file, check=True).stdout
    lines = table(printed)
    growth = read_growth(file)
    assert growth.command == "python3 benchmarks/growth.py --quick --only samples --samples=300"
    assert [kept.text() for kept in growth.tables] == [printed.strip()]
    assert f"with {len(os.sched_getaffinity(0))} cores; revision " in printed
    assert [line["Samples"] for line in lines] == ["100", "300", "exponent"]
    for name in ("Tokenizing s", "Planning s", "Planning, Grouped s", "Planning, Packed s"):
        assert all(math.isfinite(float(line[name])) for line in lines)
        assert float(lines[0][name]) > 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--only=speed"], "--only"),
        (["--rounds=0"], "--rounds"),
        (["--samples=none"], "--samples"),
        (["--steps=8"], "--warmup-steps 8: none of 8 steps is left to time"),
        (["--nproc", "1", "3"], "--nproc 3: batches have 4 samples or more; use a divisor of that"),
        (["surplus"], "surplus"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments, named):
    line = refusal(run_program("benchmarks/growth.py", *arguments))
    assert line.startswith("growth.py: ")
    assert named in line
