"""The device of a run: its name, its peak memory, its speed, and how to wait for it."""

import parallel
import torch

from tunebench.flags import Flags
from tunebench.hardware import best_product, peak_resident_bytes


def name() -> str:
    """`cpu`, or the GPU's name."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    """Waits until the device has done all that it was given, on every process."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    parallel.barrier()


def peak_memory_bytes() -> int:
    """The most memory held: by tensors on a GPU, by the whole process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak_resident_bytes()


def matmul_flops(flags: Flags) -> int:
    """Operations per second of the best of five products of square matrices, in the dtype of the run's products.

    On a CPU they are in float32: torch has no fast products in low precision on every CPU.
    """
    gpu = torch.cuda.is_available()
    size, dtype = (8192, getattr(torch, flags.compute_dtype)) if gpu else (2048, torch.float32)
    a, b = (torch.rand(size, size, dtype=dtype, device="cuda" if gpu else "cpu") for _ in range(2))
    return best_product(a, b, synchronize)
