"""Whether a run fits into a GPU's memory, with the margin stated."""

from typing import Literal, NamedTuple

from tunebench.forecast.gpus import Gpu

GB = 10**9
# Beside the allocator's tensors: the CUDA context with the frameworks' kernels, and NCCL's buffers (some MB for each
# peer; https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html, NCCL_BUFFSIZE).
CONTEXT_BYTES = 600 * 10**6
NCCL_BYTES = 500 * 10**6
# An allocator holds more than its tensors take: blocks are rounded, and gaps stay between them.
FRAGMENTATION = 0.05

Verdict = Literal["fits", "marginal", "out of memory", "unsupported"]


class Room(NamedTuple):
    """What a GPU has and what a run needs, in bytes. `usable` is without what is not the allocator's."""

    total: int
    usable: int
    needed: int  # with the margin for fragmentation
    verdict: Verdict


def judge(peak: int, gpu: Gpu, processes: int, cpu: bool = False) -> Room:
    """`fits` with the margin for fragmentation, `marginal` only without it, else `out of memory`. A CPU has no CUDA."""
    usable = gpu.memory_bytes - (0 if cpu else CONTEXT_BYTES + NCCL_BYTES * (processes > 1))
    needed = int(peak * (1 + FRAGMENTATION))
    verdict: Verdict = "fits" if needed <= usable else "marginal" if peak <= usable else "out of memory"
    return Room(gpu.memory_bytes, usable, needed, verdict)
