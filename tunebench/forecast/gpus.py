"""GPUs and links that a run can be planned for, with their makers' published figures."""

from dataclasses import dataclass

GB = 10**9


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    - `name`: what NVIDIA's library calls it, in part.
    - `memory_bytes`: what CUDA shows as its memory.
    - `low_flops`: dense bf16 and fp16 operations per second with sums in float32. `single_flops`: float32 without TF32.
    - `memory_bandwidth`: bytes per second. `link`: what usually joins the GPUs of a node, a key of LINKS.
    - `between_nodes`: bytes per second of a GPU to other nodes, by InfiniBand.
    """

    name: str
    memory_bytes: int
    low_flops: float
    single_flops: float
    memory_bandwidth: float
    link: str
    between_nodes: float


@dataclass(frozen=True)
class Link:
    """What joins the GPUs of a node: bytes per second that a GPU sends while it receives as many."""

    bandwidth: float


# One direction, as the makers print it. PCIe by https://pcisig.com: 16 lanes; what is reached is a fitted fraction.
LINKS = {
    "nvlink3": Link(300 * GB),
    "nvlink4": Link(450 * GB),
    "nvlink5": Link(900 * GB),
    "pcie4": Link(32 * GB),
    "pcie5": Link(64 * GB),
}
# NVIDIA's data sheets: A100 (nvidia-a100-datasheet), H100 and H200 SXM, B200 (HGX), L40S, GeForce RTX 4090 and 5090
# (Ada and Blackwell architecture papers). Sparsity is left out of all rates. Memory is what cudaMemGetInfo shows as a
# total, with ECC on where the GPU has it. InfiniBand: 200 Gb/s per A100, 400 Gb/s per newer one, 100 Gb/s elsewhere.
GPUS = {
    "a100-40g": Gpu("A100-SXM4-40GB", 42_297_786_368, 312e12, 19.5e12, 1555 * GB, "nvlink3", 25 * GB),
    "a100-80g": Gpu("A100-SXM4-80GB", 84_987_740_160, 312e12, 19.5e12, 2039 * GB, "nvlink3", 25 * GB),
    "h100": Gpu("H100 80GB HBM3", 84_942_979_072, 989e12, 67e12, 3350 * GB, "nvlink4", 50 * GB),
    "h200": Gpu("H200", 150_109_880_320, 989e12, 67e12, 4800 * GB, "nvlink4", 50 * GB),
    "b200": Gpu("B200", 191_510_000_000, 2250e12, 75e12, 7700 * GB, "nvlink5", 50 * GB),
    "l40s": Gpu("L40S", 47_669_313_536, 362e12, 91.6e12, 864 * GB, "pcie4", 12.5 * GB),
    "rtx-4090": Gpu("RTX 4090", 25_393_692_672, 165.2e12, 82.6e12, 1008 * GB, "pcie4", 12.5 * GB),
    "rtx-5090": Gpu("RTX 5090", 33_670_000_000, 209.5e12, 104.8e12, 1792 * GB, "pcie5", 12.5 * GB),
}
DEFAULT_GPU = "a100-80g"


def kind_of(name: str) -> str | None:
    """The key in GPUS of a GPU by the name that NVIDIA's library gives it; None where it is none of them."""
    words = name.upper().replace("-", " ")
    return next((key for key, gpu in GPUS.items() if gpu.name.upper().replace("-", " ") in words), None)
