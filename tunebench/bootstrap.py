"""The first code that every program runs. It picks the interpreter and sets up both sides' maths libraries equally.

Programs load it by path, before they can import anything of the project. It needs the standard library alone and works
with any Python from 3.6.2 on.
"""

import hashlib
import importlib.util
import os
import re
import signal
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
AVX512 = {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}  # what MKL's kernels of that name use
THREADS_LEFT_TO_US = "TUNEBENCH_THREADS"  # the cores to share out, where the user did not set OMP_NUM_THREADS
MOST_THREADS = 4096
STARTED = "TUNEBENCH_STARTED"  # tells the interpreter that `enter_environment` starts by which name it did
OLDEST_PYTHON = (3, 11)
# What a user's own interpreter must have beside the dependencies in pyproject.toml: the oldest versions that were
# tried. NVIDIA's containers have pre-releases of torch. `check_packages` in run/start.py says what single flags need.
PACKAGES = {
    "torch": ("torch>=2.12.0a0", "transformers>=5.2", "peft>=0.19", "accelerate>=1.12"),
    "paddle": ("paddlepaddle-gpu>=3.3.1 or paddlepaddle>=3.3.1", "paddlenlp>=3.0.0b4 or paddleformers>=1.2.0"),
}
# They put other libraries before the locked ones, or drop asserts and docstrings.
UNWANTED = ("PYTHONPATH", "PYTHONHOME", "PYTHONOPTIMIZE")


def enter_environment(*environments: str, module: str = "") -> None:
    """Makes sure that this program runs in an interpreter that has `tunebench` and, for one name, that framework.

    With several names the first complete environment is used: such programs need no framework. Where the running
    interpreter lacks a package, `.venv/<environment>` runs the same command in place of this process. Where no
    environment is complete, the program ends with exit code 2 and names the command that makes one. The interpreter
    also starts again where its options or variables do not suit these programs. `module` is what this file started.

    TUNEBENCH_TORCH and TUNEBENCH_PADDLE name interpreters of the user's own in place of those in .venv/.
    """
    # By default Ctrl-C ends a program without a traceback, as it ends any command.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    open_streams()
    # With the repository root on sys.path, torch/ and paddle/ would be importable as empty namespace packages.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    # With PYTHONSAFEPATH, sys.path lacks the script's own folder, from which it imports modules.
    folder = str(Path(sys.argv[0]).resolve().parent)
    if not module and folder not in (str(ROOT), *sys.path):
        sys.path.insert(0, folder)
    # Absolute, because a suite starts its runs in the folder of its file.
    os.environ.update({variable_of(name): str(own_python(name)) for name in environments if own_python(name)})
    os.environ.update(maths_settings())
    os.environ.update(home_settings("paddle" in environments[:1]))
    if str(ROOT / ".venv") in os.path.abspath(sys.executable):  # noqa: PTH100 (links keep their names)
        # Container images set this variable. uv makes no bytecode, so that each import would compile anew: 8 s more.
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        sys.dont_write_bytecode = False
    unwanted = [name for name in UNWANTED if os.environ.pop(name, "")]
    # In a locale of another encoding, Python would decode paths and files in that one. Workers inherit the variable.
    foreign = sys.getfilesystemencoding().lower() != "utf-8"
    if foreign:
        os.environ["PYTHONUTF8"] = "1"
    needed = ["tunebench", *environments] if len(environments) == 1 else ["tunebench", "pydantic", "rich"]
    command = [str(Path(__file__).resolve()), ",".join(environments), module, *sys.argv[1:]] if module else sys.argv
    program, unreachable = Path(sys.argv[0]).name, ""
    started = os.environ.pop(STARTED, None)
    running = os.path.abspath(sys.executable)  # noqa: PTH100 (links keep their names)
    own = {str(own_python(name)): name for name in environments if own_python(name)}
    this = own.get(running) or own.get(started or "")  # a wrapper script starts an interpreter of another name
    if this:
        _use_own(this, program)
    elif own and len(environments) == 1:
        needed = []  # this interpreter is not the one that was asked for
    here = bool(needed) and all(_importable(name) for name in needed)
    if here and not (unwanted or foreign or sys.flags.optimize):
        return
    pythons = [python_of(name) for name in environments if is_complete(name)]
    for python in [Path(sys.executable)] if here else pythons:
        if here or unwanted or foreign or Path(sys.executable) != python:
            try:
                os.environ[STARTED] = str(python)
                os.execv(str(python), [str(python), *command])
            except OSError as error:
                target = os.path.realpath(str(python))
                unreachable = f"{python} cannot be started ({target}: {error.strerror}); let this user start it, or run"
    wanted = environments[0]
    if own_python(wanted):
        refuse(f"{program}: {variable_of(wanted)}: {unreachable.partition(';')[0]}; name another Python, or unset it")
    what = unreachable or f"the environment .venv/{wanted} is not complete; run"
    refuse(f"{program}: {what}: bash setup.sh {wanted}")


