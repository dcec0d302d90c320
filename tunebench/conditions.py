"""Measures what else the machine did between two readings: other processes, waits for cores, memory, clocks, GPUs.

It reads /proc (see proc(5)) and NVIDIA's library. A reading takes some milliseconds, so none falls into timed steps.
"""

import contextlib
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pynvml

from tunebench.bootstrap import cpuinfo
from tunebench.hardware import ask, visible_gpus
from tunebench.record import DISTURBED, Conditions, Device, Taker

TICK = 1 / os.sysconf("SC_CLK_TCK")  # seconds
LOOK = 1.0  # seconds between the two readings of `busy_with`
PAGE = os.sysconf("SC_PAGE_SIZE")
PROC = Path("/proc")
WRONG, FEW_TICKS = 0.2, 10  # counters may differ from the clock by this share of all ticks, and these ticks per core
TAKERS, LEAST_TAKEN = 3, 0.02  # at most so many of the others are named, each with at least these core-seconds
REASONS = {
    "power limit": pynvml.nvmlClocksThrottleReasonSwPowerCap,
    "hardware slowdown": pynvml.nvmlClocksThrottleReasonHwSlowdown,
    "sync boost": pynvml.nvmlClocksThrottleReasonSyncBoost,
    "thermal (software)": pynvml.nvmlClocksThrottleReasonSwThermalSlowdown,
    "thermal (hardware)": pynvml.nvmlClocksThrottleReasonHwThermalSlowdown,
    "power brake": pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown,
}


class Process(NamedTuple):
    """A process: CPU time of its own and of its children that ended, in ticks, and page faults that read a disk."""

    name: str
    parent: int
    ticks: int
    ended_children: int
    faults: int
    start: int


class Reading(NamedTuple):
    """The state of the machine at one moment; `cores` has busy, steal and idle ticks of each."""

    at: float
    since_epoch: float
    cores: dict[int, tuple[int, int, int]]
    processes: dict[int, Process]
    own: set[int]
    waited: float | None
    involuntary: int
    swapped: int | None
    stalled: float | None
    mhz: float | None


def read(roots: Iterable[int]) -> Reading:
    """Reads the machine. The run is the processes `roots` and their descendants."""
    cores, processes = _cores(), _processes()
    own = set().union(*(descendants(root, processes) for root in roots))
    waited, involuntary = _threads(own)
    return Reading(
        at=time.monotonic(),
        since_epoch=time.time(),
        cores=cores,
        processes=processes,
        own=own,
        waited=waited,
        involuntary=involuntary,
        swapped=_swapped(),
        stalled=_stalled(),
        mhz=_mhz(),
    )


def between(first: Reading, last: Reading) -> Conditions | None:
    """What the machine did between two readings of one run. Call it right after the second: it asks the GPUs now.

    None where the counters contradict the clock, as in a sandbox that makes them up.
    """
    usable = _usable(last.own) & first.cores.keys() & last.cores.keys()
    busy, steal, idle = (sum(last.cores[c][i] - first.cores[c][i] for c in usable) for i in range(3))
    own = _ticks(last.own, last.processes) - _ticks(first.own, first.processes)
    seconds = max(last.at - first.at, 2e-9)
    possible = len(usable) * seconds / TICK
    slack = WRONG * possible + len(usable) * FEW_TICKS
    if not usable or abs(busy + steal + idle - possible) > slack or own > busy + steal + slack:
        return None
    faults = (sum(each.processes[pid].faults for pid in each.own) for each in (last, first))
    return Conditions(
        seconds=seconds,
        cores=len(usable),
        busy_core_seconds=_seconds(busy),
        steal_core_seconds=_seconds(steal),
        idle_core_seconds=_seconds(idle),
        own_core_seconds=_seconds(own),
        takers=_takers(first, last),
        run_delay_seconds=_since(first.waited, last.waited),
        involuntary_switches=max(last.involuntary - first.involuntary, 0),
        major_faults=max(next(faults) - next(faults), 0),
        swapped_bytes=_since(first.swapped, last.swapped),
        memory_stall_seconds=_since(first.stalled, last.stalled),
        mhz=None if first.mhz is None or last.mhz is None else (first.mhz, last.mhz),
        gpus=list(_devices(last.own, first.since_epoch)),
    )


