"""Traces steps with torch's profiler, for --profile."""

import contextlib
import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import device
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from tunebench.files import write_atomically
from tunebench.profile.trace import NORM_BEGINS, NORM_ENDS, WINDOW

Marking = Callable[[], contextlib.AbstractContextManager[None]]


def tracer(model: torch.nn.Module) -> Callable[[Path], contextlib.AbstractContextManager[Marking]]:
    """`tracing` of this model's steps."""
    return functools.partial(tracing, model)


@contextlib.contextmanager
def tracing(model: torch.nn.Module, path: Path) -> Iterator[Marking]:
    """Traces what runs within it: operators, kernels, ranges and memory. Then writes the trace to `path`, gzipped.

    Yields `marking`. Raises `BadInput` where the file cannot be written.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it prints when it starts and stops
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
    with marked_norms(model), profile(activities=activities, record_shapes=True, profile_memory=True) as profiler:
        yield marking
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / path.name
        profiler.export_chrome_trace(str(file))
        write_atomically(path, file.read_bytes())


@contextlib.contextmanager
def marking() -> Iterator[None]:
    """Marks the steps in it as those that are looked at. All processes begin them together."""
    device.synchronize()
    with record_function(WINDOW):
        yield
        device.wait()


@contextlib.contextmanager
def marked_norms(model: torch.nn.Module) -> Iterator[None]:
    """Marks both passes of the norms, which may consist of operators that other layers have too."""
    ranges: list[record_function] = []

    def begin(norm: torch.nn.Module, _: Any) -> None:
        ranges.append(record_function(type(norm).__name__))
        ranges[-1].__enter__()

    def end(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ranges.pop().__exit__(None, None, None)
        if output.requires_grad and inputs[0].requires_grad:
            output.register_hook(lambda _: mark(NORM_BEGINS))
            inputs[0].register_hook(lambda _: mark(NORM_ENDS))

    norms = [module for module in model.modules() if type(module).__name__.endswith("Norm")]
    hooks = [
        hook for norm in norms for hook in (norm.register_forward_pre_hook(begin), norm.register_forward_hook(end))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def mark(name: str) -> None:
    """Puts a range of this name and without length into the trace."""
    with record_function(name):
        pass
