"""Measures how cost grows with the model, the batch, the length of samples, processes, and the number of samples and
records.

python benchmarks/growth.py [--only model batch length processes samples records] [--rounds 3] [--samples 1000000]
                            [--nproc 1 2 4] [--zero 2] [--method full|lora] [--model llama-tiny] [--tuned]
                            [--steps 14] [--warmup-steps 8] [--quick] [--out FILE]

It prints a Markdown table for each, on the CPU. × is the ratio to the first line of a series. A series ends with its
exponent, a least-squares fit of the logarithms: 1 is linear.
"""

import pathlib
import runpy
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
runpy.run_path(str(ROOT / "tunebench" / "bootstrap.py"))["enter_environment"]("torch", "paddle")
sys.path.insert(0, str(ROOT / "data"))

import itertools
import json
import os
import random
import shlex
import signal
import statistics
import subprocess
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import sources
import tokenizer as tokenizers_of

from tunebench import processes
from tunebench.checkout import read_git
from tunebench.digest import digest_of
from tunebench.errors import BadInput, one_line_refusals
from tunebench.files import cache_folder
from tunebench.flags import Parser, positive
from tunebench.hardware import read_hardware
from tunebench.models.presets import PRESETS
from tunebench.record import Record, read_record
from tunebench.report.growth import Growth, GrowthTable, write_growth
from tunebench.report.markdown import measured_on, revision_of
from tunebench.report.stats import ratio_interval

FRAMEWORKS = ("torch", "paddle")
MODELS = ("llama-tiny", "llama-13b-tiny", "llama-30b-tiny", "llama-65b-tiny")
LENGTHS = (64, 128, 256, 512)  # tokens of a sample; prompt and response are cut to 640 together
BATCHES = (4, 8, 16, 32)  # samples of a step
SPLITS = {"1": []} | {f"{nproc}, ZeRO {zero}": [f"--zero={zero}"] for nproc in (2, 4) for zero in (2, 3)}
TARGET = 0.8  # several processes should reach this share of one process's rate on the same cores
SETUPS = ({"mp": 4}, {"zero": 3}, {"zero": 2}, {"zero": 1}, {"mp": 2}, {})
# Shapes of a set of records, with the rounds of a pair. None: a few pairs have all records.
SHAPES = {"many rounds": None, "many cells in one group": 2, "many groups": 3}
MIB = 2**20

# Programs that measure themselves without their imports. Their last line is the result as JSON.
PREPARE = f"""
import json, sys, time
sys.path.insert(0, {str(ROOT / "data")!r})
import prepare
from tunebench.hardware import peak_resident_bytes
start = time.perf_counter()
prepare.main()
print(json.dumps([time.perf_counter() - start, peak_resident_bytes()]))
"""
JOIN = """
import json, pathlib, sys, time
from tunebench.hardware import peak_resident_bytes
from tunebench.report.pairing import join
from tunebench.report.published import load
from tunebench.report.tables import render
clock = [time.perf_counter()]
records, _, broken = load([pathlib.Path(sys.argv[1])])
assert not broken, broken[0]
clock.append(time.perf_counter())
rows = join(records)
clock.append(time.perf_counter())
render(rows, "md", records)
clock.append(time.perf_counter())
print(json.dumps([*(b - a for a, b in zip(clock, clock[1:])), peak_resident_bytes(), len(rows)]))
"""

Point = tuple[float, list[float]]  # a size and what it cost
Setting = tuple[str, str]  # the processes and the size of a training


