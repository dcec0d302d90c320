"""The device of a run: its name, its peak memory, its speed, and how to wait for it."""

import parallel
import torch

from tunebench.flags import Flags
from tunebench.hardware import peak_resident_bytes, product_rate, reset_peak_resident_bytes


def name() -> str:
    """`cpu`, or the GPU's name."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def wait() -> None:
    """Waits until this process's device has done all queued work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def synchronize() -> None:
    """Waits until the devices of all processes have done all queued work."""
    wait()
    parallel.barrier()


def reset_peak_memory() -> None:
    """Lets the peak of memory count from now on: building a model may take more than training it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    reset_peak_resident_bytes()


def peak_memory_bytes() -> int:
    """The most memory held since `reset_peak_memory`: by tensors on a GPU, by the whole process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak_resident_bytes()


def matmul_flops(flags: Flags) -> int:
    """Operations per second of products of square matrices, in the dtype of the run's products.

    On a CPU they are in float32: torch has no fast products in low precision on every CPU.
    """
    gpu = torch.cuda.is_available()
    size, dtype, products = (8192, getattr(torch, flags.compute_dtype), 20) if gpu else (1024, torch.float32, 10)
    a, b = (torch.rand(size, size, dtype=dtype, device="cuda" if gpu else "cpu") for _ in range(2))
    return product_rate(a, b, products, synchronize)
