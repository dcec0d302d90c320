"""The first thing that every program here runs: the right interpreter, and maths libraries set up equally.

Loaded by path, before anything of the project can be imported: standard library alone, and any Python from 3.6 on.
"""

import hashlib
import importlib.util
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
AVX512 = {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}  # what MKL's kernels of that name use
THREADS_LEFT_TO_US = "TUNEBENCH_THREADS"  # the cores to share out, where the user did not set OMP_NUM_THREADS


def enter(*environments: str) -> None:
    """Continues in an interpreter that has `tunebench` and, for one environment, its framework of the same name.

    With several names, the first environment that is complete will do (programs that need no framework). Where the
    running interpreter lacks them, this process is replaced by the same command in `.venv/<environment>`; where that
    is not complete either, the program ends with exit code 2 and the command that makes it.
    """
    # Until a program says otherwise, Ctrl-C ends it as it ends any command: without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # On sys.path the repository root would offer torch/ and paddle/ as empty namespace packages.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    # PYTHONSAFEPATH leaves out a script's own folder, where modules are that it imports.
    folder = str(Path(sys.argv[0]).resolve().parent)
    if folder not in (str(ROOT), *sys.path):
        sys.path.insert(0, folder)
    os.environ.update(maths_settings())
    needed = ["tunebench", *environments] if len(environments) == 1 else ["tunebench", "pydantic", "rich"]
    if all(_importable(name) for name in needed):
        return
    for name in environments:
        python = ROOT / ".venv" / name / "bin" / "python"
        if is_complete(name) and Path(sys.executable) != python:
            sys.stdout.flush()
            os.execv(python, [str(python), *sys.argv])
    program = Path(sys.argv[0]).name
    wanted = environments[0]
    print(f"{program}: the environment .venv/{wanted} is not complete; run: bash setup.sh {wanted}", file=sys.stderr)
    sys.exit(2)


def is_complete(name: str) -> bool:
    """Whether an environment was made to its end, from the files that are here now."""
    complete = ROOT / ".venv" / name / "complete"
    return complete.exists() and complete.read_text().split("\n")[0] == stamp(name)


def stamp(name: str) -> str:
    """What setup.sh writes into an environment last: a digest of all that it was made from, but for the kind of build.

    One call with --cpu thus decides for those after it.
    """
    files = (ROOT / name / "requirements.txt", ROOT / name / "constraints.txt", ROOT / "pyproject.toml")
    return hashlib.sha256(b"".join(file.read_bytes() for file in files) + str(ROOT).encode()).hexdigest()


def maths_settings() -> dict:
    """The environment variables that give both frameworks the same threads and the same kernels.

    They are read when the libraries load. Threads: the physical cores this process may use, unless OMP_NUM_THREADS is
    set (Paddle alone would take 1, torch all). On AMD processors the MKL that Paddle bundles takes a slow path unless
    MKL_DEBUG_CPU_TYPE names another: 5 is AVX2's, 7 AVX-512's; torch's newer MKL ignores it. On GPUs
    NVIDIA_TF32_OVERRIDE=0 keeps fp32 at fp32: Paddle alone would multiply in TF32 by default, torch not.
    """
    threads = os.environ.get("OMP_NUM_THREADS") or str(_usable_cores())
    if not threads.split(",")[0].strip().isdecimal():
        print(f"OMP_NUM_THREADS={threads} is no number of threads; unset it, or give one", file=sys.stderr)
        sys.exit(2)
    settings = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "NVIDIA_TF32_OVERRIDE": "0"}
    if "OMP_NUM_THREADS" not in os.environ:
        settings[THREADS_LEFT_TO_US] = threads
    if "AuthenticAMD" in cpuinfo("vendor_id"):
        settings["MKL_DEBUG_CPU_TYPE"] = os.environ.get("MKL_DEBUG_CPU_TYPE", "7" if has_instructions(AVX512) else "5")
    return settings


def _importable(name: str) -> bool:
    # A folder without __init__.py, such as torch/ seen from elsewhere, has a spec but no origin.
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


def _usable_cores() -> int:
    cores = set()
    for cpu in os.sched_getaffinity(0):
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(topology.read_text().strip() if topology.exists() else str(cpu))
    return len(cores)


def has_instructions(wanted: set) -> bool:
    """Whether the processor has all of these sets of instructions, by their names in /proc/cpuinfo."""
    return any(wanted.issubset(flags.split()) for flags in cpuinfo("flags")[:1])


def cpuinfo(field: str) -> list:
    """The values of a field of /proc/cpuinfo, one per logical CPU; empty where there is no such file."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field]
