"""Calibrates forecasts by records: one run on a machine says how fast it is and what memory the formula does not see.

A framework's records of one machine give a factor of time: the median of measured ÷ forecast seconds of a step. They
also give a rule of memory: a share of what a step adds where the framework's allocator counted, else bytes of a
process.
"""

import contextlib
import dataclasses
import functools
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tunebench.errors import BadInput
from tunebench.flags import Flags, parse_flags
from tunebench.forecast.formula import tensors_of
from tunebench.forecast.gpus import DEFAULT_GPU, GB, Gpu, Link, kind_of
from tunebench.forecast.job import describe
from tunebench.forecast.machine import Calibration, Machine, Traits, machine_of_kind
from tunebench.forecast.memory import Memory
from tunebench.frameworks import other_library
from tunebench.models.checkpoint import Checkpoint
from tunebench.plan import Plan
from tunebench.record import ALLOCATED, RESIDENT, Record, read_record
from tunebench.report.load import record_files

# Assumed of CPUs; the factor of time makes up for most of it. An A100 has 2039 GB/s for 19.5 TFLOP/s in float32, which
# is as many bytes per operation.
BYTES_PER_OPERATION = 0.1
# Assumed: processes of one machine exchange by its loopback, nodes by Ethernet of 10 Gb/s.
LOOPBACK, ETHERNET = 2 * GB, 1.25 * GB
# Rate ÷ and × it covers 90% of the runs of a machine when a run of another setup calibrates alone, by
# benchmarks/calibration.py results/measured/20261128-epyc-2-cores/quick
INTERVAL_FACTORS = {"torch": 1.412, "paddle": 1.495}


AS_IT_RAN = ("nproc", "nnodes", "bsz", "micro_bsz", "dtype")  # the setup's, since their defaults follow the machine


class Known(NamedTuple):
    """A run that was measured, with its job as a forecast has it. `tensors`: None where no formula knows such runs.

    `peak` is the measured one of the process that held most, as `counter` counts it.
    """

    file: Path
    record: Record
    flags: Flags
    checkpoint: Checkpoint
    plan: Plan
    tensors: Memory | None
    peak: int
    counter: str


def machine_of(framework: str, flags: Flags) -> Machine:
    """The machine that the flags name: by --calibrate, or by --gpu and --link. Raises `BadInput`."""
    if flags.calibrate is None:
        return machine_of_kind(flags.gpu, flags.link)
    return machine_of_records(framework, flags.calibrate, flags.gpu, flags.link)


@functools.cache
def machine_of_records(framework: str, path: Path, gpu: str | None, link: str | None) -> Machine:
    """The machine of a file or a folder of records. Raises `BadInput` where they do not go together."""
    return calibrated(framework, known_runs(framework, path), gpu, link)


def known_runs(framework: str, path: Path) -> list[Known]:
    """The runs of a framework in a file or a folder of records. Raises `BadInput`.

    A record of a folder that cannot calibrate is left out, with a line on stderr. A file is refused.
    """
    try:
        files = record_files(path)
    except BadInput as fault:
        raise BadInput(f"--calibrate {fault}") from None
    found: list[Known] = []
    faults: list[BadInput] = []
    for file in files:
        try:
            record = read_record(file)
            if (record.framework, record.status, record.peer) == (framework, "ok", None):
                found.append(known_run(file, record))
        except BadInput as fault:
            faults.append(fault)
    if not found and faults:
        raise BadInput(f"--calibrate {faults[0]}")
    if not found:
        raise BadInput(
            f"--calibrate {path}: none of {len(files)} record(s) is of a run of {framework}/ that ended ok; make one "
            f"there: python3 {framework}/finetune_full.py --out FILE"
        )
    for run in found:
        if place(run.record) != place(found[0].record):
            names = " and ".join(", ".join(place(each.record)) for each in (found[0], run))
            raise BadInput(
                f"--calibrate {found[0].file} and {run.file} are of several machines ({names}); name those of one"
            )
    for each in faults:
        print(f"--calibrate leaves out {each}", file=sys.stderr)
    return found


def known_run(file: Path, record: Record) -> Known:
    """The run of a record. Raises `BadInput` where it cannot calibrate."""
    if record.disturbed and record.disturbance:
        raise BadInput(f"{file}: {record.disturbance[1]}; measure it again, or name other records")
    if library := other_library(record.versions):
        raise BadInput(f"{file}: its layers are of {library} and not forecast; name records of other runs")
    if not record.matmul_flops and record.hardware.device == "cpu":
        raise BadInput(f"{file}: an older record without rates of matrix products; measure it again")
    return rebuilt(file, record)


def place(record: Record) -> tuple[str, str, str]:
    """What records of one machine have in common: device, CPU with its cores, and GPUs."""
    found = record.hardware
    return str(found.device), f"{found.cpu} with {found.cores} cores", f"{len(found.accelerators)} GPU(s)"


