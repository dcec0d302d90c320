"""Reads the machine of a run from the system and from NVIDIA's library, without any framework."""

import contextlib
import ctypes
import functools
import hashlib
import itertools
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pynvml
from pydantic import BaseModel, ConfigDict, TypeAdapter

from tunebench.bootstrap import cpuinfo
from tunebench.errors import BadInput

# All variables that can change speed or numbers: threads, kernels, compilers, memory, libraries, communication, and the
# switches of both stacks. They are recorded as found. Records with other values are of another machine.
DECISIVE = re.compile(
    r"(G|LIB)?OMP_|KMP_|MKL(DNN)?_|ONEDNN_|DNNL_|OPENBLAS_|GOTO_|BLIS_|BLAS_|VECLIB_|NUMEXPR_|TBB_|ATEN_|C10_|NPY_|SLEEF_"
    r"|TORCH|PYTORCH_|INDUCTOR_|TRITON_|(CC|CXX|CFLAGS|CXXFLAGS|CPPFLAGS|LDFLAGS|CPATH|LIBRARY_PATH)$"
    # Paddle's:
    r"|FLAGS_|GLOG_|PADDLE_|CINN_|CPU_NUM$|PARALLEL_CROSS_ENTROPY$|(skip_sharding3|stride_in_no_check)_"
    r"|USE_(CASUAL_MASK|SAGE_ATTN|FAST|TYPE$|TORCH|TF$|JAX$|FLAX$|KERNELS|HUB_KERNELS|CUDA|NCCL|GLOO|LIBUV)"
    r"|TRANSFORMERS_|PEFT_|ACCELERATE_|FSDP_|DS_(ACCELERATOR|BUILD|SKIP)|DEEPSPEED_|HF_(ENABLE|DEACTIVATE)_"
    r"|FLASH_ATT|XFORMERS_|BNB_|XLA_"
    r"|CUDA_|CUBLAS|CUDNN_|CUSPARSE|CUSOLVER|CUTLASS_|NVIDIA_|NVTE_|HIP_|HSA_|ROCR_"
    r"|(N|R)?CCL_|GLOO_|UC[XC]_|FI_|IBV_|MLX5_|TP_SOCKET_"
    r"|MALLOC_|GLIBC_|(JE|TC|MI)MALLOC_|JE_|LD_|PYTHON(MALLOC|DEVMODE|TRACEMALLOC|FAULTHANDLER|ASYNCIO|HASHSEED)"
)
# Left out: what launchers set for each process, folders and files of one run, and secrets.
OF_A_LAUNCHER = re.compile(
    r"TORCHELASTIC_|TORCH_NCCL_ASYNC_ERROR_HANDLING$|FLAGS_(selected_|START_PORT|FIXED_PORT)"
    r"|PADDLE_(TRAINER|MASTER|BACKUP|GLOBAL|LOCAL|RANK|CURRENT|NNODES|JOB|PORT|WORKER|AUTO_CLUSTER|LOG|DISTRI|ELASTIC|WORLD)"
)
OF_ONE_RUN = re.compile(
    r"(?!FLAGS_|TORCH\w*_CACHE$)"  # these are switches
    r".*(_HOME|_DIR|_CACHE|_CACHE_PATH|_(DEBUG|OUTPUT|LOG|DUMP|TEMP|ERROR)_FILE)$",
    re.IGNORECASE,
)
SECRET = re.compile(r"(?i:TOKEN|KEY|SECRET|PASS(WORD|WD|PHRASE)|CREDENTIAL)|_(PASS|PWD|AUTH|PAT)$")
LOGIN = re.compile(r"://[^/]*@")  # in a value: a name and a password before a host
LEFT_OUT = (OF_A_LAUNCHER.match, OF_ONE_RUN.match, SECRET.search)
RUN_ENVIRONMENT = "TUNEBENCH_RUN_ENVIRONMENT"  # a run gives its own environment to its workers here, as JSON
# mallopt(3): never map, never trim, grow by 64 MiB, one arena.
MALLOC = {-4: 0, -1: 2**31 - 1, -2: 2**26, -8: 1}
LINKS = {
    pynvml.NVML_TOPOLOGY_INTERNAL: "PIX",
    pynvml.NVML_TOPOLOGY_SINGLE: "PIX",
    pynvml.NVML_TOPOLOGY_MULTIPLE: "PXB",
    pynvml.NVML_TOPOLOGY_HOSTBRIDGE: "PHB",
    pynvml.NVML_TOPOLOGY_NODE: "NODE",
    pynvml.NVML_TOPOLOGY_SYSTEM: "SYS",
}


