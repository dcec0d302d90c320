"""The device of a run: its name, its peak memory, its speed, and how to wait for it."""

import paddle
import parallel

from tunebench.flags import Flags
from tunebench.hardware import best_product, peak_resident_bytes


def name() -> str:
    """`cpu`, or the GPU's name."""
    return paddle.device.cuda.get_device_name() if paddle.device.cuda.device_count() else "cpu"


def synchronize() -> None:
    """Waits until the device has done all that it was given, on every process."""
    if paddle.device.cuda.device_count():
        paddle.device.synchronize()
    parallel.barrier()


def peak_memory_bytes() -> int:
    """The most memory held: by tensors on a GPU, by the whole process on a CPU."""
    if paddle.device.cuda.device_count():
        return paddle.device.cuda.max_memory_allocated()
    return peak_resident_bytes()


def matmul_flops(flags: Flags) -> int:
    """Operations per second of the best of five products of square matrices, in the dtype of the run's products.

    On a CPU they are in float32: Paddle has no other matrix product there.
    """
    size, dtype = (8192, flags.compute_dtype) if paddle.device.cuda.device_count() else (2048, "float32")
    a, b = (paddle.rand([size, size]).astype(dtype) for _ in range(2))
    return best_product(a, b, synchronize)