def descendants(root: int, processes: dict[int, Process]) -> set[int]:
    """The process `root` and all that descend from it."""
    children = defaultdict(list)
    for pid, process in processes.items():
        children[process.parent].append(pid)
    found, waiting = set(), [root] if root in processes else []
    while waiting:
        pid = waiting.pop()
        found.add(pid)
        waiting += children[pid]
    return found


def gpu_use() -> list[float]:
    """The share of its time that each visible GPU is busy just now."""
    with visible_gpus() as gpus:
        rates = [ask(pynvml.nvmlDeviceGetUtilizationRates, gpu) for gpu in gpus]
    return [rate.gpu / 100 if rate else 0.0 for rate in rates]


def busy_with() -> str:
    """What others take of the machine now, in words. Empty where it would not disturb a run. It takes LOOK seconds."""
    try:
        first = read([os.getpid()])
        time.sleep(LOOK)
        used = gpu_use()  # others use it: no run of this process is active now
        found = between(first, read([os.getpid()]))
    except (OSError, ValueError):  # a system without these counters
        return ""
    shares = [found.disturbance(on_gpu=bool(used))] if found else []
    shares += [(use, f"others use {use:.0%} of GPU {i}") for i, use in enumerate(used)]
    share, words = max(shares, default=(0.0, ""))
    return words if share >= DISTURBED else ""


def roots_of_run(script: str, ranks: int) -> set[int]:
    """The processes of a run of `ranks` local ranks that the user's own launcher, or the user, started one by one.

    They are the processes of this script below the nearest ancestor of this process that has so many.
    """
    processes, pid = _processes(), os.getpid()
    same = {other for other in processes if script.encode() in _command(other)} | {pid}
    while pid in processes and len(descendants(pid, processes) & same) < ranks:
        pid = processes[pid].parent
    return descendants(pid, processes) & same if pid in processes else {os.getpid()}


def _cores() -> dict[int, tuple[int, int, int]]:
    """Busy, steal and idle ticks of each core. User time includes guests' time."""
    found = {}
    for line in (PROC / "stat").read_text().splitlines():
        name, *numbers = line.split()
        if name.startswith("cpu") and name != "cpu":
            user, nice, system, idle, iowait, irq, softirq, steal = map(int, numbers[:8])
            found[int(name[3:])] = user + nice + system + irq + softirq, steal, idle + iowait
    return found


def _processes() -> dict[int, Process]:
    """All processes that are visible from here."""
    found = {}
    for folder in PROC.iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                before, _, after = (folder / "stat").read_text(errors="replace").rpartition(")")
                fields = after.split()  # from the third on
                user, system, child_user, child_system = map(int, fields[11:15])
                found[int(folder.name)] = Process(
                    name=re.sub(r"[^\w .:/+-]", "?", before.partition("(")[2]),  # it may be any bytes
                    parent=int(fields[1]),
                    ticks=user + system,
                    ended_children=child_user + child_system,
                    faults=int(fields[9]) + int(fields[10]),
                    start=int(fields[19]),
                )
    return found


