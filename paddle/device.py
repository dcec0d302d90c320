"""The device of a run: its name, its peak memory, its speed, and how to wait for it."""

import paddle
import parallel

from tunebench.flags import Flags
from tunebench.hardware import peak_resident_bytes, product_rate, reset_peak_resident_bytes


def name() -> str:
    """`cpu`, or the GPU's name."""
    return paddle.device.cuda.get_device_name() if paddle.device.cuda.device_count() else "cpu"


def wait() -> None:
    """Waits until this process's device has done all queued work."""
    if paddle.device.cuda.device_count():
        paddle.device.synchronize()


def synchronize() -> None:
    """Waits until the devices of all processes have done all queued work."""
    wait()
    parallel.barrier()


def reset_peak_memory() -> None:
    """Lets the peak of memory count from now on: building a model may take more than training it."""
    if paddle.device.cuda.device_count():
        paddle.device.cuda.reset_max_memory_allocated()
    reset_peak_resident_bytes()


def peak_memory_bytes() -> int:
    """The most memory held since `reset_peak_memory`: by tensors on a GPU, by the whole process on a CPU."""
    if paddle.device.cuda.device_count():
        return paddle.device.cuda.max_memory_allocated()
    return peak_resident_bytes()


def matmul_flops(flags: Flags) -> int:
    """Operations per second of products of square matrices, in the dtype of the run's products.

    On a CPU they are in float32: Paddle has no other matrix product there.
    """
    gpu = paddle.device.cuda.device_count() > 0
    size, dtype, products = (8192, flags.compute_dtype, 20) if gpu else (1024, "float32", 10)
    a, b = (paddle.rand([size, size]).astype(dtype) for _ in range(2))
    return product_rate(a, b, products, synchronize)