class Accelerator(BaseModel):
    """A GPU as NVIDIA's library describes it; None where it does not say. `sm_clock_mhz` is that of the moment."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: str
    memory_bytes: int | None
    power_limit_watts: float | None
    sm_clock_mhz: int | None
    max_sm_clock_mhz: int | None
    max_memory_clock_mhz: int | None
    ecc: bool | None


PASSING = ("device", "accelerators", "environment")  # fields of Hardware that `lasting` has otherwise


class Hardware(BaseModel):
    """The machine of a run. Memory in bytes; `threads` is what both maths libraries were told to use.

    `machine` is a digest of its name and id, so that two of a kind are told apart. `governor` is that of the cores'
    clocks. `device` is what the framework trained on, None before it said so; `accelerators` are those that were
    visible, `links` what joins each to each, as `nvidia-smi topo -m` abbreviates it (without the number of NVLinks);
    `cuda` is the newest that the driver supports.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    machine: str
    cpu: str
    cores: int
    threads: int
    governor: str | None
    memory_bytes: int
    kernel: str
    environment: dict[str, str]
    device: str | None
    accelerators: list[Accelerator]
    links: list[list[str]]
    driver: str | None
    cuda: str | None

    @property
    def place(self) -> str:
        """The machine as one that noise and series belong to: a virtual machine may move to another processor."""
        return _place(self.machine, self.cpu, self.cores, tuple(accelerator.name for accelerator in self.accelerators))

    def lasting(self) -> dict[str, Any]:
        """What does not change from run to run, by field; a GPU's are `accelerators.INDEX.FIELD`."""
        fields = {name: value for name, value in vars(self).items() if name not in PASSING}
        fields |= {f"environment.{name}": value for name, value in self.environment.items()}
        for i, accelerator in enumerate(self.accelerators):
            fields |= {f"accelerators.{i}.{name}": value for name, value in accelerator if name != "sm_clock_mhz"}
        return fields


def product_rate(a: Any, b: Any, products: int, synchronize: Callable[[], None] = lambda: None) -> int:
    """Operations per second of the product of two square matrices of either framework: the median of five timings.

    Each timing has `products` products, so that waiting does not count. `synchronize` waits for all processes, which
    compute at the same time. A timing ends when all have ended. The best timing of a process would not do: processes
    that share cores would each report the moments in which a core was theirs alone.
    """
    seconds = []
    synchronize()
    for _ in range(6):  # the first one warms up
        start = time.perf_counter()
        for _ in range(products):
            a @ b
        synchronize()
        seconds.append(time.perf_counter() - start)
    return int(2 * len(a) ** 3 * products / statistics.median(seconds[1:]))


def read_hardware() -> Hardware:
    """The hardware as this process sees it: `cores` are those that it may use."""
    with visible_gpus() as gpus:
        cuda = ask(pynvml.nvmlSystemGetCudaDriverVersion) if gpus else None
        return Hardware(
            machine=_machine(),
            cpu=next(iter(cpuinfo("model name")), platform.processor() or platform.machine()),
            cores=len(os.sched_getaffinity(0)),
            threads=int(os.environ.get("OMP_NUM_THREADS", "1").split(",")[0]),
            governor=_governor(),
            memory_bytes=psutil.virtual_memory().total,
            kernel=platform.release(),
            environment=read_environment(),
            device=None,
            accelerators=list(map(_describe, gpus)),
            links=[["X" if a is b else _link(a, b) for b in gpus] for a in gpus],
            driver=ask(pynvml.nvmlSystemGetDriverVersion) if gpus else None,
            cuda=None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}",
        )


