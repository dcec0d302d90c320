"""The answer to --sweep: which setups of a model on a kind of GPU are the fastest for their number of GPUs.

Memory is by formula (formula.py) and speed as for --plan (speed.py), so that ten thousand setups take seconds.
"""

import itertools
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from tunebench.errors import BadInput
from tunebench.files import write_atomically
from tunebench.flags import Flags, in_words
from tunebench.forecast.calibrate import machine_of
from tunebench.forecast.formula import Shape, memory_of
from tunebench.forecast.machine import Calibration
from tunebench.forecast.speed import Rows, Tokens, fitted, setup_of_run, step_seconds
from tunebench.frameworks import FRAMEWORKS
from tunebench.report.markdown import markdown
from tunebench.run.run import Job
from tunebench.run.unsupported import not_offered

NODES = (1, 2, 4, 8, 16, 32, 64, 128)
GPUS_OF_A_NODE = (1, 2, 4, 8)  # of one node; several nodes have the largest number
TENSOR_PARALLEL = (2, 4, 8)
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
PASSES = (1, 4)  # micro-batches of a step, where --bsz is not given
MOST_STEPS = 8  # steps whose tokens give the rate; the largest micro-batch is that of all rows
COLUMNS = ("GPUs", "Setup", "Global Batch", "Effective Tokens/s", "90% Interval", "Peak GB")


class Point(NamedTuple):
    """A setup that fits, and what it reaches. Bytes are of one GPU; `flags` are spelled as on a command line."""

    gpus: int
    flags: str
    bsz: int
    effective_tokens_per_second: float
    interval: tuple[float, float]
    peak: int
    gpu_hours_per_million_tokens: float
    cost_per_million_tokens: float | None


