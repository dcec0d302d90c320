"""The trace of a rank, as both sides write it: Chrome's format with the categories and arguments of torch's profiler.

paddle/profiling.py writes what Paddle's profiler found in this layout. Its own Chrome files have times in whole
microseconds, durations within the names, and two rows for each thread.
"""

import gzip
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from tunebench.files import write_atomically

WINDOW = "traced steps"  # the name of the range around the steps
# The name of a range around attention's matrix products where a profiler tells no shapes. In the backward pass a range
# of that name lies in the event of the engine that computes the product's gradients.
ATTENTION = "attention"
# The names of ranges without length between which the backward pass of a norm runs. In the forward pass a range around
# it has the name of the layer's class.
NORM_BEGINS, NORM_ENDS = "backward pass of a norm begins", "backward pass of a norm ends"
SUFFIX = ".json.gz"
MEMORY = "[memory]"
OPERATOR, RANGE, LAUNCH = "cpu_op", "user_annotation", "cuda_runtime"
KERNEL, COPY, FILL = "kernel", "gpu_memcpy", "gpu_memset"
HOST = (OPERATOR, RANGE, LAUNCH, "cuda_driver")
DEVICE = (KERNEL, COPY, FILL)
# How the names of ranges begin that are operators: gloo's collectives, and calls of what torch's compiler made, whose
# kernels have no events on a CPU.
COLLECTIVE, COMPILED = "gloo:", "## Call CompiledFxGraph"
CPU, GPU = 0, 1  # the types of devices in torch's events about memory


@dataclass(eq=False, slots=True)
class Event:
    """A span of time, in microseconds. `parent` is the span of the same thread around it.

    `dims` has the number of dimensions of each operand of an operator, where the profiler tells. `attends` says that a
    range named `ATTENTION` lies in it, `of_norm` that it began in the backward pass of a norm.
    """

    name: str
    category: str
    start: float
    end: float
    correlation: int | None = None
    dims: tuple[int, ...] = ()
    parent: Self | None = None
    attends: bool = False
    of_norm: bool = False


@dataclass
class Trace:
    """The events of one process.

    - `start` and `end`: of the traced steps, in microseconds, as all times here.
    - `threads`: what ran on the host, by thread. Ranges that a script or a library names are among it.
    - `device`: what ran on the GPU.
    - `memory`: when tensors took or gave back bytes, how many, and on which type of device.
    """

    start: float
    end: float
    threads: dict[Any, list[Event]] = field(default_factory=dict)
    device: list[Event] = field(default_factory=list)
    memory: list[tuple[float, int, int]] = field(default_factory=list)


def write_trace(path: Path, events: list[dict[str, Any]]) -> None:
    """Writes events in Chrome's format, gzipped. Raises `BadInput` where the file cannot be written."""
    content = {"displayTimeUnit": "ms", "traceEvents": events}
    write_atomically(path, gzip.compress(json.dumps(content).encode(), compresslevel=6))


def read_trace(path: Path) -> Trace:
    """Reads a trace file. Raises ValueError where it has no traced steps, and OSError."""
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
        found = json.load(file, strict=False)["traceEvents"]
    windows = [each for each in found if each.get("name") == WINDOW and each.get("cat") == RANGE]
    if len(windows) != 1:
        raise ValueError(f"{path.name}: {len(windows)} ranges are named {WINDOW}, not one")
    start = float(windows[0]["ts"])
    trace = Trace(start, start + float(windows[0]["dur"]))
    for each in found:
        arguments = each.get("args", {})
        if each.get("name") == MEMORY:
            trace.memory.append((float(each["ts"]), int(arguments["Bytes"]), int(arguments["Device Type"])))
        elif each.get("ph") == "X" and each["cat"] in (*HOST, *DEVICE):
            event = Event(each["name"], each["cat"], float(each["ts"]), float(each["ts"]) + float(each["dur"]))
            if event.name.startswith((COLLECTIVE, COMPILED)):
                event.category = OPERATOR
            event.correlation = arguments.get("correlation")
            event.dims = tuple(len(dims) if isinstance(dims, list) else 0 for dims in arguments.get("Input Dims", ()))
            if event.category in DEVICE:
                trace.device.append(event)
            elif event.name != WINDOW:
                trace.threads.setdefault(each["tid"], []).append(event)
    trace.memory.sort()
    return trace