def refuse(line: str) -> NoReturn:
    """Prints one line on stderr and ends the process with exit code 2, also where stderr cannot be written."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    sys.exit(2)


def open_streams() -> None:
    """Opens closed standard streams on the null device, and lets the others print any text.

    Otherwise the next opened file would get the number of a closed stream, and prints would go into that file.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, number)  # dup2's copy is inherited by child processes
            if null != number:
                os.close(null)
            else:
                os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            stream = open(number, "w" if number else "r", encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        if number and hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")


def python_of(environment: str) -> Path:
    """The interpreter of an environment: the user's own, or that in .venv/."""
    return own_python(environment) or ROOT / ".venv" / environment / "bin" / "python"


def variable_of(environment: str) -> str:
    """The variable that names the user's own interpreter for an environment."""
    return f"TUNEBENCH_{environment.upper()}"


def own_python(environment: str):
    """The user's own interpreter for an environment; None where .venv/ has it."""
    given = os.environ.get(variable_of(environment), "")
    return Path(os.path.abspath(os.path.expanduser(given))) if given else None  # noqa: PTH100, PTH111 (links keep their names)


def _use_own(environment: str, program: str) -> None:
    """Makes this checkout's `tunebench` importable in the user's own interpreter, where it need not be installed.

    Ends the program with exit code 2 where the interpreter is too old or lacks packages.
    """
    said = f"{program}: {variable_of(environment)}={own_python(environment)}"
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        refuse(f"{said} is Python {'.'.join(map(str, sys.version_info[:2]))}; name one from {oldest} on, or unset it")
    import tomllib
    from importlib import metadata

    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    missing, old = [], []
    for requirement in [*wanted, *PACKAGES[environment]]:
        choices = [choice.partition("==")[0].partition(">=") for choice in requirement.split(" or ")]
        candidates = (
            (name, oldest, each.version) for name, _, oldest in choices for each in metadata.distributions(name=name)
        )
        name, oldest, found = next(candidates, ("", "", None))
        if found is None:
            missing.append(requirement)
        elif oldest and order_of(found) < order_of(oldest):
            old.append(f"{name}>={oldest} (it has {found})")
    if missing or old:
        refuse(f"{said} lacks {', '.join(missing + old)}; install them there, or unset the variable")
    code = importlib.util.find_spec("tunebench")
    if code is None or not code.origin or Path(code.origin).resolve().parent != ROOT / "tunebench":
        # None, or that of another checkout, whose code is not what this program is of.
        # A folder with nothing else: torch/ and paddle/ beside tunebench/ would pass for packages.
        folder = own_home() / "path"
        link = folder / "tunebench"
        folder.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink() or link.resolve() != ROOT / "tunebench":
            part = folder / f".{os.getpid()}"
            part.symlink_to(ROOT / "tunebench")
            part.replace(link)
        sys.path.insert(0, str(folder))
    if not _importable(environment):
        refuse(f"{said} has no {environment} that can be imported; install it there, or unset the variable")


def order_of(version: str) -> tuple:
    """What versions are compared by: ([5, 22], 4, 0) of 5.22.0+cu126, ([3], 2, 4) of 3.0.0b4, a pre-release."""
    numbers, stage, count = re.findall(r"^([\d.]*)(?:(dev|a|b|rc)(\d+))?", version)[0]
    parts = [int(number) for number in numbers.split(".") if number]
    while parts and parts[-1] == 0:
        parts.pop()
    # 0.0.0 is Paddle built from its sources: newer than any release.
    return parts or [sys.maxsize], ("dev", "a", "b", "rc", "").index(stage), int(count or 0)


def is_complete(name: str, made_from: str = "") -> bool:
    """Whether an environment is complete and up to date with the files in `made_from` (default: the folder `name`).

    The user's own interpreter counts as complete. It is looked at when it starts.
    """
    if own_python(name):
        return True
    try:
        return (ROOT / ".venv" / name / "complete").read_text().split("\n")[0] == stamp(made_from or name)
    except (OSError, UnicodeDecodeError):
        return False


def stamp(name: str) -> str:
    """What setup.sh writes into an environment last: a digest of the files that the environment was made from.

    It leaves out the kind of build (--cpu), so that later set-ups keep the kind of the first.
    """
    locks = [ROOT / name / "requirements.txt", ROOT / name / "constraints.txt", ROOT / "torch" / "cuda12.txt"]
    files = [*locks, ROOT / "pyproject.toml"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files) + os.fsencode(str(ROOT))).hexdigest()


