"""Traces steps with Paddle's profiler, for --profile."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import device
import paddle
from paddle import distributed
from paddle.base import core
from paddle.distributed import fleet
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
    NORM_BEGINS,
    NORM_ENDS,
    OPERATOR,
    RANGE,
    WINDOW,
    write_trace,
)

Marking = Callable[[], contextlib.AbstractContextManager[None]]
# Paddle's types of events in the categories of torch's profiler. All other types are operators or parts of one.
CATEGORIES = {
    "CudaRuntime": LAUNCH,
    "Kernel": KERNEL,
    "Memcpy": COPY,
    "Memset": FILL,
    **dict.fromkeys(("Backward", "Dataloader", "Forward", "Optimization", "ProfileStep", "PythonUserDefined"), RANGE),
}
ACCUMULATION = "Global_GradNodeAccumulation"
# How the names begin of a process group's functions that communicate.
COLLECTIVES = ("all_", "allreduce", "alltoall", "barrier", "broadcast", "gather", "recv", "reduce", "scatter", "send")


def tracer(model: paddle.nn.Layer) -> Callable[[Path], contextlib.AbstractContextManager[Marking]]:
    """`tracing` of this model's steps."""
    return functools.partial(tracing, model)


@contextlib.contextmanager
def tracing(model: paddle.nn.Layer, path: Path) -> Iterator[Marking]:
    """Traces what runs within it: operators, kernels, ranges and memory. Then writes the trace to `path`, gzipped.

    Yields `marking`. Raises `BadInput` where the file cannot be written.
    """
    targets = [ProfilerTarget.CPU, *[ProfilerTarget.GPU] * (paddle.device.cuda.device_count() > 0)]
    # Without `on_trace_ready` it would write Paddle's own file to the working folder.
    profiler = Profiler(targets=targets, on_trace_ready=lambda _: None, profile_memory=True)
    with marked_norms(model), marked_products(), marked_collectives(), profiler:
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
def marked_norms(model: paddle.nn.Layer) -> Iterator[None]:
    """Marks the backward pass of the norms, which may consist of operators that other layers have too.

    Paddle's profiler has a range for the forward pass of each layer.
    """

    def end(_: paddle.nn.Layer, inputs: tuple[paddle.Tensor, ...], output: paddle.Tensor) -> None:
        if not output.stop_gradient and not inputs[0].stop_gradient:
            output.register_hook(lambda _: mark(NORM_BEGINS))
            inputs[0].register_hook(lambda _: mark(NORM_ENDS))

    norms = [layer for layer in model.sublayers() if type(layer).__name__.endswith("Norm")]
    hooks = [norm.register_forward_post_hook(end) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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
            result.register_hook(lambda _: mark(ATTENTION))  # just before the engine computes the operands' gradients
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


def mark(name: str) -> None:
    """Puts a range of this name and without length into the trace."""
    with RecordEvent(name):
        pass


def events(result: Any) -> Iterator[dict[str, Any]]:
    """The events of a profiler's result, in Chrome's format with the categories and arguments of torch's profiler.

    The result has a tree of nodes for each thread. Its root stands for the thread. Times count from the first node:
    a float has no room for the nanoseconds since 1970.
    """
    roots = result.get_data().values()
    zero = min(node.start_ns for root in roots for node in root.children_node)
    renamed = {ACCUMULATION: f"{COLLECTIVE}DataParallel"} if accumulation_sends() else {}
    for root in roots:
        nodes = [root]
        while nodes:
            node = nodes.pop()
            nodes += node.children_node
            if node is not root:
                yield span(node, renamed.get(node.name, node.name), zero, node.process_id, node.thread_id)
            for call in node.runtime_node:
                yield span(call, call.name, zero, call.process_id, call.thread_id, correlation=call.correlation_id)
                for one in call.device_node:
                    yield span(one, one.name, zero, one.device_id, one.stream_id, correlation=one.correlation_id)
            yield from (change_of_memory(each, zero) for each in node.mem_node if "Reserved" not in each.type.name)


def accumulation_sends() -> bool:
    """Whether DataParallel sends gradients with gloo, in the engine's events that accumulate them.

    It has no events of its own there. In one process these events last for no time of their own.
    """
    if paddle.device.cuda.device_count() or not distributed.is_initialized():
        return False
    return fleet.get_hybrid_communicate_group().get_data_parallel_world_size() > 1


def span(node: Any, name: str, zero: int, process: int, thread: int, **arguments: Any) -> dict[str, Any]:
    """An event with a duration."""
    return {
        "ph": "X",
        "cat": CATEGORIES.get(node.type.name, OPERATOR),
        "name": name,
        "pid": process,
        "tid": thread,
        "ts": (node.start_ns - zero) / 1000,
        "dur": (node.end_ns - node.start_ns) / 1000,
        "args": {"type": node.type.name, **arguments},
    }


def change_of_memory(node: Any, zero: int) -> dict[str, Any]:
    """The event of bytes that a tensor took or gave back."""
    return {
        "ph": "i",
        "s": "t",
        "cat": "cpu_instant_event",
        "name": MEMORY,
        "pid": node.process_id,
        "tid": node.thread_id,
        "ts": (node.timestamp_ns - zero) / 1000,
        "args": {
            "Bytes": node.increase_bytes,
            "Device Type": GPU if "gpu" in node.place else CPU,
            "Total Allocated": node.current_allocated,
        },
    }