def rebuilt(file: Path, record: Record) -> Known:
    """The job of a record, from its own flags and setup. Raises `BadInput` where its model or data are not here."""
    setup, gpus = record.setup, record.hardware.device != "cpu"
    argv = ["--model=llama-7b" if gpus else "--model=llama-tiny", *without_out(record.argv[1:])]
    argv += ["--plan", f"--gpu={DEFAULT_GPU}"]  # no flag asks this machine for its GPUs
    argv += [f"--{name.replace('_', '-')}={getattr(setup, name)}" for name in AS_IT_RAN]
    argv += [] if gpus or setup.attention == "eager" else ["--attention=sdpa"]  # CPUs' flash kernels take float32 too
    try:
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            flags = parse_flags(record.method, argv, prog=f"--calibrate {file}", framework=record.framework)
            flags, checkpoint, plan, _ = describe(flags)
    except BadInput as fault:
        raise BadInput(f"{file}: {fault}") from None
    assert record.plan is not None and record.model is not None
    if checkpoint.config_sha256 != record.model.config_sha256:
        raise BadInput(f"{file}: its model has another config here; name records of the models here")
    if plan.sha256 != record.plan.sha256:
        raise BadInput(f"{file}: its data make other batches here; name records of the data here")
    as_it_ran = {"warmup_steps": record.timed_from, "attention": setup.attention, "overlap": setup.overlap}
    flags = flags.model_copy(update=as_it_ran)
    tensors = tensors_of(record.framework, record.method, flags, checkpoint, plan)
    counter = record.peak_memory_counter or RESIDENT
    return Known(file, record, flags, checkpoint, plan, tensors, max(record.peak_memory_bytes, default=0), counter)


def without_out(argv: Sequence[str]) -> list[str]:
    """The arguments of a run without --out and --profile, since their folders may be gone."""
    named = ("--out", "--profile")
    return [
        word
        for before, word in zip(["", *argv], argv, strict=False)
        if not (word in named or word.partition("=")[0] in named or before in named)
    ]


def calibrated(framework: str, known: Sequence[Known], gpu: str | None = None, link: str | None = None) -> Machine:
    """The machine of these runs. Raises `BadInput` where `gpu` or `link` says another one."""
    machine, first = machine_of_runs(known, gpu, link), known[0].record
    factors = [time_factor(each, machine) for each in known]
    calibration = Calibration(
        records=len(known),
        machine=f"{max(1, len(first.hardware.accelerators))} x {machine.name}",
        time_factor=statistics.median(factors),
        interval_factor=INTERVAL_FACTORS[framework],
        **memory_rule(known),
    )
    seen = tuple((Traits.of(each.flags), each.checkpoint.parameters) for each in known)
    return dataclasses.replace(machine, calibration=calibration, seen=seen)


def machine_of_runs(known: Sequence[Known], gpu: str | None, link: str | None) -> Machine:
    """The machine of these runs as its makers or the records' rates of matrix products describe it."""
    found = known[0].record.hardware
    if found.device != "cpu":
        kind = kind_of(str(found.device))
        if kind is None:
            raise BadInput(f"--calibrate {known[0].file}: {found.device} is none of the GPUs that --gpu knows")
        if gpu not in (None, kind):
            raise BadInput(f"--gpu {gpu}: the records of --calibrate are of {kind}; leave --gpu out")
        return machine_of_kind(kind, link)
    for name, value in (("gpu", gpu), ("link", link)):
        if value is not None:
            raise BadInput(f"--{name} {value}: the records of --calibrate are of a CPU; leave --{name} out")
    flops = statistics.mean(sum(each.record.matmul_flops) / each.record.setup.nnodes for each in known)
    cpu = Gpu(found.cpu, found.memory_bytes, flops, flops, flops * BYTES_PER_OPERATION, "loopback", ETHERNET)
    return Machine(f"{found.cpu} ({found.cores} cores)", cpu, cpu.link, Link(LOOPBACK), cpu=True)


def time_factor(run: Known, machine: Machine) -> float:
    """Measured ÷ forecast seconds of a step."""
    found = machine.speed(run.record.framework, run.record.method, run.flags, run.checkpoint, run.plan)
    return found.effective_tokens_per_second / run.record.effective_tokens_per_second


def memory_rule(known: Sequence[Known]) -> dict[str, Any]:
    """The fields of a calibration that concern memory: the median over the runs whose memory a formula knows."""
    counted = [(each, each.tensors) for each in known if each.tensors is not None and each.peak]
    if not counted:
        return {"counter": None}
    counter = known[0].counter
    if counter != ALLOCATED:
        return {"counter": counter, "resident_bytes": round(statistics.median(run.peak - t.peak for run, t in counted))}
    shares = [(run.peak - t.peak) / added for run, t in counted if (added := t.peak - sum(t.held.values())) > 0]
    return {"counter": counter, "unseen_share": statistics.median(shares)} if shares else {"counter": None}