def main() -> None:
    """Runs the series one after the other, in a temporary folder."""
    parser = Parser(prog="growth.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--only", choices=list(SERIES), nargs="+", default=list(SERIES), help="some (default: all)")
    parser.add_argument("--rounds", type=positive, help="of training, in alternating order (default: 3, quick: 1)")
    parser.add_argument("--method", choices=["full", "lora"], default="full", help="what is trained (default: full)")
    parser.add_argument("--model", choices=list(PRESETS), default="llama-tiny", help="by batch, length and processes")
    parser.add_argument(
        "--nproc", type=positive, nargs="+", help="processes that train by model and batch (default: 1 2 4, quick: 1 2)"
    )
    parser.add_argument("--zero", type=int, choices=range(4), default=2, help="stage of several processes (default: 2)")
    parser.add_argument("--tuned", action="store_true", help="train with --tuned")
    parser.add_argument("--steps", type=positive, help="of each training (default: 14, quick: 2)")
    parser.add_argument("--warmup-steps", type=positive, help="of these, not timed (default: 8, quick: 1)")
    parser.add_argument("--samples", type=positive, help="at most so many (default: 100000, quick: 1000)")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, torch alone: whether it works, not what it costs"
    )
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="also write the tables there, as JSON")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 3)
    options.steps = options.steps or (2 if options.quick else 14)
    options.warmup_steps = options.warmup_steps or (1 if options.quick else 8)
    if options.warmup_steps >= options.steps:
        raise BadInput(
            f"--warmup-steps {options.warmup_steps}: none of {options.steps} steps is left to time; use fewer"
        )
    options.nproc = list(dict.fromkeys(options.nproc or ([1, 2] if options.quick else [1, 2, 4])))
    if least := next((nproc for nproc in options.nproc if min(batches(options)) % nproc), None):
        raise BadInput(f"--nproc {least}: batches have {min(batches(options))} samples or more; use a divisor of that")
    options.samples = options.samples or (1_000 if options.quick else 100_000)
    # An interrupt raises KeyboardInterrupt, so that the folder is removed.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="growth-") as folder:
        os.environ |= {"TUNEBENCH_CACHE": f"{folder}/cache", "CUDA_VISIBLE_DEVICES": ""}
        tables = []
        for name, series in SERIES.items():
            if name in options.only:
                tables.append(series(options, pathlib.Path(folder)))
                print(f"\n{tables[-1].text()}", flush=True)
    if options.out:
        words = (word for word in sys.argv[1:] if word not in ("--out", str(options.out), f"--out={options.out}"))
        write_growth(
            options.out, Growth(command=f"python3 benchmarks/growth.py {shlex.join(words)}".strip(), tables=tables)
        )


def by_model(options: Namespace, folder: pathlib.Path) -> GrowthTable:
    """Trains larger models on the same batches, by each number of processes."""
    models = MODELS[: 2 if options.quick else None]
    flags = {model: [f"--model={model}", f"--bsz={min(batches(options))}"] for model in models}
    records = train(split(flags, options), options, folder)
    return table_of_training(f"Model size: {models[0]} to {models[-1]}", "Parameters", records, parameters)


def by_batch(options: Namespace, folder: pathlib.Path) -> GrowthTable:
    """Trains one model on larger global batches, by each number of processes."""
    flags = {str(bsz): [f"--bsz={bsz}"] for bsz in batches(options)}
    records = train(split(flags, options), options, folder)
    return table_of_training(f"Samples of a step: {options.model}", "Samples", records, samples_of_a_step)


