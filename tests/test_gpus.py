"""Pretended GPUs: the answers of NVIDIA's library are those of other machines. The frameworks are real."""

import importlib
import os
import re
from types import SimpleNamespace
from typing import NamedTuple

import pynvml
import pytest
from conftest import HERE, refusal, run_altered

from tunebench import hardware
from tunebench.errors import BadInput
from tunebench.flags import place
from tunebench.frameworks import FRAMEWORKS, Framework
from tunebench.hardware import installed_versions
from tunebench.record import read_record
from tunebench.run.run import find_memory_fault
from tunebench.run.start import check_build
from tunebench.suite import check


class Gpu(NamedTuple):
    """A GPU, or a slice of one (`parent` is its index)."""

    index: int
    uuid: str
    parent: int | None = None


GPUS = [Gpu(0, "GPU-aaaa-0"), Gpu(1, "GPU-bbbb-1"), Gpu(2, "GPU-cccc-2")]
SLICES = [Gpu(0, "MIG-1111", parent=1), Gpu(1, "MIG-2222", parent=1)]


def find_parent(gpu: Gpu) -> Gpu:
    if gpu.parent is None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
    return GPUS[gpu.parent]


def find_by_uuid(uuid: str) -> Gpu:
    found = [gpu for gpu in (*GPUS, *SLICES) if gpu.uuid == uuid]
    if not found:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
    return found[0]


def test_nvidias_libraries_are_among_the_versions(tmp_path, monkeypatch):
    for name, version in (("nvidia-cudnn-cu99", "9.1.2"), ("nvidia-nccl-cu99", "2.3"), ("nvidia-ml-other", "7")):
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    versions = installed_versions(["pytest", "no-such-package"])
    assert (versions["nvidia-cudnn-cu99"], versions["nvidia-nccl-cu99"]) == ("9.1.2", "2.3")
    assert {"python", "pytest"} <= versions.keys()
    assert not {"no-such-package", "nvidia-ml-other"} & versions.keys()


@pytest.fixture
def gpus(monkeypatch):
    """A machine with three GPUs, of which the second one has two slices."""
    answers = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: len(GPUS),
        "nvmlDeviceGetHandleByIndex": lambda i: GPUS[i],
        "nvmlDeviceGetHandleByUUID": find_by_uuid,
        "nvmlDeviceGetUUID": lambda gpu: gpu.uuid,
        "nvmlDeviceGetName": lambda gpu: f"name of {gpu.uuid}",
        "nvmlDeviceGetIndex": lambda gpu: gpu.index,
        "nvmlDeviceGetDeviceHandleFromMigDeviceHandle": find_parent,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)


@pytest.mark.parametrize(
    ("variable", "names", "indices"),
    [
        (None, ["GPU-aaaa-0", "GPU-bbbb-1", "GPU-cccc-2"], [0, 1, 2]),
        ("2,0", ["GPU-cccc-2", "GPU-aaaa-0"], [2, 0]),
        ("GPU-bbbb", ["GPU-bbbb-1"], [1]),
        ("GPU-cccc-2, 1", ["GPU-cccc-2", "GPU-bbbb-1"], [2, 1]),
        ("MIG-2222", ["MIG-2222"], [1]),
        ("MIG-3333", [], []),
        ("", [], []),
        ("-1", [], []),
        ("0,0", [], []),
        ("0,7,1", ["GPU-aaaa-0"], [0]),  # CUDA, too, stops at the first unknown one
    ],
)
def test_the_visible_gpus_are_those_of_cuda(gpus, monkeypatch, variable, names, indices):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert hardware.visible_accelerators() == [f"name of {name}" for name in names]
    assert hardware.gpu_indices() == indices


def pretend_machine(monkeypatch, count: int) -> None:
    """GPUs joined by NVLink in groups of four, by slower buses between these. The last one is busy and hot."""
    machine = [Gpu(i, f"GPU-{i}{i}{i}{i}") for i in range(count)]
    linked = {True: pynvml.NVML_P2P_STATUS_OK, False: pynvml.NVML_P2P_STATUS_NOT_SUPPORTED}
    hot = pynvml.nvmlClocksThrottleReasonHwThermalSlowdown
    answers = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "580.65.06",
        "nvmlSystemGetCudaDriverVersion": lambda: 13000,
        "nvmlDeviceGetCount": lambda: count,
        "nvmlDeviceGetHandleByIndex": lambda i: machine[i],
        "nvmlDeviceGetUUID": lambda gpu: gpu.uuid,
        "nvmlDeviceGetName": lambda gpu: "NVIDIA A100-SXM4-80GB",
        "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(total=80 << 30),
        "nvmlDeviceGetEnforcedPowerLimit": lambda gpu: 400_000,
        "nvmlDeviceGetPowerManagementDefaultLimit": lambda gpu: 400_000,
        "nvmlDeviceGetCurrentEccMode": lambda gpu: 1,
        "nvmlDeviceGetTotalEccErrors": lambda gpu, kind, counter: 0,
        "nvmlDeviceGetClockInfo": lambda gpu, clock: 1275,
        "nvmlDeviceGetMaxClockInfo": lambda gpu, clock: 1410,
        "nvmlDeviceGetPersistenceMode": lambda gpu: 1,
        "nvmlDeviceGetMigMode": lambda gpu: [0, 0],
        "nvmlDeviceGetP2PStatus": lambda a, b, what: linked[a.index // 4 == b.index // 4],
        "nvmlDeviceGetTopologyCommonAncestor": lambda a, b: pynvml.NVML_TOPOLOGY_SYSTEM,
        "nvmlDeviceGetComputeRunningProcesses": lambda gpu: [SimpleNamespace(pid=77)] * (gpu.index == count - 1),
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda gpu: hot if gpu.index == count - 1 else 0,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)


