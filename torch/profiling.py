"""Traces steps with torch's profiler, for --profile."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import device
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from tunebench.files import write_atomically
from tunebench.profile.trace import WINDOW


@contextlib.contextmanager
def tracing(path: Path) -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """Traces what runs within it: operators, kernels, ranges and memory. Then writes the trace to `path`, gzipped.

    Yields `marking`. Raises `BadInput` where the file cannot be written.
    """
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
    with profile(activities=activities, record_shapes=True, profile_memory=True) as profiler:
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
