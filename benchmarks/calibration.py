"""Calibrates forecasts by each record of a folder in turn, predicts the other records and prints the errors.

    .venv/torch/bin/python -P benchmarks/calibration.py results/calibration
    .venv/torch/bin/python -P benchmarks/calibration.py results/calibration --tracked

Memory is what each record's counter counts. With --tracked each run is made again, and the bytes of its tensors are
counted (benchmarks/tracked.py): what a GPU's allocator would count. Such runs are slow, so their time is not used.
"""

import argparse
import math
import pathlib
import runpy
import statistics
import subprocess
import tempfile
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parents[1]
runpy.run_path(str(ROOT / "tunebench" / "bootstrap.py"))["enter_environment"]("torch", "paddle")

from tunebench.errors import BadInput, one_line_refusals
from tunebench.forecast.calibrate import Known, calibrated, known_runs, without_out
from tunebench.forecast.machine import Machine
from tunebench.forecast.speed_points import covering
from tunebench.frameworks import FRAMEWORKS
from tunebench.record import ALLOCATED, read_record
from tunebench.report.load import load_records
from tunebench.report.markdown import NOT_AVAILABLE, markdown

COLUMNS = ("Calibrated by", "Time Factor", "Time: Median Error", "Largest", "Memory: Median Error", "Largest")


def main() -> None:
    """Prints a table for each framework."""
    parser = argparse.ArgumentParser(description="Errors of forecasts that one record of a folder calibrates.")
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--tracked", action="store_true", help="make the runs again and count the bytes of tensors")
    options = parser.parse_args()
    records = load_records([options.folder])[0]
    for framework in dict.fromkeys(record.framework for record in records):
        known = known_runs(framework, options.folder)
        if options.tracked:
            known = [with_tracked_bytes(run) for run in known]
        print(f"\n{FRAMEWORKS[framework].title}, {len(known)} runs\n\n{report(framework, known)}", flush=True)


def report(framework: str, known: Sequence[Known]) -> str:
    """The table of a framework, and what its errors come to."""
    lines: list[list[str]] = []
    times: list[float] = []
    sizes: list[float] = []
    for one in known:
        machine = calibrated(framework, [one])
        others = [run for run in known if run is not one and name_of(run) != name_of(one)]
        of_time = [math.log(predicted_rate(machine, run) / run.record.effective_tokens_per_second) for run in others]
        of_size = [error for run in others if (error := memory_error(machine, run)) is not None]
        lines.append(
            [name_of(one), f"{machine.time_factor:.3f}", *shown([math.expm1(x) for x in of_time]), *shown(of_size)]
        )
        times, sizes = times + of_time, sizes + of_size
    if not times:
        raise BadInput("all runs have the same setup; name the folder of a suite with several")
    rates, memory = (shown(each) for each in ([math.expm1(x) for x in times], sizes))
    said = [
        f"time: median error {rates[0]}, largest {rates[1]}; 90% within a factor of {math.exp(covering(times)):.3f}",
        f"memory ({known[0].counter}): median error {memory[0]}, largest {memory[1]}",
    ]
    return "\n".join([markdown(COLUMNS, lines), "", *said])


def name_of(run: Known) -> str:
    """The run's setup: the name of its folder in a suite's results."""
    return run.file.parent.name


def predicted_rate(machine: Machine, run: Known) -> float:
    """Effective tokens per second."""
    found = machine.speed(run.record.framework, run.record.method, run.flags, run.checkpoint, run.plan)
    return found.effective_tokens_per_second


def memory_error(machine: Machine, run: Known) -> float | None:
    """Predicted ÷ measured peak - 1; None where no formula knows the run."""
    if run.tensors is None or machine.calibration is None or machine.calibration.counter is None:
        return None
    return machine.memory(run.tensors).peak / run.peak - 1


def shown(errors: Sequence[float]) -> list[str]:
    """The median and the largest of errors without their signs."""
    if not errors:
        return [NOT_AVAILABLE] * 2
    return [f"{statistics.median(map(abs, errors)):.1%}", f"{max(map(abs, errors)):.1%}"]


def with_tracked_bytes(run: Known) -> Known:
    """The run, with the peak of the bytes of its tensors."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "record.json"
        framework, script = run.record.framework, run.record.argv[0]
        command = [ROOT / ".venv" / framework / "bin" / "python", "-P", ROOT / "benchmarks" / "tracked.py"]
        arguments = [f"{framework}/{script}", *without_out(run.record.argv[1:]), f"--out={out}"]
        done = subprocess.run([*map(str, command), *arguments], capture_output=True, text=True)
        if done.returncode:
            raise BadInput(f"{run.file}: run again it ended with {done.returncode}: {done.stderr.strip()[-300:]}")
        peak = max(read_record(out).peak_memory_bytes)
    print(f"{name_of(run)}: {peak / 1e9:.3f} GB of tensors", flush=True)
    return run._replace(peak=peak, counter=ALLOCATED)


if __name__ == "__main__":
    with one_line_refusals("calibration.py"):
        main()
