"""The preflight of run_all.sh --check: what of this machine would stop a suite or spoil its figures.

Each finding is one line: what was seen, and what to do. A fault would stop runs or make their figures wrong. A note is
worth a look.
"""

import fnmatch
import itertools
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pynvml

from tunebench import conditions
from tunebench.bootstrap import ROOT, own_python, python_of
from tunebench.errors import BadInput
from tunebench.files import cache_folder, free_bytes, results_folder
from tunebench.flags import HUB
from tunebench.frameworks import FRAMEWORKS, other_library
from tunebench.hardware import Hardware, ask, read_hardware, visible_gpus
from tunebench.models.checkpoint import describe_checkpoint, random_folder
from tunebench.models.presets import PRESETS
from tunebench.models.random_weights import random_bytes
from tunebench.peers import has_environment
from tunebench.run.start import check_packages, check_tensor_parallel, prepare_compiler
from tunebench.run.unsupported import not_offered
from tunebench.suite.file import Planned, Suite, plan_runs

GB = 10**9
ROOM_FOR_RESULTS = 1 * GB
SHARED_MEMORY = 1 * GB  # NCCL's buffers between the processes of a node; Docker's default is 64 MB
OPEN_FILES = 4096
PROBE_SECONDS, HUB_SECONDS = 60, 20

Level = Literal["ok", "note", "fault"]


class Finding(NamedTuple):
    """One line of the preflight."""

    level: Level
    subject: str
    text: str

    def line(self) -> str:
        """The finding as printed."""
        return f"{self.level:5}  {self.subject}: {self.text}"


def check(path: Path, suite: Suite, only: str | None) -> int:
    """Prints the findings for a suite on this machine. Returns 1 where one is a fault, else 0."""
    hardware = read_hardware()
    counts = {"ok": 0, "note": 0, "fault": 0}
    for finding in findings(path, suite, only, hardware):
        counts[finding.level] += 1
        print(finding.line(), flush=True)
    print(f"checked suite {path.stem}: {counts['fault']} faults, {counts['note']} notes")
    return 1 if counts["fault"] else 0


def findings(path: Path, suite: Suite, only: str | None, hardware: Hardware) -> Iterator[Finding]:
    """All findings, the machine's first."""
    yield Finding("ok", "processor", f"{hardware.cpu}, {hardware.cores} cores, {hardware.memory_bytes / GB:.0f} GB")
    yield from check_gpus(hardware)
    yield from check_system(hardware)
    yield from check_quiet()
    runs, refused = planned(path, suite, only)
    yield from refused
    packages: dict[str, dict[str, str]] = {}
    for framework in sorted({run.entry.framework for run in runs}):
        try:
            seen = ask_framework(framework)
        except BadInput as error:
            yield Finding("fault", framework, str(error))
            continue
        packages[framework] = seen["packages"]
        yield check_framework(framework, seen, hardware)
    for name in sorted({run.entry.environment for run in runs} - FRAMEWORKS.keys()):
        if has_environment(name):
            yield Finding("ok", f".venv/{name}", "complete")
        else:
            yield Finding("note", f".venv/{name}", "not complete; the suite sets it up before its first run")
    yield from check_data(runs)
    yield from check_room(runs)
    yield from check_runs(runs, packages)


def check_gpus(hardware: Hardware) -> Iterator[Finding]:
    """The visible GPUs: what they are, who else uses them, and settings that make them slower."""
    if not hardware.accelerators:
        yield Finding("ok", "GPUs", "none is visible; runs use the CPU")
        return
    names = sorted({gpu.name for gpu in hardware.accelerators})
    text = f"{len(hardware.accelerators)} x {' and '.join(names)}, driver {hardware.driver}, CUDA up to {hardware.cuda}"
    yield Finding("ok" if len(names) == 1 else "fault", "GPUs", text + "; use GPUs of one kind" * (len(names) > 1))
    with visible_gpus() as gpus:
        for i, gpu in enumerate(gpus):
            yield from check_gpu(f"GPU {i}", gpu)
    pairs = itertools.combinations(range(len(hardware.accelerators)), 2)
    apart = [f"{a}-{b} ({hardware.links[a][b]})" for a, b in pairs if hardware.links[a][b] != "NV"]
    if apart:
        yield Finding("note", "links", f"no NVLink between {', '.join(apart)}: runs on several GPUs will be slower")