class Sweep(BaseModel):
    """The setups with the highest forecast rates for as many GPUs or fewer, and how many were looked at."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    framework: str
    method: str
    model: str
    gpu: str
    link: str
    data: str
    tried: int
    seconds: float
    verdicts: dict[str, int]
    front: list[Point]
    refusals: list[str]  # why setups are unsupported
    calibration: Calibration | None = None


def sweep(framework: str, method: str, job: Job) -> Sweep:
    """Looks at all setups that the flags of the job leave open."""
    started, flags = time.monotonic(), job.flags
    if flags.order == "grouped" and "bsz" not in flags.given:
        raise BadInput("--sweep with --order grouped, which --tuned has: batches are grouped for one --bsz; add --bsz")
    machine, constants = machine_of(framework, flags), fitted()[framework][0]
    rows = Rows.of(job.plan)
    batches: dict[tuple, tuple[Tokens, Shape]] = {}
    if machine.cpu:
        raise BadInput("--sweep is for GPUs, and the records of --calibrate are of a CPU; use --plan")
    refusals: dict[tuple, str | None] = {}
    verdicts: Counter[str] = Counter()
    fitting: list[tuple[int, float, int, int, Flags]] = []
    for setup in setups(flags):
        kind = (setup.zero, setup.mp, setup.attention, setup.padding_free, setup.head, setup.recompute)
        if kind not in refusals:
            refusals[kind] = not_offered(framework, method, setup, job.checkpoint)
        if refusals[kind]:
            verdicts["unsupported"] += 1
            continue
        split = (setup.replicas, setup.accumulation, setup.micro_bsz, setup.padding_free)
        if split not in batches:
            batches[split] = batches_of(rows, *split)
        tokens, shape = batches[split]
        memory = memory_of(framework, method, setup, job.checkpoint, shape)
        if memory is None:
            verdicts["unknown"] += 1
            continue
        peak = machine.memory(memory).peak
        verdict = machine.judge(peak, setup).verdict
        verdicts[verdict] += 1
        if verdict == "fits":
            sizes, gpu = setup_of_run(method, setup, job.checkpoint), machine.each(setup.nproc)
            seconds = step_seconds(constants, sizes, tokens, gpu, machine.link) * machine.time_factor
            fitting.append((setup.world_size, -tokens.effective / seconds, len(fitting), peak, setup))
    if not verdicts:
        raise BadInput(f"--sweep: no setup goes with --bsz {flags.bsz} and the other flags; leave some of them out")
    front: list[Point] = []
    for gpus, rate, _, peak, setup in sorted(fitting):
        if not front or -rate > front[-1].effective_tokens_per_second:
            hours = gpus / (-rate * 3600) * 1e6
            interval = machine.interval(framework, -rate, setup, job.checkpoint.parameters)
            cost = None if flags.price is None else flags.price * hours
            front.append(Point(gpus, spelled(setup), setup.bsz, -rate, interval, peak, hours, cost))
    return Sweep(
        framework=framework,
        method=method,
        model=flags.model_name,
        gpu=machine.name,
        link=machine.link_name,
        data=flags.data,
        tried=verdicts.total(),
        seconds=time.monotonic() - started,
        verdicts=dict(verdicts),
        front=front,
        refusals=sorted({reason for reason in refusals.values() if reason}),
        calibration=machine.calibration,
    )


def setups(flags: Flags) -> Iterator[Flags]:
    """The setups that flags leave open: those of the command line stay."""

    def choices(name: str, *values: Any) -> tuple:
        return (getattr(flags, name),) if name in flags.given else values

    ways = itertools.product(choices("zero", 0, 1, 2, 3), choices("mp", 1, *TENSOR_PARALLEL))
    switches = itertools.product(
        [(zero, mp) for zero, mp in ways if not zero or mp == 1],
        choices("recompute", False, True),
        choices("attention", "eager", "sdpa"),
        (True,) if flags.packing else choices("padding_free", False, True),
        choices("head", "all", "labels"),
        choices("micro_bsz", *MICRO_BATCHES),
        [1] if "bsz" in flags.given else PASSES,
    )
    places = [
        (nodes, each)
        for nodes in choices("nnodes", *NODES)
        for each in choices("nproc", *(GPUS_OF_A_NODE if nodes == 1 else GPUS_OF_A_NODE[-1:]))
    ]
    for (nnodes, nproc), ((zero, mp), recompute, attention, free, head, micro, passes) in itertools.product(
        places, list(switches)
    ):
        replicas = nnodes * nproc // mp
        bsz = flags.bsz if "bsz" in flags.given else micro * passes * max(replicas, 1)
        wrong = nproc % mp or (zero and replicas < 2) or (head == "labels" and mp > 1) or bsz % (micro * replicas or 1)
        if wrong:
            continue
        yield flags.model_copy(
            update={
                "nnodes": nnodes,
                "nproc": nproc,
                "zero": zero,
                "mp": mp,
                "recompute": recompute,
                "attention": attention,
                "padding_free": free,
                "head": head,
                "micro_bsz": micro,
                "bsz": bsz,
            }
        )


def batches_of(rows: Rows, replicas: int, passes: int, micro_bsz: int, padding_free: bool) -> tuple[Tokens, Shape]:
    """The tokens of such steps and their largest micro-batch. The rows begin anew where they are too few."""
    bsz = replicas * passes * micro_bsz
    steps = -(-len(rows.lengths) // bsz)
    order = np.arange(steps * bsz) % len(rows.lengths)
    every = Rows(*(each[order].reshape(steps, replicas, passes, micro_bsz) for each in rows))
    tokens = Tokens.of_rows(Rows(*(each[:MOST_STEPS] for each in every)), padding_free)
    labels = int(every.labels.sum(axis=3).max())
    if padding_free:
        width, squares = (int(each.sum(axis=3).max()) for each in (every.lengths, every.squares))
        return tokens, Shape(1, width, labels, squares)
    width = int(every.lengths.max())
    return tokens, Shape(micro_bsz, width, labels, micro_bsz * width**2)


def spelled(flags: Flags) -> str:
    """What a setup adds to the command line."""
    options: dict[str, Any] = {"nproc": flags.nproc}
    options |= {"nnodes": flags.nnodes} if flags.nnodes > 1 else {}
    options |= {"zero": flags.zero} if flags.zero else {}
    options |= {"mp": flags.mp} if flags.mp > 1 else {}
    options |= {"bsz": flags.bsz, "micro_bsz": flags.micro_bsz, "dtype": flags.dtype}
    options |= {"attention": flags.attention, "head": flags.head}
    options |= {name: True for name in ("padding_free", "recompute") if getattr(flags, name)}
    options |= {"no_padding_free": True} if flags.tuned and not flags.padding_free else {}
    return in_words(options)


def say(found: Sweep, out: Path | None) -> None:
    """Prints a sweep, and writes it to `out` as JSON."""
    print("\n".join(lines(found)), flush=True)
    if out is not None:
        write_atomically(out, (found.model_dump_json(indent=1) + "\n").encode())


def lines(found: Sweep) -> list[str]:
    """The sweep as text."""
    side, machine = FRAMEWORKS[found.framework].title, f"{found.gpu} ({found.link})"
    counts = ", ".join(f"{count:,} {verdict}" for verdict, count in sorted(found.verdicts.items()))
    title = f"{side} {found.method}, {found.model}, {found.data}, {machine}"
    said = [f"{title}: {found.tried:,} setups in {found.seconds:.1f} s: {counts}"]
    said += [found.calibration.in_words] if found.calibration else []
    if not found.front:
        return [*said, "no setup fits", *(f"unsupported: {reason}" for reason in found.refusals)]
    priced = found.front[0].cost_per_million_tokens is not None
    rates = [each.cost_per_million_tokens if priced else each.gpu_hours_per_million_tokens for each in found.front]
    table = []
    for each, rate in zip(found.front, rates, strict=True):
        low, high = each.interval
        cheapest = " (least)" if rate == min(r for r in rates if r is not None) else ""
        shown = [f"{each.effective_tokens_per_second:,.0f}", f"{low:,.0f} to {high:,.0f}", f"{each.peak / 1e9:.1f}"]
        table.append([str(each.gpus), each.flags, str(each.bsz), *shown, f"{rate:.4f}{cheapest}"])
    cost = "$ per Million Tokens" if priced else "GPU-Hours per Million Tokens"
    return [
        *said,
        "Each setup below has the highest forecast rate for as many GPUs or fewer. The intervals say how sure that is.",
        "",
        markdown((*COLUMNS, cost), table),
    ]
