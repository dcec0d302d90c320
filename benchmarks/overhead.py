"""Measures what this project adds to a step: batches from the plan, the meter and the record.

python benchmarks/overhead.py [--record results/peers/full/torch-tuned-r1.json]

With a record it also prints the share of a step's time. Batches are timed as if the step waited for them. In a run a
thread makes them ahead of the step.
"""

import pathlib
import runpy

ROOT = pathlib.Path(__file__).resolve().parents[1]
runpy.run_path(str(ROOT / "tunebench" / "bootstrap.py"))["enter_environment"]("torch", "paddle")

import contextlib
import os
import statistics
import tempfile
import time

from tunebench.errors import one_line_refusals
from tunebench.flags import Parser, parse_flags
from tunebench.models.checkpoint import find_checkpoint
from tunebench.plan import load_plan
from tunebench.record import read_record
from tunebench.run.run import Job, Run
from tunebench.world import ALONE

FLAGS = ["--model=llama-65b-tiny", "--bsz=8", "--samples=400", "--steps=50", "--warmup-steps=2", "--tuned"]


def main() -> None:
    """Prints microseconds per step, and their share of a measured step."""
    parser = Parser(prog="overhead.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--record", type=pathlib.Path, help="whose timed steps to compare with")
    options = parser.parse_args()
    record = read_record(options.record) if options.record else None
    flags = parse_flags("full", FLAGS)
    checkpoint = find_checkpoint(flags.model, flags.weights, flags.seed, flags.layers)
    plan = load_plan(flags, checkpoint)
    run = Run("torch", "full", Job(flags, checkpoint, plan, ALONE))
    run.describe("cpu", checkpoint.parameters, checkpoint.parameters, checkpoint.expected)
    batches = [seconds(lambda i=i: list(plan.passes(i, flags.micro_bsz, 0, 1))) for i in range(plan.steps)]
    with pathlib.Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        run.start(lambda: None)
        meter = [seconds(lambda: run.end_step(1.0, 1.0)) for _ in range(plan.steps)]
    with tempfile.TemporaryDirectory() as folder:
        written = seconds(
            lambda: run.record("failed", "timed", run.meter.steps()).write(pathlib.Path(folder) / "r.json")
        )
    parts = {"batches": statistics.median(batches), "meter": statistics.median(meter), "record": written / plan.steps}
    for name, value in parts.items():
        print(f"{name}: {value * 1e6:.0f} µs a step")
    total = sum(parts.values())
    print(f"together: {total * 1e6:.0f} µs a step")
    if record and record.steps:
        step = statistics.median(record.steps.seconds[record.timed_from :])
        print(f"of a step of {step:.3f} s ({options.record}): {total / step:.3%}")


def seconds(action) -> float:
    """The seconds that `action` takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


if __name__ == "__main__":
    with one_line_refusals("overhead.py"):
        main()