@functools.cache
def read_environment() -> dict[str, str]:
    """The environment variables that can change speed or numbers, as the user's command had them.

    The first call must come before a framework is imported: that sets variables too. A worker takes them from what
    started it, since its launcher has added some.
    """
    if RUN_ENVIRONMENT in os.environ:
        try:
            return TypeAdapter(dict[str, str]).validate_json(os.environ[RUN_ENVIRONMENT])
        except ValueError:
            raise BadInput(f"{RUN_ENVIRONMENT} is what a run tells its own workers; unset it") from None
    found = (name for name in sorted(os.environ) if DECISIVE.match(name) and not any(out(name) for out in LEFT_OUT))
    return {_as_text(name): _as_text(os.environ[name]) for name in found if not LOGIN.search(os.environ[name])}


def _as_text(text: str) -> str:
    return os.fsencode(text).decode(errors="backslashreplace")  # a record holds no bytes that are no text


def peak_resident_bytes() -> int:
    """The most memory that this process has held: VmHWM of proc(5).

    getrusage's ru_maxrss starts at the peak of the process that started this one.
    """
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def reset_peak_resident_bytes() -> None:
    """Lets `peak_resident_bytes` count from now on, by clear_refs of proc(5). Some sandboxes do not have it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory in one heap.

    By default glibc maps each tensor of over 32 MiB (at first of over 128 KiB) by itself, and unmaps it when it is
    freed. Then each page of the next one costs a page fault again.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return
    for option, value in MALLOC.items():
        mallopt(option, value)


def visible_accelerators() -> list[str]:
    """The names of the NVIDIA GPUs that this process may use; empty without a driver."""
    with visible_gpus() as gpus:
        return list(map(_name, gpus))


def check_gpus(framework: str, found: bool) -> None:
    """Raises `BadInput` where there are GPUs and the framework found none: it would train on the CPU instead."""
    names = visible_accelerators()
    if names and not found:
        machine = read_hardware()
        newest = f", which supports CUDA up to {machine.cuda}" if machine.cuda else ""
        raise BadInput(
            f"{framework} finds none of the {len(names)} GPU(s) here ({names[0]}); use a build of {framework} for the "
            f"driver {machine.driver or 'that is installed'}{newest}, or hide the GPUs: CUDA_VISIBLE_DEVICES="
        )


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of Python, of these packages where they are installed, and of NVIDIA's libraries."""
    versions = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    # By the folders' names: the metadata of all packages takes a fifth of a second to read.
    readable = [Path(path) for path in sys.path if os.access(path, os.R_OK)]
    found = (path.glob(f"nvidia_{kind}*.dist-info") for path in readable for kind in ("c", "nccl"))
    libraries = sorted((each.name, each.version) for each in map(metadata.Distribution.at, itertools.chain(*found)))
    return versions | dict(libraries)


@functools.lru_cache(maxsize=256)  # a report asks for each run's, and its runs are of few machines
def _place(machine: str, cpu: str, cores: int, accelerators: tuple[str, ...]) -> str:
    kind = f"{cpu} {cores} {list(accelerators)}"
    return f"{machine}-{hashlib.sha256(kind.encode()).hexdigest()[:6]}"


def _machine() -> str:
    path = Path("/etc/machine-id")
    about = f"{platform.node()} {path.read_text().strip() if path.exists() else ''}"
    return hashlib.sha256(about.encode()).hexdigest()[:12]


def _governor() -> str | None:
    files = (Path(f"/sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_governor") for cpu in os.sched_getaffinity(0))
    return ", ".join(sorted({file.read_text().strip() for file in files if file.exists()})) or None