def _command(pid: int) -> bytes:
    try:
        return (PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return b""


def _seconds(ticks: int) -> float:
    return round(max(ticks, 0) * TICK, 2)


def _ticks(pids: Iterable[int], processes: dict[int, Process]) -> int:
    return sum(processes[pid].ticks + processes[pid].ended_children for pid in pids)


def _threads(pids: Iterable[int]) -> tuple[float | None, int]:
    """Seconds that the threads of processes waited for a core (None where the kernel does not count them), and how
    often they had to leave one."""
    waited, involuntary, counted = 0, 0, False
    for thread in _tasks(pids):
        with contextlib.suppress(OSError, ValueError, IndexError):
            status = (thread / "status").read_text(errors="replace")
            involuntary += int(status.partition("nonvoluntary_ctxt_switches:")[2].split()[0])
        with contextlib.suppress(OSError, ValueError, IndexError):
            waited += int((thread / "schedstat").read_text().split()[1])
            counted = True
    return (waited / 1e9 if counted else None), involuntary


def _tasks(pids: Iterable[int]) -> Iterator[Path]:
    """The folders of all threads of these processes."""
    for pid in pids:
        with contextlib.suppress(OSError):
            yield from (PROC / str(pid) / "task").iterdir()


def _usable(pids: Iterable[int]) -> set[int]:
    """The cores that any thread of these processes may use: libraries may bind each to one."""
    cores: set[int] = set()
    for thread in _tasks(pids):
        with contextlib.suppress(OSError):
            cores |= os.sched_getaffinity(int(thread.name))
    return cores


def _swapped() -> int | None:
    """Bytes that the machine has written to swap space or read from it."""
    try:
        counts = dict(line.split() for line in (PROC / "vmstat").read_text().splitlines())
        return (int(counts["pswpin"]) + int(counts["pswpout"])) * PAGE
    except (OSError, KeyError, ValueError):
        return None


def _stalled() -> float | None:
    """Seconds that some process has waited for memory."""
    try:
        return int((PROC / "pressure" / "memory").read_text().split("total=")[1].split()[0]) / 1e6
    except (OSError, IndexError, ValueError):
        return None


def _mhz() -> float | None:
    """The mean clock of all cores."""
    files = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq")
    clocks = []
    with contextlib.suppress(OSError, ValueError):
        clocks = [int(file.read_text()) / 1e3 for file in files]
    if not clocks:
        with contextlib.suppress(ValueError):
            clocks = [float(clock) for clock in cpuinfo("cpu MHz")]
    return sum(clocks) / len(clocks) if clocks else None


def _takers(first: Reading, last: Reading) -> list[Taker]:
    """The other processes that took most, by name. Those that ended count as their nearest ancestor that still runs."""
    took: dict[str, int] = defaultdict(int)
    handed_on = _handed_on(first.processes, last.processes)
    for pid in last.processes.keys() - last.own:
        process = last.processes[pid]
        before = first.processes.get(pid)
        if before is None or before.start != process.start:
            before = process._replace(ticks=0, ended_children=0)
        ended = process.ended_children - before.ended_children - handed_on[pid]
        took[process.name] += process.ticks - before.ticks + max(ended, 0)
    most = sorted(took.items(), key=lambda item: -item[1])[:TAKERS]
    return [Taker(name=name, core_seconds=_seconds(ticks)) for name, ticks in most if _seconds(ticks) >= LEAST_TAKEN]


def _handed_on(first: dict[int, Process], last: dict[int, Process]) -> dict[int, int]:
    """Ticks from before the first reading that ancestors got from processes that ended since, by the ancestor."""
    ended = {pid for pid, process in first.items() if pid not in last or last[pid].start != process.start}
    ticks: dict[int, int] = defaultdict(int)
    for pid in ended:
        heir = first[pid].parent
        while heir in ended:
            heir = first[heir].parent
        ticks[heir] += first[pid].ticks + first[pid].ended_children
    return ticks


def _since(first: Any, last: Any) -> Any:
    return None if first is None or last is None else max(last - first, 0)


def _devices(own: set[int], since_epoch: float) -> Iterator[Device]:
    """The visible GPUs.

    In a container NVIDIA's library may number processes otherwise. Then none of this run's processes is among them, the
    others are not known, and all processes but one count as others.
    """
    with visible_gpus() as gpus:
        for gpu in gpus:
            running = ask(pynvml.nvmlDeviceGetComputeRunningProcesses, gpu) or []
            known = any(process.pid in own for process in running)
            others = [process for process in running if process.pid not in own]
            reasons = ask(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, gpu) or 0
            yield Device(
                processes=len(others) if known else len(running) - 1 if running else None,
                memory_bytes=sum(process.usedGpuMemory or 0 for process in others) if known else None,
                share=_share(gpu, own, since_epoch) if known else None,
                throttled=[reason for reason, bit in REASONS.items() if reasons & bit],
                sm_clock_mhz=ask(pynvml.nvmlDeviceGetClockInfo, gpu, pynvml.NVML_CLOCK_SM),
            )


def _share(gpu: Any, own: set[int], since_epoch: float) -> float | None:
    """The share of the GPU's time that other processes took: the mean of the driver's samples."""
    try:
        samples = pynvml.nvmlDeviceGetProcessUtilization(gpu, int(since_epoch * 1e6))
    except pynvml.NVMLError_NotFound:
        return 0.0
    except pynvml.NVMLError:
        return None
    by_time: dict[int, int] = defaultdict(int)
    for sample in samples:
        by_time[sample.timeStamp] += sample.smUtil * (sample.pid not in own)
    return sum(by_time.values()) / len(by_time) / 100 if by_time else 0.0