def by_length(options: Namespace, folder: pathlib.Path) -> GrowthTable:
    """Trains one model on as many, but longer samples."""
    tokenizer = tokenizers_of.embedded(cache_folder())
    texts = [sample.response for sample in sources.load("synthetic-en", 1_000, skip_bad=False).samples]
    stream = itertools.cycle(token for encoded in tokenizer.encode_batch(texts) for token in encoded.ids)
    settings: dict[Setting, list[str]] = {}
    for length in LENGTHS[: 2 if options.quick else None]:
        file = folder / f"{length}.jsonl"
        with file.open("w") as lines:
            for _ in range(64):
                parts = (length // 4, length - length // 4 - 1)  # the response gets its EOS
                texts = [tokenizer.decode(list(itertools.islice(stream, count))) for count in parts]
                print(json.dumps(dict(zip(("instruction", "output"), texts, strict=True))), file=lines)
        settings["1", str(length)] = [f"--data={file}"]
    records = train(settings, options, folder)
    return table_of_training(f"Length of samples: {options.model}", "Tokens", records, tokens_of_a_sample)


def by_processes(options: Namespace, folder: pathlib.Path) -> GrowthTable:
    """Trains on the same global batches by one process with all threads, and by several that share the threads."""
    names = list(SPLITS)[: 2 if options.quick else None]
    bsz = f"--bsz={2 if options.quick else 8}"
    settings = {(name, bsz): [*SPLITS[name], f"--nproc={name[0]}", bsz] for name in names}
    records = train(settings, options, folder)
    lines, below = [], []
    for (framework, name, _), runs in records.items():
        one = records[framework, "1", bsz]
        ours, alone = ([run.effective_tokens_per_second for run in each] for each in (runs, one))
        ratio, interval = (
            statistics.geometric_mean(ours) / statistics.geometric_mean(alone),
            ratio_interval(ours, alone),
        )
        said = f"{1 + interval[0]:.2f} to {1 + interval[1]:.2f}" if interval else "none: one round"
        below += [f"{framework} {name} ({ratio:.2f})"] * (ratio < TARGET)
        threads = str(runs[0].hardware.threads)
        lines.append([framework, name, threads, *map(number, costs(runs)), f"{ratio:.2f}", said])
    return GrowthTable(
        heading=f"Processes on the same cores: {options.model}, {options.method}{', tuned' * options.tuned}",
        conditions=measured_on(list(itertools.chain.from_iterable(records.values()))),
        columns=["Framework", "Processes", "Threads of Each", *COSTS, "÷ One Process", "95% Interval"],
        lines=lines,
        note=f"Target: at least {TARGET} of one process. Below it: {', '.join(below) or 'none'}.",
    )


def by_samples(options: Namespace, folder: pathlib.Path) -> GrowthTable:
    """Prepares data: tokenizes samples, then makes plans of them."""
    prepare("--samples=10", "--epochs=1")  # makes the tokenizer and the checkpoint
    points: list[Point] = []
    for count in sizes(options.samples, 100 if options.quick else 1_000):
        flags = [f"--samples={count}", "--epochs=1"]
        first, plain, grouped, packed = (
            prepare(*flags, *more) for more in (["--bsz=4"], ["--bsz=8"], ["--order=grouped"], ["--packing=1024"])
        )
        tokenizing = max(first[0] - plain[0], 1e-3)
        points.append((count, [tokenizing, first[1] / MIB, plain[0], plain[1] / MIB, grouped[0], packed[0]]))
    measures = ("Tokenizing s", "Peak MiB", "Planning s", "Peak MiB", "Planning, Grouped s", "Planning, Packed s")
    heading = "Samples: generated, tokenized, then planned for one epoch"
    return table(heading, here(), [], "Samples", measures, {(): points})


def by_records(options: Namespace, folder: pathlib.Path) -> GrowthTable:
    """Joins records as summarize.py does: its parts one by one, and the whole program."""
    series: dict[tuple[str, ...], list[Point]] = {}
    for shape in SHAPES:
        points = series[shape,] = []
        for count in (100, 400) if options.quick else (100, 1_000, 10_000):
            files = folder / f"{shape}-{count}"
            write_records(files, count, shape)
            read, join, render, peak, rows = json.loads(run("-P", "-c", JOIN, files)[0])
            _, whole = run(ROOT / "summarize.py", files)
            points.append((count, [rows, read, join, render, peak / MIB, whole]))
    measures = ("Rows", "Reading s", "Joining s", "Rendering s", "Peak MiB", "summarize.py s")
    return table("Records", here(), ["Shape"], "Records", measures, series)


SERIES: dict[str, Callable[[Namespace, pathlib.Path], GrowthTable]] = {
    "model": by_model,
    "batch": by_batch,
    "length": by_length,
    "processes": by_processes,
    "samples": by_samples,
    "records": by_records,
}
COSTS = ("Tokens/s", "Seconds per Step", "Peak MiB of a Process")


def costs(runs: Sequence[Record]) -> list[float]:
    """The values of COSTS over the rounds of one setting."""
    seconds = [statistics.mean(run.steps.seconds[run.timed_from :]) for run in runs]
    rates = [run.effective_tokens_per_second for run in runs]
    peak = max(itertools.chain.from_iterable(run.peak_memory_bytes for run in runs))
    return [statistics.geometric_mean(rates), statistics.geometric_mean(seconds), peak / MIB]


def parameters(run: Record) -> float:
    """The parameters of a run's model."""
    return run.model.parameters


def tokens_of_a_sample(run: Record) -> float:
    """The mean tokens of a run's samples."""
    return run.plan.effective_tokens / len(run.steps.seconds) / run.setup.bsz


def samples_of_a_step(run: Record) -> float:
    """The samples of a run's global batch."""
    return run.setup.bsz


def batches(options: Namespace) -> Sequence[int]:
    """The sizes of the global batches of `by_batch`, in samples."""
    return BATCHES[:2] if options.quick else BATCHES


def split(flags: dict[str, list[str]], options: Namespace) -> dict[Setting, list[str]]:
    """The flags of each size by each number of processes."""
    zero = f"--zero={options.zero}"
    return {
        (str(nproc), size): [*given, f"--nproc={nproc}", *[zero] * (nproc > 1)]
        for nproc in options.nproc
        for size, given in flags.items()
    }


def train(
    settings: dict[Setting, list[str]], options: Namespace, folder: pathlib.Path
) -> dict[tuple[str, str, str], list[Record]]:
    """Runs each framework's script in each setting. Even rounds reverse the order.

    Returns the records by framework, processes and size.
    """
    steps = [f"--steps={options.steps}", f"--warmup-steps={options.warmup_steps}"]
    frameworks = FRAMEWORKS[: 1 if options.quick else None]
    found: dict[tuple[str, str, str], list[Record]] = {(side, *each): [] for side in frameworks for each in settings}
    for turn in range(options.rounds):
        for framework, *setting in list(found)[:: -1 if turn % 2 else 1]:
            nproc, size = setting
            out = folder / "record.json"
            flags = [f"--model={options.model}", "--nproc=1", *steps, *["--tuned"] * options.tuned]
            run(ROOT / framework / f"finetune_{options.method}.py", *flags, *settings[nproc, size], f"--out={out}")
            found[framework, nproc, size].append(read_record(out))
    return found


def prepare(*flags: str) -> list[float]:
    """Seconds and peak memory in bytes of data/prepare.py."""
    return json.loads(run("-P", "-c", PREPARE, "--model=llama-tiny", *flags)[0].splitlines()[-1])


def run(*command: object) -> tuple[str, float]:
    """Runs a program with this interpreter. Returns its output and its seconds. Raises `BadInput` where it fails."""
    start = time.perf_counter()
    process = processes.start(
        [sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        printed, errors = process.communicate()
    except BaseException:
        processes.end(process)
        raise
    if process.returncode:
        said = [*printed.splitlines(), *errors.splitlines()] or ["nothing was printed"]
        raise BadInput(f"a program ended with {process.returncode}: {said[-1]}")
    return printed, time.perf_counter() - start


def write_records(folder: pathlib.Path, count: int, shape: str) -> None:
    """Writes `count` record files: measured ones with other setups, commits, batch sizes and a little noise."""
    real: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for line in (ROOT / "tests" / "data" / "quick.jsonl").read_text().splitlines():
        content = json.loads(line)
        real.setdefault((content["method"], content["model"]["name"], content["framework"]), []).append(content)
    works = sorted({key[:2] for key in real})
    rounds, noise = SHAPES[shape] or -(-count // 2 // len(works)), random.Random(count)
    for i in range(count):
        framework, turn, pair = ("paddle", "torch")[i % 2], i // 2 % rounds, i // 2 // rounds
        at, member = (0, pair) if shape == "many cells in one group" else (pair % len(works), pair // len(works))
        which, group = member % len(SETUPS), member // len(SETUPS)
        runs = real[(*works[at], framework)]
        content = dict(runs[turn % len(runs)])
        # Each side has another fastest setup, so that each piece of work also has a row "best of each".
        slow = 1 + 0.5 * (which if framework == "paddle" else len(SETUPS) - 1 - which)
        steps = content["steps"]
        content["steps"] = steps | {
            "seconds": [second * slow * noise.uniform(0.99, 1.01) for second in steps["seconds"]],
            "loss": [loss * noise.uniform(1, 1 + 1e-6) for loss in steps["loss"]],
        }
        if SHAPES[shape]:
            content["setup"] = content["setup"] | {"nproc": 4} | SETUPS[which]
        if shape == "many groups":
            content["setup"] |= {"bsz": 4 * (1 + group), "micro_bsz": 1 + group}
        elif SHAPES[shape]:
            content["git"] = content["git"] | {"revision": f"{group:08x}".ljust(40, "0")}
        file = folder / str(pair) / f"{framework}-r{turn + 1}.json"
        flags = [word for word in content["argv"] if not word.startswith("--out")]
        moment = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(1_767_225_600 + i))
        content |= {"started_at": moment, "argv": [*flags, f"--out={file}"]}
        del content["sha256"]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content | {"sha256": digest_of(content)}, indent=1) + "\n")


def sizes(largest: int, smallest: int) -> list[int]:
    """The powers of ten times `smallest` below `largest`, then `largest`."""
    found = [smallest * 10**power for power in range(10) if smallest * 10**power < largest]
    return [*found, largest]


def here() -> str:
    """The sentence on the machine and the commit of a table that no training run is part of."""
    hardware = read_hardware()
    return f"Measured on: {hardware.cpu} with {hardware.cores} cores; revision {revision_of(read_git())}."


def table_of_training(
    heading: str, size: str, records: dict[tuple[str, str, str], list[Record]], of: Callable[[Record], float]
) -> GrowthTable:
    """The table of training runs: a series for each framework and number of processes."""
    series: dict[tuple[str, ...], list[Point]] = {}
    for (framework, nproc, _), runs in records.items():
        words = f"{nproc}, ZeRO {runs[0].setup.zero}" if runs[0].setup.zero else nproc
        series.setdefault((framework, words), []).append((of(runs[0]), costs(runs)))
    conditions = measured_on(list(itertools.chain.from_iterable(records.values())))
    return table(heading, conditions, ["Framework", "Processes"], size, COSTS, series)


def table(
    heading: str,
    conditions: str,
    names: Sequence[str],
    size: str,
    measures: Sequence[str],
    series: dict[tuple[str, ...], list[Point]],
) -> GrowthTable:
    """Each series' points with their ratios to the first one, then its exponents."""
    lines = []
    for labels, points in series.items():
        columns = list(zip(*(values for _, values in points), strict=True))
        for i, (x, _) in enumerate(points):
            pairs = ((number(column[i]), f"{column[i] / column[0]:.2f}") for column in columns)
            lines.append([*labels, f"{x:,.0f}", *itertools.chain.from_iterable(pairs)])
        fitted = ((f"{exponent([x for x, _ in points], column):.2f}", "") for column in columns)
        lines.append([*labels, "exponent", *itertools.chain.from_iterable(fitted)])
    header = [*names, size, *itertools.chain.from_iterable((measure, "×") for measure in measures)]
    return GrowthTable(heading=heading, conditions=conditions, columns=header, lines=lines)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of log value over log size; NaN with one size."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0]) if len(set(sizes)) > 1 else float("nan")


def number(value: float) -> str:
    """A number with three digits, or all digits before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    with one_line_refusals("growth.py"):
        try:
            main()
        except KeyboardInterrupt:
            sys.exit(130)