@contextlib.contextmanager
def visible_gpus() -> Iterator[list[Any]]:
    """NVIDIA's handles of the GPUs that this process may use; empty without a driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield []
        return
    try:
        count = ask(pynvml.nvmlDeviceGetCount) or 0
        yield _chosen([ask(pynvml.nvmlDeviceGetHandleByIndex, i) for i in range(count)])
    finally:
        pynvml.nvmlShutdown()


def _chosen(gpus: list[Any]) -> list[Any]:
    """The GPUs that CUDA_VISIBLE_DEVICES names, in its order.

    Like CUDA, it stops at the first name that is none, and gives no GPU where one is named twice.
    """
    entries = os.environ.get("CUDA_VISIBLE_DEVICES")
    if entries is None:
        return [gpu for gpu in gpus if gpu is not None]
    found = (_find(entry.strip(), gpus) for entry in entries.split(","))
    chosen = list(itertools.takewhile(lambda gpu: gpu is not None, found))
    known = [uuid for gpu in chosen if (uuid := ask(pynvml.nvmlDeviceGetUUID, gpu))]
    return chosen if len(set(known)) == len(known) else []


def _find(entry: str, gpus: list[Any]) -> Any:
    """The GPU of an index, of the start of a UUID, or of a MIG slice's UUID; None where there is none."""
    if entry.isdecimal():
        return gpus[int(entry)] if int(entry) < len(gpus) else None
    if entry.startswith("MIG"):
        return ask(pynvml.nvmlDeviceGetHandleByUUID, entry)
    return next((gpu for gpu in gpus if entry and (ask(pynvml.nvmlDeviceGetUUID, gpu) or "").startswith(entry)), None)


def gpu_indices() -> list[int | None]:
    """NVML's index of each visible GPU, of a MIG slice that of its GPU; None where NVML does not tell."""
    with visible_gpus() as gpus:
        whole = (ask(pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle, gpu) or gpu for gpu in gpus)
        return [ask(pynvml.nvmlDeviceGetIndex, gpu) for gpu in whole]


def bind_to_gpu(index: int) -> set[int]:
    """Keeps this thread, and those that it starts from now on, on the cores nearest to a visible GPU.

    Work for a GPU is queued and copied slower from the cores and the memory of another socket. Returns the cores. It
    returns none and changes nothing where there is no such GPU, NVML does not tell, or none of them may be used.
    """
    usable = os.sched_getaffinity(0)
    with visible_gpus() as gpus:
        words = max(usable) // 64 + 1
        masks = ask(pynvml.nvmlDeviceGetCpuAffinity, gpus[index], words) if index < len(gpus) else None
    near = {core for core in usable if masks and masks[core // 64] >> core % 64 & 1}
    if near:
        os.sched_setaffinity(0, near)
    return near


def _name(gpu: Any) -> str:
    return ask(pynvml.nvmlDeviceGetName, gpu) or "unknown GPU"


def _describe(gpu: Any) -> Accelerator:
    memory, milliwatts = ask(pynvml.nvmlDeviceGetMemoryInfo, gpu), ask(pynvml.nvmlDeviceGetEnforcedPowerLimit, gpu)
    ecc = ask(pynvml.nvmlDeviceGetCurrentEccMode, gpu)
    return Accelerator(
        name=_name(gpu),
        memory_bytes=memory and memory.total,
        power_limit_watts=milliwatts and milliwatts / 1000,
        sm_clock_mhz=ask(pynvml.nvmlDeviceGetClockInfo, gpu, pynvml.NVML_CLOCK_SM),
        max_sm_clock_mhz=ask(pynvml.nvmlDeviceGetMaxClockInfo, gpu, pynvml.NVML_CLOCK_SM),
        max_memory_clock_mhz=ask(pynvml.nvmlDeviceGetMaxClockInfo, gpu, pynvml.NVML_CLOCK_MEM),
        ecc=None if ecc is None else bool(ecc),
    )


def _link(one: Any, other: Any) -> str:
    """How two GPUs are connected: by NVLink, or by the PCIe bridges and buses between them."""
    if ask(pynvml.nvmlDeviceGetP2PStatus, one, other, pynvml.NVML_P2P_CAPS_INDEX_NVLINK) == pynvml.NVML_P2P_STATUS_OK:
        return "NV"
    return LINKS.get(ask(pynvml.nvmlDeviceGetTopologyCommonAncestor, one, other), "?")


def ask(question: Callable[..., Any], *about: Any) -> Any:
    """NVIDIA's answer, None where the device or the driver has none."""
    try:
        return question(*about)
    except pynvml.NVMLError:
        return None