def check_gpu(name: str, gpu: object) -> Iterator[Finding]:
    """One GPU, by NVIDIA's handle."""
    others = ask(pynvml.nvmlDeviceGetComputeRunningProcesses, gpu)
    if others:
        pids = ", ".join(str(process.pid) for process in others)
        yield Finding("fault", name, f"in use by {len(others)} process(es) ({pids}); end them, or hide this GPU")
    wrong = ask(
        pynvml.nvmlDeviceGetTotalEccErrors,
        gpu,
        pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
        pynvml.NVML_VOLATILE_ECC,
    )
    if wrong:
        yield Finding("fault", name, f"{wrong} uncorrected memory errors since the driver started; use another GPU")
    ecc = ask(pynvml.nvmlDeviceGetCurrentEccMode, gpu)
    if ecc == 0:
        yield Finding("note", name, "ECC is off, which makes memory faster; compare with GPUs that have it off too")
    limit = ask(pynvml.nvmlDeviceGetEnforcedPowerLimit, gpu)
    usual = ask(pynvml.nvmlDeviceGetPowerManagementDefaultLimit, gpu)
    if limit and usual and limit < usual:
        watts = f"{limit // 1000} W, below the usual {usual // 1000} W"
        yield Finding("note", name, f"power limit {watts}: nvidia-smi --power-limit={usual // 1000} (as root)")
    bits = ask(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, gpu) or 0
    slowed = [reason for reason, bit in conditions.REASONS.items() if bits & bit]
    if slowed:
        yield Finding("fault", name, f"its clocks are held down now: {', '.join(slowed)}; see to cooling and power")
    if ask(pynvml.nvmlDeviceGetPersistenceMode, gpu) == 0:
        yield Finding("note", name, "persistence mode is off, so runs start later: nvidia-smi -pm 1 (as root)")
    if ask(pynvml.nvmlDeviceGetMigMode, gpu) not in (None, [0, 0], (0, 0)):
        yield Finding("note", name, "is cut into slices (MIG), which share its memory bandwidth")


def check_system(hardware: Hardware) -> Iterator[Finding]:
    """Limits of the system that stop libraries."""
    python = sys.version.split()[0]
    yield Finding("ok", "Python", f"{python}, {ROOT / '.venv'}")
    open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if open_files < OPEN_FILES and open_files != resource.RLIM_INFINITY:
        yield Finding("note", "open files", f"at most {open_files}; allow more: ulimit -n {OPEN_FILES}")
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if space != resource.RLIM_INFINITY:
        yield Finding(
            "fault", "address space", f"limited to {space / GB:.1f} GB, which GPUs' drivers exceed: ulimit -v unlimited"
        )
    shared = Path("/dev/shm")
    if hardware.accelerators and shared.is_dir() and shutil.disk_usage(shared).total < SHARED_MEMORY:
        size = shutil.disk_usage(shared).total // 10**6
        yield Finding("fault", "/dev/shm", f"{size} MB, too little for NCCL; in Docker: --ipc=host or --shm-size=8g")


def check_quiet() -> Iterator[Finding]:
    """What other programs take of the cores just now."""
    busy = conditions.busy_with()
    if busy:
        yield Finding("note", "load", f"{busy}; runs wait for a quiet machine")


def planned(path: Path, suite: Suite, only: str | None) -> tuple[list[Planned], list[Finding]]:
    """The runs of one round, and a fault for each entry whose flags do not fit this machine.

    Raises `BadInput` where `only` fits none.
    """
    names = [entry.name for entry in suite.entries]
    wanted = [name for name in names if only is None or fnmatch.fnmatchcase(name, only)]
    if not wanted:
        raise BadInput(f"--only {only} fits none of {', '.join(names)}")
    runs: list[Planned] = []
    refused: list[Finding] = []
    for name in wanted:
        try:
            runs += plan_runs(path, suite, results_folder() / path.stem, 1, name)
        except BadInput as error:
            refused.append(Finding("fault", name, str(error)))
    return runs, refused