def maths_settings() -> dict:
    """The environment variables for equal threads and kernels on both sides, GPUs' order, and torch's GPU memory.

    The libraries read them when they load.

    - Threads: OMP_NUM_THREADS where it is set, else the physical cores that this process may use. By default Paddle
      takes 1 thread and torch takes all cores.
    - MKL_DEBUG_CPU_TYPE: on AMD processors Paddle's MKL takes a slow path unless this names another. 5 is AVX2's path,
      7 is AVX-512's. torch's newer MKL ignores it.
    - NVIDIA_TF32_OVERRIDE=0 keeps fp32 at fp32 on GPUs. By default Paddle multiplies in TF32 and torch does not.
    - CUDA_DEVICE_ORDER: by default CUDA counts the fastest GPU first, and NVML by the bus. The record describes NVML's.
    - PYTORCH_ALLOC_CONF: widths change in each step. Without expandable segments torch's cache of GPU memory fragments.
    """
    chosen = _threads_of("OMP_NUM_THREADS")
    threads = chosen or str(_usable_cores())
    settings = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "NVIDIA_TF32_OVERRIDE": "0"}
    if not chosen:
        settings[THREADS_LEFT_TO_US] = threads
    else:
        _threads_of(THREADS_LEFT_TO_US)
    defaults = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    if not os.environ.get("PYTORCH_CUDA_ALLOC_CONF"):  # the older name; torch would take options from both
        defaults["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    for name, value in defaults.items():
        settings[name] = os.environ.get(name) or value
    if "AuthenticAMD" in cpuinfo("vendor_id"):
        settings["MKL_DEBUG_CPU_TYPE"] = os.environ.get("MKL_DEBUG_CPU_TYPE", "7" if has_instructions(AVX512) else "5")
    return settings


def _threads_of(variable: str) -> str:
    """The number of threads in a variable, of a list the first; empty where the variable is unset or empty."""
    given = os.environ.get(variable, "").strip()
    numbers = [number.strip() for number in given.split(",")] if given else []
    for number in numbers:
        if not re.match("[0-9]{1,9}$", number) or not 1 <= int(number) <= MOST_THREADS:
            shown = " ".join(given.split())
            fault = f"{variable}={shown} is no number of threads; unset it, or give one of 1 to {MOST_THREADS}"
            refuse(f"{Path(sys.argv[0]).name}: {fault}")
    return str(int(numbers[0])) if numbers else ""


def home_settings(paddle: bool) -> dict:
    """The environment variables that replace a home folder which is missing or not writable.

    Libraries write to the home folder when they download or compile. With `paddle` the variables also cover PaddleNLP,
    which writes there when it is imported.
    """
    if not os.environ.get("HOME"):
        os.environ.pop("HOME", None)  # an empty HOME means the root folder; an unset one, the entry in the user table
    settings = {}
    home = _home()
    if home is None:
        home = own_home()
        settings["HOME"] = str(home)
    elif not os.access(str(home), os.W_OK):
        own_folders = [("HF_HOME", ".cache/huggingface", "huggingface"), ("TRITON_HOME", ".triton", ".")]
        own_folders += [("PF_HOME", ".paddleformers", ".paddleformers")] * paddle
        for name, usual, own in own_folders:
            if not os.environ.get(name) and not os.access(str(home / usual), os.F_OK):
                settings[name] = str(own_home() / own)
    if paddle:
        folder = Path(os.environ.get("PPNLP_HOME") or str(home / ".paddlenlp"))
        fault = _not_for_paddlenlp(folder)
        if fault:
            ours = own_home() / ".paddlenlp"
            settings["PPNLP_HOME"] = str(ours)
            if _not_for_paddlenlp(ours):
                fault = f"PaddleNLP writes to {folder}: {fault}; name another folder by PPNLP_HOME"
                refuse(f"{Path(sys.argv[0]).name}: {fault}")
    return settings


def _home():
    """The user's home folder; None where it is missing or may not be entered."""
    try:
        home = Path("~").expanduser()
    except (KeyError, RuntimeError):
        return None
    return home if home.is_absolute() and os.access(f"{home}/.", os.X_OK) else None


def own_home() -> Path:
    """The folder that replaces a home folder: in the cache, or else in the folder of temporary files."""
    cache = Path(os.environ.get("TUNEBENCH_CACHE") or str(ROOT / ".cache"))
    name = f"home-{os.getuid()}"
    folders = [cache / name, Path(tempfile.gettempdir()) / f"tunebench-{name}"]
    for folder in folders:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder.stat().st_uid == os.getuid() and os.access(str(folder), os.W_OK | os.X_OK):
                return folder.resolve()
        except OSError:
            continue
    return folders[0]


def _not_for_paddlenlp(home: Path) -> str:
    """Why PaddleNLP could not make its folders there when it is imported; empty where it could."""
    try:
        for name in ("models", "datasets", "packages"):
            (home / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return str(error.strerror)
    return ""


def _importable(name: str) -> bool:
    # A folder without __init__.py, such as this repository's torch/, has a spec but no origin.
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


def _usable_cores() -> int:
    cores = set()
    for cpu in os.sched_getaffinity(0):
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(topology.read_text().strip() if topology.exists() else str(cpu))
    return len(cores)


def has_instructions(wanted: set) -> bool:
    """Whether the processor has all of these instruction sets, named as in /proc/cpuinfo."""
    return any(wanted.issubset(flags.split()) for flags in cpuinfo("flags")[:1])


def cpuinfo(field: str) -> list:
    """The values of a field of /proc/cpuinfo, one per logical CPU; empty where there is no such file."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field]


# bootstrap.py ENVIRONMENT[,ENVIRONMENT] MODULE [ARGUMENT ...]: as python -m, also where tunebench is not installed
if __name__ == "__main__":
    import runpy

    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    _, names, *sys.argv = sys.argv
    enter_environment(*names.split(","), module=sys.argv[0])
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