@pytest.mark.parametrize("count", [1, 4, 8])
def test_a_machine_of_so_many_gpus_is_described_and_checked(monkeypatch, count):
    pretend_machine(monkeypatch, count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = hardware.read_hardware()
    assert (len(found.accelerators), found.driver, found.cuda) == (count, "580.65.06", "13.0")
    assert {gpu.power_limit_watts for gpu in found.accelerators} == {400.0}
    assert [row.count("NV") for row in found.links] == [min(count, 4) - 1] * count
    lines = [finding.line() for finding in check.check_gpus(found)]
    apart = ", ".join(f"{a}-{b} (SYS)" for a in range(4) for b in range(4, count))
    between = [f"note   links: no NVLink between {apart}: runs on several GPUs will be slower"] * (count > 4)
    last = count - 1
    assert lines == [
        f"ok     GPUs: {count} x NVIDIA A100-SXM4-80GB, driver 580.65.06, CUDA up to 13.0",
        f"fault  GPU {last}: in use by 1 process(es) (77); end them, or hide this GPU",
        f"fault  GPU {last}: its clocks are held down now: thermal (hardware); see to cooling and power",
        *between,
    ]
    taken = {"nproc": count, "mp": 1, "zero": 0, "nnodes": None, "node_rank": None, "master": None}
    place(taken, gpus=len(hardware.visible_accelerators()))
    with pytest.raises(BadInput, match=f"^--nproc {2 * count}: {count} GPU"):
        place(taken | {"nproc": 2 * count}, gpus=len(hardware.visible_accelerators()))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(last))))
    faults = [finding for finding in check.check_gpus(hardware.read_hardware()) if finding.level == "fault"]
    assert not faults, "the busy one is hidden"


def test_a_lost_gpu_keeps_the_numbers_of_the_others(gpus, monkeypatch):
    def find(i):
        if i == 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return GPUS[i]

    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", find)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    assert hardware.gpu_indices() == [2]