def ask_framework(framework: str) -> dict[str, Any]:
    """What the framework finds in its own environment. Raises `BadInput` where it does not start there."""
    command = [str(python_of(framework)), str(ROOT / framework / "gpus_seen.py")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=True)
        return json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        said = str(error)
        if isinstance(error, subprocess.CalledProcessError) and error.returncode > 0 and error.stderr.strip():
            said = error.stderr.strip().splitlines()[-1]
        mended = "" if own_python(framework) or "setup.sh" in said else f"; run: bash setup.sh {framework}"
        raise BadInput(f"does not start in {command[0]}: {said}{mended}") from None


def check_framework(framework: str, seen: dict[str, Any], hardware: Hardware) -> Finding:
    """What the framework found, against what the driver shows."""
    text = (
        f"{seen['version']}, built for {seen['built_for']}, finds {seen['gpus']} GPU(s), NCCL {seen['nccl'] or 'none'}"
    )
    if seen["gpus"] != len(hardware.accelerators):
        anew = f"rm -r .venv/{framework}; bash setup.sh {framework}"
        mended = "use another interpreter" if own_python(framework) else anew
        return Finding("fault", framework, f"{text}; the driver shows {len(hardware.accelerators)}: {mended}")
    return Finding("ok", framework, text)


def check_data(runs: Iterable[Planned]) -> Iterator[Finding]:
    """Whether the hub gives the data sets, as far as runs take them from there."""
    from huggingface_hub import HfApi

    for data in sorted({run.flags.data for run in runs} & HUB.keys()):
        if Path(HUB[data]).is_dir():  # `datasets` prefers it
            continue
        try:
            HfApi().dataset_info(HUB[data], timeout=HUB_SECONDS)
            yield Finding("ok", f"data {data}", f"the hub has {HUB[data]}")
        except Exception as error:  # the hub's client raises a dozen unrelated classes
            said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            yield Finding(
                "note", f"data {data}", f"the hub does not give {HUB[data]} ({said}); only a cached copy would do"
            )


def check_room(runs: Iterable[Planned]) -> Iterator[Finding]:
    """Free space for the random weights that are still to be written, and for records."""
    wanted = {(run.flags.model, run.flags.seed, run.flags.layers) for run in runs if run.flags.weights == "random"}
    missing = {key for key in wanted if not random_folder(*key).exists()}
    size = sum(random_bytes(PRESETS[model].cut(layers)) for model, _, layers in missing)
    for what, folder, needed in (("weights", cache_folder(), size), ("records", results_folder(), ROOM_FOR_RESULTS)):
        free = free_bytes(folder)
        text = f"{needed / GB:.1f} GB to write in {folder}, {free / GB:.1f} GB free"
        yield Finding("ok" if free > needed else "fault", what, text + "; make room" * (free <= needed))


def check_runs(runs: Collection[Planned], packages: dict[str, dict[str, str]]) -> Iterator[Finding]:
    """Whether each run would start, and its framework offers it; runs that are alike in this share a line.

    `packages` has the versions of each framework's packages.
    """
    offered = 0
    reasons: dict[tuple[Level, str], list[str]] = {}
    for run in runs:
        framework = run.entry.framework
        try:
            flags = run.flags
            checkpoint = describe_checkpoint(flags.model, flags.weights, flags.seed, flags.layers)
            check_tensor_parallel(run.flags, checkpoint)
            if framework in packages:
                check_packages(framework, run.flags, packages[framework], python_of(framework))
            prepare_compiler(framework, run.flags)
        except BadInput as error:
            reasons.setdefault(("fault", str(error)), []).append(run.entry.name)
            continue
        if framework not in packages:  # it does not start, as another line says
            continue
        library = other_library(packages[framework])
        reason = not_offered(framework, run.entry.method, run.flags, checkpoint, library)
        if reason:
            reasons.setdefault(("note", f"unsupported: {reason}"), []).append(run.entry.name)
        else:
            offered += 1
    for (level, text), names in reasons.items():
        yield Finding(level, f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0], text)
    yield Finding("ok", "runs", f"{offered} would start, of {len(runs)}")
