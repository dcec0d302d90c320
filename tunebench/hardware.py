"""What the run ran on: read from the system and from NVIDIA's library, without any framework."""

import os
import platform
from importlib import metadata
from pathlib import Path

import psutil
import pynvml
from pydantic import BaseModel

from tunebench.bootstrap import cpuinfo

# What decides threads and kernels before a library loads. Recorded as found, unset ones left out.
MATHS_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "MKL_DEBUG_CPU_TYPE",
    "NVIDIA_TF32_OVERRIDE",
    "CUDA_VISIBLE_DEVICES",
)
PACKAGES = {
    "torch": ("torch", "transformers", "peft", "accelerate", "deepspeed"),
    "paddle": ("paddlepaddle", "paddlepaddle-gpu", "paddlenlp"),
    "shared": ("numpy", "datasets", "tokenizers", "safetensors"),
}


class Hardware(BaseModel):
    """The machine of a run. Memory in bytes; `threads` is what both maths libraries were told to use.

    `device` is what the framework trained on, None before it said so; `accelerators` are those that were visible.
    """

    cpu: str
    cores: int
    threads: int
    memory_bytes: int
    kernel: str
    environment: dict[str, str]
    device: str | None
    accelerators: list[str]
    driver: str | None


def read_hardware() -> Hardware:
    """The hardware as this process sees it: `cores` are those that it may use."""
    return Hardware(
        cpu=next(iter(cpuinfo("model name")), platform.processor() or platform.machine()),
        cores=len(os.sched_getaffinity(0)),
        threads=int(os.environ.get("OMP_NUM_THREADS", "1").split(",")[0]),
        memory_bytes=psutil.virtual_memory().total,
        kernel=platform.release(),
        environment={name: os.environ[name] for name in MATHS_VARIABLES if name in os.environ},
        device=None,
        accelerators=visible_accelerators(),
        driver=_driver(),
    )


def peak_resident_bytes() -> int:
    """The most memory that this process has held: VmHWM of proc(5).

    getrusage's ru_maxrss starts at the peak of the process that started this one.
    """
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def visible_accelerators() -> list[str]:
    """The names of the NVIDIA GPUs that this process may use; empty without a driver."""
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        gpus = [(pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle)) for handle in handles]
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return []
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return [name for _, name in gpus]
    visible = []
    for entry in map(str.strip, chosen.split(",")):  # an index, or the start of a UUID
        fits = [name for i, (uuid, name) in enumerate(gpus) if entry and (entry == str(i) or uuid.startswith(entry))]
        visible.extend(fits[:1])
    return visible


def read_versions(framework: str) -> dict[str, str]:
    """The versions of Python and of the packages that decide speed, as installed."""
    versions = {"python": platform.python_version()}
    for name in (*PACKAGES[framework], *PACKAGES["shared"]):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _driver() -> str | None:
    try:
        pynvml.nvmlInit()
        return pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError:
        return None
