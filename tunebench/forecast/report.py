"""The answer to --plan: a JSON file, and the same as text."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from tunebench import processes
from tunebench.files import write_atomically
from tunebench.forecast.calibrate import machine_of
from tunebench.forecast.changes import Change, cheapest
from tunebench.forecast.formula import tensors_of
from tunebench.forecast.machine import Calibration
from tunebench.forecast.memory import Memory, largest_batch, with_unseen
from tunebench.forecast.verdict import FRAGMENTATION, Room, Verdict
from tunebench.frameworks import FRAMEWORKS
from tunebench.record import Setup
from tunebench.run.run import Job, setup_of

GB = 10**9
HOUR = 3600


class Answer(BaseModel):
    """What a run would take. Bytes are of one GPU, on a CPU of one process. `cost` is in dollars, None without --price.

    `effective_tokens_per_second` is of the whole job. `interval` covers 90% of the rows that the constants were not
    fitted to; with `calibration`, of the runs of a machine that did not calibrate. `seconds` are those of all steps,
    without start-up. Where `verdict` is `unsupported`, `reason` says why, and all figures are None.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    framework: str
    method: str
    model: str
    parameters: int
    setup: Setup
    gpu: str
    link: str
    data: str
    steps: int
    largest_batch: tuple[int, int]  # rows and width of the micro-batch that decides the memory
    verdict: Verdict
    reason: str | None = None
    memory: Memory | None = None
    room: Room | None = None
    effective_tokens_per_second: float | None = None
    interval: tuple[float, float] | None = None
    seconds: float | None = None
    seconds_of_a_step: dict[str, float] | None = None
    cost: float | None = None
    calibration: Calibration | None = None
    change: Change | None = None  # where the run does not fit, the fastest change that does


def answer(framework: str, method: str, job: Job, forecast: Callable[[Job], Memory]) -> Answer:
    """The answer for a run. `forecast` counts its memory.

    A calibrated answer takes the memory by formula where there is one, since the records' is by formula too.
    """
    flags, machine = job.flags, machine_of(framework, job.flags)

    def memory_of(run: Job) -> Memory:
        by_formula = machine.calibration and tensors_of(framework, method, run.flags, run.checkpoint, run.plan)
        return machine.memory(by_formula) if by_formula else forked(forecast, run, machine.memory)

    memory, change = memory_of(job), None
    room = machine.judge(memory.peak, flags)
    if room.verdict == "out of memory":
        change = cheapest(framework, method, job, memory, memory_of, machine)
    speed = machine.speed(framework, method, flags, job.checkpoint, job.plan)
    cost = None if flags.price is None else flags.price * flags.world_size * speed.seconds / HOUR
    return about(framework, method, job, room.verdict).model_copy(
        update={
            "memory": memory,
            "room": room,
            "effective_tokens_per_second": speed.effective_tokens_per_second,
            "interval": speed.interval,
            "seconds": speed.seconds,
            "seconds_of_a_step": speed.parts,
            "cost": cost,
            "change": change,
        }
    )


def forked(forecast: Callable[[Job], Memory], job: Job, with_rest: Callable[[Memory], Memory] = with_unseen) -> Memory:
    """What `forecast` finds in a process of its own: process groups and DeepSpeed can be made once in each.

    `with_rest` adds what a forecast does not see.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def ask() -> None:
        processes.die_with_parent()
        sender.send(forecast(job))
        sys.stdout.flush()
        os._exit(0)  # process groups may wait for each other at the end

    process = context.Process(target=ask)
    process.start()
    sender.close()
    try:
        memory = receiver.recv()
    except EOFError:
        process.join()  # sets the exit code
        raise RuntimeError(f"the forecast of the memory ended with {process.exitcode}") from None
    finally:
        process.join()  # leaves no zombie
        receiver.close()
    return with_rest(memory)


def refused(framework: str, method: str, job: Job, reason: str) -> Answer:
    """The answer for a run that the framework does not offer."""
    return about(framework, method, job, "unsupported").model_copy(update={"reason": reason})


def about(framework: str, method: str, job: Job, verdict: Verdict) -> Answer:
    """An answer without figures."""
    flags, machine = job.flags, machine_of(framework, job.flags)
    return Answer(
        framework=framework,
        method=method,
        model=flags.model_name,
        parameters=job.checkpoint.parameters,
        setup=setup_of(flags),
        gpu=machine.name,
        link=machine.link_name,
        calibration=machine.calibration,
        data=flags.data,
        steps=job.plan.steps,
        largest_batch=largest_batch(flags, job.plan).input_ids.shape,
        verdict=verdict,
    )


def say(found: Answer, out: Path | None) -> None:
    """Prints an answer, and writes it to `out` as JSON."""
    print("\n".join(lines(found)), flush=True)
    if out is not None:
        write_atomically(out, (found.model_dump_json(indent=1) + "\n").encode())


def lines(found: Answer) -> list[str]:
    """The answer as text."""
    setup, processes = found.setup, found.setup.nproc * found.setup.nnodes
    nodes = f" on {setup.nnodes} nodes" if setup.nnodes > 1 else ""
    ways = setup.in_stages + [f"MP {setup.mp}"] * (setup.mp > 1) + ["sequence parallel"] * setup.sequence_parallel
    types = setup.dtype + (f" {setup.amp}" if setup.amp else "")
    ways += [types, *["recompute"] * setup.recompute, setup.attention, *["padding-free"] * setup.padding_free]
    title = f"{FRAMEWORKS[found.framework].title} {found.method}, {found.model}, bsz {setup.bsz}, {', '.join(ways)}"
    said = [f"{title}: {processes} x {found.gpu}{nodes} ({found.link})"]
    if found.memory is None or found.room is None:
        return [*said, f"verdict: {found.verdict}: {found.reason}"]
    memory, room, (rows, width) = found.memory, found.room, found.largest_batch
    resident = found.calibration is not None and found.calibration.resident_bytes is not None
    whose = "process" if resident else "GPU"
    said += [found.calibration.in_words] if found.calibration else []
    said.append(f"peak of a {whose}'s memory, in phase {memory.moment}; largest micro-batch: {rows} x {width} tokens")
    for kind, size in memory.parts.items():
        said.append(f"  {kind.replace('_', ' '):22}{size / GB:8.2f} GB")
    said.append(f"  {'sum':22}{memory.peak / GB:8.2f} GB {'resident' if resident else 'allocated by tensors'}")
    said.append(f"  {'with gaps':22}{room.needed / GB:8.2f} GB, {FRAGMENTATION:.0%} more for gaps between tensors")
    rest = "" if room.usable == room.total else "; the rest is CUDA's and NCCL's"
    said.append(f"  {'usable':22}{room.usable / GB:8.2f} GB of {room.total / GB:.2f}{rest}")
    said.append(f"verdict: {found.verdict}")
    if found.change:
        said.append(
            f"what fits: {found.change.flags}, with {found.change.peak / GB:.2f} GB and "
            f"{found.change.effective_tokens_per_second:,.0f} effective tokens/s"
        )
    if found.effective_tokens_per_second is not None and found.interval is not None and found.seconds is not None:
        low, high = found.interval
        said.append(
            f"speed: {found.effective_tokens_per_second:,.0f} effective tokens/s, {low:,.0f} to {high:,.0f} with 90%"
        )
        money = "" if found.cost is None else f", ${found.cost:.2f}"
        said.append(f"time: {found.seconds:,.0f} s for {found.steps} steps without start-up{money}")
    return said
