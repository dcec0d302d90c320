"""Traces steps with Paddle's profiler, for --profile."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import device
import paddle
from paddle.base import core
from paddle.profiler import Profiler, ProfilerTarget, RecordEvent

from tunebench.profile.trace import (
    ATTENTION,
    COLLECTIVE,
    COPY,
    CPU,
    FILL,
    GPU,
    KERNEL,
    LAUNCH,
    MEMORY,
    OPERATOR,
    RANGE,
    WINDOW,
    write_trace,
)

# Paddle's types of events in the categories of torch's profiler. All other types are operators or parts of one.
CATEGORIES = {
    "CudaRuntime": LAUNCH,
    "Kernel": KERNEL,
    "Memcpy": COPY,
    "Memset": FILL,
    **dict.fromkeys(("Backward", "Dataloader", "Forward", "Optimization", "ProfileStep", "PythonUserDefined"), RANGE),
}
# How the names begin of a process group's functions that communicate.
COLLECTIVES = ("all_", "allreduce", "alltoall", "barrier", "broadcast", "gather", "recv", "reduce", "scatter", "send")


@contextlib.contextmanager
def tracing(path: Path) -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """Traces what runs within it: operators, kernels, ranges and memory. Then writes the trace to `path`, gzipped.

    Yields `marking`. Raises `BadInput` where the file cannot be written.
    """
    targets = [ProfilerTarget.CPU, *[ProfilerTarget.GPU] * (paddle.device.cuda.device_count() > 0)]
    # Without `on_trace_ready` it would write Paddle's own file to the working folder.
    profiler = Profiler(targets=targets, on_trace_ready=lambda _: None, profile_memory=True)
    with marked_products(), marked_collectives(), profiler:
        yield marking
    write_trace(path, list(events(profiler.profiler_result)))


@contextlib.contextmanager
def marking() -> Iterator[None]:
    """Marks the steps in it as those that are looked at. All processes begin them together."""
    device.synchronize()
    with RecordEvent(WINDOW):
        yield
        device.wait()


@contextlib.contextmanager
def marked_products() -> Iterator[None]:
    """Marks the products of two batches of matrices, which are attention's, and their gradients.

    Paddle 3.3.1 calls them as it calls the products with weights, and its profiler tells no shapes.
    """
    product = paddle.matmul

    def marked(x: paddle.Tensor, y: paddle.Tensor, *args: Any, **kwargs: Any) -> paddle.Tensor:
        if min(x.ndim, y.ndim) < 3:
            return product(x, y, *args, **kwargs)
        with RecordEvent(ATTENTION):
            result = product(x, y, *args, **kwargs)
        if not result.stop_gradient:
            result.register_hook(mark)
        return result

    paddle.matmul = marked
    try:
        yield
    finally:
        paddle.matmul = product


@contextlib.contextmanager
def marked_collectives() -> Iterator[None]:
    """On a CPU marks what gloo's groups are called for and waited for, which Paddle's profiler leaves out."""
    calls = [(core.ProcessGroup, name) for name in dir(core.ProcessGroup) if name.startswith(COLLECTIVES)]
    kept = [(owner, name, getattr(owner, name)) for owner, name in [*calls, (core.task, "wait")]]
    if paddle.device.cuda.device_count():
        kept = []  # NCCL's kernels are in the trace
    for owner, name, call in kept:
        setattr(owner, name, named(COLLECTIVE + name, call))
    try:
        yield
    finally:
        for owner, name, call in kept:
            setattr(owner, name, call)


def named(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """A function that does the same within a range of this name."""

    @functools.wraps(call)
    def within(*args: Any, **kwargs: Any) -> Any:
        with RecordEvent(name):
            return call(*args, **kwargs)

    return within


def mark(_: paddle.Tensor) -> None:
    """A hook of a product's gradient. The engine calls it just before it computes those of the operands."""
    with RecordEvent(ATTENTION):
        pass


def events(result: Any) -> Iterator[dict[str, Any]]:
    """The events of a profiler's result, in Chrome's format with the categories and arguments of torch's profiler.

    The result has a tree of nodes for each thread. Its root stands for the thread.
    """
    for root in result.get_data().values():
        nodes = [root]
        while nodes:
            node = nodes.pop()
            nodes += node.children_node
            if node is not root:
                yield span(node, node.process_id, node.thread_id, {})
            for launch in node.runtime_node:
                yield span(launch, launch.process_id, launch.thread_id, {"correlation": launch.correlation_id})
                for kernel in launch.device_node:
                    yield span(kernel, kernel.device_id, kernel.stream_id, {"correlation": kernel.correlation_id})
            for change in node.mem_node:
                if "Reserved" not in change.type.name:
                    yield {
                        "ph": "i",
                        "cat": OPERATOR,
                        "name": MEMORY,
                        "s": "t",
                        "pid": change.process_id,
                        "tid": change.thread_id,
                        "ts": change.timestamp_ns / 1000,
                        "args": {
                            "Bytes": change.increase_bytes,
                            "Device Type": GPU if "gpu" in change.place else CPU,
                            "Total Allocated": change.current_allocated,
                        },
                    }


def span(node: Any, process: int, thread: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """An event with a duration."""
    return {
        "ph": "X",
        "cat": CATEGORIES.get(node.type.name, OPERATOR),
        "name": node.name,
        "pid": process,
        "tid": thread,
        "ts": node.start_ns / 1000,
        "dur": (node.end_ns - node.start_ns) / 1000,
        "args": {"type": node.type.name, **arguments},
    }
