"""Child processes that cannot outlive the process that started them, however that one ends."""

import contextlib
import ctypes
import functools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

LIBC = ctypes.CDLL(None, use_errno=True)  # loaded before any fork: loading in a forked child could hang
PR_SET_PDEATHSIG = 1
PATIENCE = 15.0  # seconds from SIGTERM to SIGKILL


def dying_with_parent() -> Callable[[], None]:
    """A `preexec_fn`: the kernel kills the child when the thread that started it ends, also when that is killed."""
    return functools.partial(_die_with, os.getpid())


def die_with_parent() -> None:
    """Tells the kernel to kill this process when the thread that started it ends."""
    _die_with(os.getppid())


def start(command: Sequence[str | Path], **options: Any) -> subprocess.Popen:
    """Starts `command`, by default without input, in its own session and process group. It dies with this thread."""
    options = {"stdin": subprocess.DEVNULL} | options
    return subprocess.Popen(command, start_new_session=True, preexec_fn=dying_with_parent(), **options)


def end(process: subprocess.Popen, patience: float = PATIENCE) -> None:
    """Ends a process made by `start`, its group, and its descendants in other groups. Returns when all are gone.

    They get SIGTERM, and SIGKILL after `patience` seconds. Where the process has ended by itself, this ends what it
    left running.
    """
    deadline = time.monotonic() + patience
    asked: set[psutil.Process] = set()
    left = _members(process)
    while left:
        for member in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                if time.monotonic() > deadline:
                    member.kill()
                elif member not in asked:  # once: a second SIGTERM would interrupt a launcher's own clean-up
                    member.terminate()
        asked |= left
        process.poll()
        time.sleep(0.05)
        left = {member for member in asked | _members(process) if _runs(member)}
    process.wait()


def oom_kills() -> int:
    """How many processes the kernel has killed since boot because memory ran out, a cgroup's included."""
    path = Path("/proc/vmstat")
    counts = dict(line.split() for line in path.read_text().splitlines()) if path.exists() else {}
    return int(counts.get("oom_kill", 0))


def death_in_words(number: int, oom_kills_before: int) -> tuple[str, str]:
    """Status and reason of a process that a signal ended. The status is `oom` where the kernel killed for memory."""
    if number == signal.SIGKILL and oom_kills() > oom_kills_before:
        return "oom", f"killed by {signal_in_words(number)}: the kernel ended a process for want of memory meanwhile"
    return "failed", f"killed by {signal_in_words(number)}"


def signal_in_words(number: int) -> str:
    """A signal's name and number, such as `SIGKILL (9)`; `signal (N)` for a number without a name."""
    name = signal.Signals(number).name if number in list(signal.Signals) else "signal"
    return f"{name} ({number})"


def _die_with(parent: int) -> None:
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before prctl took effect
        os.kill(os.getpid(), signal.SIGKILL)


def _members(process: subprocess.Popen) -> set[psutil.Process]:
    """All processes of the group, also when its leader is gone, and all descendants of the leader.

    Launchers start groups of their own.
    """
    members: set[psutil.Process] = set()
    for other in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getpgid(other.pid) == process.pid:
                members.add(other)
    with contextlib.suppress(psutil.NoSuchProcess):
        if process.poll() is None:
            members.update(psutil.Process(process.pid).children(recursive=True))
    return members


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