def test_a_process_is_bound_to_the_cores_nearest_to_its_gpu(gpus, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    usable, bound = {0, 1, 5, 64, 70}, []
    near = {GPUS[0]: {0, 1, 2, 70, 130}, GPUS[1]: {5, 65}, GPUS[2]: {9}}

    def masks(gpu, words):
        return [sum(1 << core % 64 for core in near[gpu] if core // 64 == word) for word in range(words)]

    monkeypatch.setattr(pynvml, "nvmlDeviceGetCpuAffinity", masks)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: usable)
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, cores: bound.append(cores))
    assert [hardware.bind_to_gpu(i) for i in range(4)] == [{0, 1, 70}, {5}, set(), set()]
    assert bound == [{0, 1, 70}, {5}]


@pytest.mark.frameworks
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_run_stays_on_the_cores_nearest_to_its_gpu(forked, tmp_path, framework):
    """The GPU is pretended, and what a run sees of its own cores is the system's."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("this machine has one core")
    last = max(os.sched_getaffinity(0))
    code = f"""
import atexit, contextlib, os, pynvml, tunebench.hardware as h, tunebench.run.run as r
nearest = [1 << {last} % 64 if word == {last} // 64 else 0 for word in range({last} // 64 + 1)]
def bind(index):
    with contextlib.ExitStack() as stack:
        for module, name, value in ((h, "visible_gpus", lambda: contextlib.nullcontext(["a GPU"])),
                                    (pynvml, "nvmlDeviceGetCpuAffinity", lambda gpu, words: nearest)):
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        return h.bind_to_gpu(index)
r.bind_to_gpu = bind
leave, r._leave = r._leave, lambda run, code: (print("cores:", os.sched_getaffinity(0)), leave(run, code))
"""
    flags = ["--model=llama-tiny", "--bsz=2", "--samples=4", "--steps=2", "--warmup-steps=1"]
    exit_code, printed = forked.run(framework, "full", *flags, f"--out={tmp_path / 'r.json'}", code=code)
    assert exit_code == 0, printed
    assert f"cores: {{{last}}}" in printed
    assert "cores nearest to the GPU: 1" in printed
    assert read_record(tmp_path / "r.json").hardware.cores == len(os.sched_getaffinity(0))


A100 = "import tunebench.hardware as h; h.visible_accelerators = lambda: ['NVIDIA A100']"


@pytest.mark.frameworks
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_build_for_cpus_is_refused_where_there_are_gpus(tmp_path, framework):
    line = refusal(run_altered(A100, framework, "full", "--model=llama-tiny"))
    assert line == (
        f"finetune_full.py: {framework} is a build for CPUs, and 1 GPU(s) are here (NVIDIA A100); run: rm -r .venv/"
        f"{framework}; bash setup.sh {framework}; or hide the GPUs: CUDA_VISIBLE_DEVICES="
    )


@pytest.mark.parametrize(
    ("built", "supported", "line"),
    [
        (
            "13.0",
            12040,
            "is built for CUDA 13.0, and the driver 550.54 supports CUDA up to 12.4; update the driver, or run",
        ),
        ("12.6", 12040, None),
        ("12.6", 12000, None),  # a driver runs every build of its major version
        ("12.6", 13000, None),
    ],
)
def test_the_driver_has_to_be_new_enough_for_the_build(gpus, monkeypatch, built, supported, line):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(pynvml, "nvmlSystemGetCudaDriverVersion", lambda: supported)
    monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: "550.54")
    monkeypatch.setattr(Framework, "cuda_of_build", lambda self: built)
    if line is None:
        check_build(HERE)
    else:
        with pytest.raises(BadInput, match=re.escape(line)):
            check_build(HERE)


def test_the_build_that_is_installed_here():
    """The version is the one that the framework reports."""
    module = importlib.import_module(HERE)
    said = module.version.cuda if HERE == "torch" else module.version.cuda()
    assert FRAMEWORKS[HERE].cuda_of_build() == (None if said in (None, "False") else said)


@pytest.mark.frameworks
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_framework_that_finds_no_gpu_does_not_train_on_the_cpu(forked, tmp_path, framework):
    """The framework's build is for CUDA and finds no driver."""
    code = f"{A100}; import tunebench.frameworks as f; f.Framework.cuda_of_build = lambda self: '12.6'"
    flags = ["--model=llama-tiny", "--bsz=2", "--samples=4", "--steps=2", "--warmup-steps=1"]
    record = forked.train(framework, "full", tmp_path / "r.json", *flags, code=code)
    assert record.status == "failed"
    assert record.reason.startswith(f"{framework} finds none of the 1 GPU(s) here (NVIDIA A100); use a build of ")
    assert record.reason.endswith("or hide the GPUs: CUDA_VISIBLE_DEVICES=")


PADDLE = """

--------------------------------------
C++ Traceback (most recent call last):
--------------------------------------
0   phi::GPUContext::Alloc

----------------------
Error Message Summary:
----------------------
ResourceExhaustedError:

Out of memory error on GPU 0. Cannot allocate 1.531250GB memory on GPU 0, 79.1GB memory has been allocated.

Please check whether there is any other process using GPU 0.
  (at ../paddle/phi/core/memory/allocation/cuda_allocator.cc:84)
"""
TLS = "libgomp.so.1: cannot allocate memory in static TLS block"
NCCL = """NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, unhandled cuda error, NCCL version 2.28
ncclUnhandledCudaError: Call to CUDA function failed.
Last error:
Failed to CUDA calloc 4194304 bytes: Cuda failure 2 'out of memory'"""


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation", "CUDA out of memory. Tried to allocate"),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "CUDA error: CUBLAS_STATUS_ALL"),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "cuDNN error"),
        (PADDLE, "Out of memory error on GPU 0. Cannot allocate 1.531250GB"),
        ("(External) CUBLAS error(3). CUBLAS_STATUS_ALLOC_FAILED", "(External) CUBLAS error(3)."),
        (NCCL, "Failed to CUDA calloc 4194304 bytes"),
        ("[Errno 12] Cannot allocate memory", "[Errno 12]"),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.", "DefaultCPUAllocator"),
        ("(ResourceExhausted) Fail to alloc memory of 8 size, error code is 12.", "(ResourceExhausted) Fail"),
    ],
    ids=range(9),
)
def test_the_line_that_says_that_memory_ran_out(text, line):
    assert find_memory_fault(text).startswith(line)


def test_other_errors_are_no_lack_of_memory():
    for text in (
        "CUDA error: an illegal memory access was encountered",
        "CUBLAS_STATUS_NOT_INITIALIZED",
        "",
        "memory",
        TLS,
    ):
        assert find_memory_fault(text) is None
