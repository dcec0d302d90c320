"""Starts a run's workers by the framework's own launcher, and makes sure that the run ends and leaves a record."""

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NoReturn

from tunebench import bootstrap, processes
from tunebench.errors import cannot_write
from tunebench.frameworks import FRAMEWORKS, Launch
from tunebench.hardware import RUN_ENVIRONMENT, read_environment, visible_accelerators
from tunebench.progress import read_step
from tunebench.record import LOG_LINES, Steps
from tunebench.run.outcome import (
    HIDDEN_DEVICES,
    RUN_FOLDER,
    RUN_RECORD,
    RUN_SUPERVISOR,
    TIMEOUT_EXIT,
    exits,
    failures,
    has_failed,
    is_done,
)
from tunebench.run.run import Run
from tunebench.world import device_of, own_address, share_threads

LOOK = 0.1  # seconds between two reads of what the launcher prints
BOOTSTRAP = Path(bootstrap.__file__).resolve()
PATIENCE = 8.0  # seconds that the launcher has to end the other workers after one failed
ASK = 3.0  # seconds from SIGTERM to SIGKILL
# What an aborting process prints, the most telling first: an exception's text in C++, gloo's errors, glibc, Python.
ABORTS = ("what():", "gloo/transport", "free():", "malloc", "terminate called", "Fatal Python error")
# Variables of an earlier launch, which would change this one: Paddle's launcher also reads its flags from variables.
INHERITED = re.compile(
    r"(PADDLE|POD|TORCHELASTIC)_|FLAGS_selected_|(LOCAL_|GROUP_)?(RANK|WORLD_SIZE)$|MASTER_(ADDR|PORT)$"
)


def run_workers(run: Run) -> int:
    """Runs all workers of this node to their end and returns the run's exit code. Node 0 leaves the record.

    Exit codes: 0 ok, 1 failed or out of memory, 124 over --timeout, 130 and 143 interrupted without a record.
    """
    flags = run.flags
    with _own_folder() as folder, _interruptible():
        printed: deque[str] = deque(maxlen=LOG_LINES)
        oom_kills, process = processes.oom_kills(), None
        worker: list[str | Path] = [BOOTSTRAP, run.framework, "tunebench.run.worker"]
        worker += [Path(sys.argv[0]).resolve(), *sys.argv[1:]]
        launch = Launch(worker, flags.nproc, flags.nnodes, flags.node_rank, flags.master, folder)
        try:
            process = processes.start(
                FRAMEWORKS[run.framework].command(launch),
                env=_environment(run, folder),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            timely = _watch(process, folder, printed, time.monotonic() + flags.timeout)
        except (KeyboardInterrupt, SystemExit) as interruption:
            print(f"{run.argv[0]}: interrupted, no record written", file=sys.stderr)
            return 130 if isinstance(interruption, KeyboardInterrupt) else 143
        finally:
            _ignore_interruptions()  # the run ends now; a second signal must not stop the clean-up
            if process is not None:
                processes.end(process, ASK)
        if is_done(folder) or (process.returncode == 0 and flags.node_rank):
            return 0
        if not timely:
            steps = [step.number for step in map(read_step, printed) if step]
            where = f"after step {steps[-1]}" if steps else "before the first step ended"
            return _end(run, "timeout", f"not done within --timeout {flags.timeout:g} s, {where}", list(printed))
        return _end(run, *_what_failed(process, folder, list(printed), oom_kills))


def _environment(run: Run, folder: Path) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if not INHERITED.match(name)}
    environment |= share_threads(run.flags.nproc)
    address = run.flags.master and own_address(run.flags.master.rpartition(":")[0])
    if address and (device := device_of(address)):
        # By default gloo takes the network device of the host's name.
        environment.setdefault("GLOO_SOCKET_IFNAME", device)
    if "CUDA_VISIBLE_DEVICES" in environment and not visible_accelerators():
        # Paddle's launcher counts the entries of CUDA_VISIBLE_DEVICES as GPUs, also where they name none. The workers
        # get the variable back.
        environment[HIDDEN_DEVICES] = environment.pop("CUDA_VISIBLE_DEVICES")
    own = {RUN_FOLDER: str(folder), RUN_RECORD: str(run.out), RUN_SUPERVISOR: str(os.getpid())}
    own[RUN_ENVIRONMENT] = json.dumps(read_environment())
    return environment | own | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}


def _watch(process: subprocess.Popen, folder: Path, printed: deque[str], deadline: float) -> bool:
    """Passes on what the launcher prints, until it ends, or PATIENCE after a worker failed. False at `deadline`."""
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    unread, failed_at = b"", None
    while True:
        ended = process.poll() is not None
        select.select([process.stdout], [], [], LOOK)
        unread = _pass_on(process.stdout, unread, printed)
        now = time.monotonic()
        if failed_at is None and has_failed(folder):
            failed_at = now
        if ended or (failed_at is not None and now > failed_at + PATIENCE):
            if unread:
                printed.append(unread.decode(errors="replace"))
            return True
        if now > deadline:
            return False


def _pass_on(stream: IO[bytes], unread: bytes, printed: deque[str]) -> bytes:
    *lines, rest = (unread + (stream.read() or b"")).split(b"\n")
    for line in lines:
        text = line.decode(errors="replace").rstrip()
        printed.append(text)
        print(text, flush=True)
    return rest


def _what_failed(
    process: subprocess.Popen, folder: Path, printed: list[str], oom_kills: int
) -> tuple[str, str, list[str], Steps | None]:
    """Status, reason, log and steps of a run without a record. The reason is the first failure, not a consequence."""
    told = failures(folder)
    for failure in told:
        if failure.status == "oom":
            return failure.told()
    # Launchers end the remaining workers by SIGTERM, so SIGTERM is no reason.
    for rank, code in exits(folder):
        number = -code
        if number > 0 and number != signal.SIGTERM:
            status, reason = processes.death_in_words(number, oom_kills)
            cause = cause_of_abort(printed) if number == signal.SIGABRT else ""
            return status, f"rank {rank} was {reason}" + (cause and f": {cause}"), printed, None
    for failure in told:
        return failure.told()
    code = process.returncode
    if code < 0:
        status, reason = processes.death_in_words(-code, oom_kills)
        return status, f"the launcher was {reason}", printed, None
    last = printed[-1] if printed else "none"
    return "failed", f"the launcher ended with exit code {code}, last line: {last}", printed, None


def cause_of_abort(printed: list[str]) -> str:
    """The line by which the first process that aborted itself said why; empty where none has a known sign."""
    lines = (line.replace("what():", "").strip() for sign in ABORTS for line in printed if sign in line)
    return next(filter(None, lines), "")


def _end(run: Run, status: str, reason: str, log: list[str], steps: Steps | None = None) -> int:
    if run.flags.node_rank:
        print(f"{run.argv[0]}: {status}: {reason} (the record is node 0's)", file=sys.stderr)
    else:
        run.fail(status, reason, log, steps)
    return TIMEOUT_EXIT if status == "timeout" else 1


@contextlib.contextmanager
def _own_folder() -> Iterator[Path]:
    """A new folder for the workers' reports. It is removed afterwards."""
    with cannot_write(Path(tempfile.gettempdir()), "TMPDIR names another folder"):
        folder = tempfile.TemporaryDirectory(prefix="tunebench-")
    with folder as name:
        yield Path(name)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """The first SIGINT or SIGTERM unwinds the body. Later ones are ignored, so that the clean-up ends."""

    def interrupt(number: int, _: object) -> NoReturn:
        _ignore_interruptions()
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(143)

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, interrupt)
    yield


def _ignore_interruptions() -> None:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
