"""The machine of a forecast: a kind of GPU by its maker's figures, or the machine of records that calibrate it."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from tunebench.flags import WITHOUT_FORMULA, Flags
from tunebench.forecast.gpus import DEFAULT_GPU, GPUS, LINKS, Gpu, Link
from tunebench.forecast.memory import Memory, with_more, with_unseen
from tunebench.forecast.speed import Speed, fitted, forecast_speed, interval_of, unlike
from tunebench.forecast.verdict import Room, judge
from tunebench.models.checkpoint import Checkpoint
from tunebench.plan import Plan
from tunebench.record import Strict

SIZES = 2.0  # models of half to twice the size of the records' are like them


class Calibration(Strict):
    """What records of runs on a machine say of a forecast.

    - `records`: how many there are. `machine`: their CPU or GPU.
    - `time_factor`: the forecast seconds are multiplied by it. `interval_factor`: the interval is rate ÷ and × it.
    - `counter`: what the records' peaks of memory count. None where no formula knows the memory of their runs.
    - `unseen_share`: of what a step adds, so much is added, where the framework's allocator counts.
    - `resident_bytes`: so much is added to the tensors, where the memory of a process was measured.
    """

    records: int
    machine: str
    time_factor: float
    interval_factor: float
    counter: str | None
    unseen_share: float | None = None
    resident_bytes: int | None = None

    def added_to(self, memory: Memory) -> Memory:
        """The forecast tensors, and what the records' runs held beside them."""
        if self.resident_bytes is not None:
            return with_more(memory, self.resident_bytes)
        return with_unseen(memory) if self.unseen_share is None else with_unseen(memory, self.unseen_share)

    @property
    def in_words(self) -> str:
        """The calibration as a line of text."""
        rule = "not calibrated"
        if self.unseen_share is not None:
            rule = f"{self.unseen_share:+.1%} of what a step adds ({self.counter})"
        elif self.resident_bytes is not None:
            rule = f"{self.resident_bytes / 1e9:+.2f} GB of libraries and code as workspace ({self.counter})"
        said = f"calibrated by {self.records} record(s) of {self.machine}: seconds x {self.time_factor:.3f}"
        return f"{said}; memory: {rule}"


class Traits(NamedTuple):
    """In what a calibrated run may be unlike all records. Each such trait widens the interval."""

    nodes: int
    processes: int
    zero: int
    fsdp: bool
    mp: int
    low: bool
    compiled: bool
    lean: bool
    overlap: bool
    others: tuple[bool, ...]  # the flags of WITHOUT_FORMULA

    @classmethod
    def of(cls, flags: Flags) -> "Traits":
        """Those of a run."""
        low = flags.dtype != "fp32"
        split = (flags.nnodes, flags.world_size, flags.zero, flags.fsdp, flags.mp)
        others = tuple(vars(flags)[name] for name in WITHOUT_FORMULA)
        return cls(*split, low, flags.compile, flags.lean, flags.overlap and flags.world_size > 1, others)


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a run is forecast for. `cpu`: the processes of a node share `gpu`, which stands for the node's CPU.

    `seen` are the records' traits and numbers of parameters.
    """

    name: str
    gpu: Gpu
    link_name: str
    link: Link
    cpu: bool = False
    calibration: Calibration | None = None
    seen: tuple[tuple[Traits, int], ...] = ()

    def each(self, processes: int) -> Gpu:
        """What one of so many processes of a node has."""
        if not self.cpu:
            return self.gpu
        shared: dict[str, Any] = {
            name: getattr(self.gpu, name) / processes for name in ("low_flops", "single_flops", "memory_bandwidth")
        }
        return dataclasses.replace(self.gpu, memory_bytes=self.gpu.memory_bytes // processes, **shared)

    def memory(self, tensors: Memory) -> Memory:
        """The forecast tensors, and what is held beside them."""
        return with_unseen(tensors) if self.calibration is None else self.calibration.added_to(tensors)

    def judge(self, peak: int, flags: Flags) -> Room:
        """Whether a process with this peak fits."""
        return judge(peak, self.each(flags.nproc), flags.world_size, self.cpu)

    def speed(self, framework: str, method: str, flags: Flags, checkpoint: Checkpoint, plan: Plan) -> Speed:
        """The speed of a run."""
        found = forecast_speed(framework, method, flags, checkpoint, plan, self.each(flags.nproc), self.link)
        rate, factor = found.effective_tokens_per_second / self.time_factor, self.time_factor
        return Speed(
            rate,
            self.interval(framework, rate, flags, checkpoint.parameters),
            found.step_seconds * factor,
            found.seconds * factor,
            {kind: seconds * factor for kind, seconds in found.parts.items()},
        )

    @property
    def time_factor(self) -> float:
        """By which the forecast seconds are multiplied."""
        return 1.0 if self.calibration is None else self.calibration.time_factor

    def interval(self, framework: str, rate: float, flags: Flags, parameters: int) -> tuple[float, float]:
        """The interval around a rate."""
        if self.calibration is None:
            half = fitted()[framework][1]
            return interval_of(rate, half, len(unlike(framework, flags, parameters, self.gpu, self.link)))
        half = math.log(self.calibration.interval_factor)
        return interval_of(rate, half, unlike_all(self.seen, Traits.of(flags), parameters))


def unlike_all(seen: Sequence[tuple[Traits, int]], traits: Traits, parameters: int) -> int:
    """In how many traits a run is unlike all runs that were seen."""
    new = sum(all(each[i] != value for each, _ in seen) for i, value in enumerate(traits))
    sizes = [size for _, size in seen]
    return new + (not min(sizes) / SIZES <= parameters <= max(sizes) * SIZES)


def machine_of_kind(gpu: str | None, link: str | None) -> Machine:
    """The machine with this kind of GPU, joined by `link` or by what such GPUs usually have."""
    kind = gpu or DEFAULT_GPU
    link_name = link or GPUS[kind].link
    return Machine(kind, GPUS[kind], link_name, LINKS[link_name])
