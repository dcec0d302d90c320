"""A process's place among the workers of a run, as Slurm and the system tell it."""

import os
import re
import socket
from collections.abc import Mapping
from typing import NamedTuple

import psutil

from tunebench.bootstrap import THREADS_LEFT_TO_US
from tunebench.hardware import visible_accelerators

LOOPBACK = "127.0.0.1"  # where the processes of one node meet: the host's name may have no address
SLURM_SHELLS = 2**32 - 6  # step ids from here on stand for no srun step, but for a batch script or salloc's shell
MOST_HOSTS = 100_000
SLURM_PORTS = 20_000, 12_000  # the first port that a job step on Slurm may take, and how many there are


class World(NamedTuple):
    """This process's place. `nproc` workers run on each node.

    `port` and `hosts` are set where Slurm started the process. A launcher tells them to the framework itself.
    """

    rank: int
    local_rank: int
    nproc: int
    size: int
    port: int = 0  # rank 0's
    hosts: tuple[str, ...] = ()  # one for each node, rank 0's first

    @property
    def nnodes(self) -> int:
        """Nodes of the run."""
        return self.size // self.nproc


ALONE = World(rank=0, local_rank=0, nproc=1, size=1)


def device_of(address: str) -> str | None:
    """The name of the network device with this IP address; None where no device has it."""
    devices = psutil.net_if_addrs().items()
    return next((name for name, addresses in devices if address in [each.address for each in addresses]), None)


def own_address(master: str) -> str:
    """This node's IP address on the network of the node `master`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((master, 1))  # sends nothing
        return probe.getsockname()[0]


def share_threads(nproc: int) -> dict[str, str]:
    """The variables that give one of `nproc` workers its share of the cores as threads of the maths libraries.

    Empty for one worker, where the user set the threads, and where Slurm has bound this task to a part of the cores.
    """
    cores = re.match("[0-9]{1,9}$", os.environ.get("SLURM_CPUS_ON_NODE", ""))
    bound = cores is not None and len(os.sched_getaffinity(0)) < int(cores[0])
    if nproc == 1 or THREADS_LEFT_TO_US not in os.environ or bound:
        return {}
    threads = str(max(1, int(os.environ[THREADS_LEFT_TO_US]) // nproc))
    return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}


def expand(nodes: str) -> tuple[str, ...]:
    """The hosts of a Slurm node list such as `gpu[03-05,9],login`. Raises ValueError where it is none."""
    hosts: list[str] = []
    for before, ranges, after in re.findall(r"([^\[,]+)(?:\[([^\]]*)\])?([^,\[]*),?", nodes):
        for part in ranges.split(",") if ranges else [""]:
            first, dash, last = part.partition("-")
            numbers = [first]
            if dash:
                if int(last) - int(first) >= MOST_HOSTS:
                    raise ValueError(f"{nodes[:80]!r} names more than {MOST_HOSTS} hosts")
                numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
            hosts += [before + number + after for number in numbers]
    if not hosts or nodes.count("[") != nodes.count("]"):
        raise ValueError(f"{nodes[:80]!r} is no list of hosts")
    return tuple(hosts)


def is_slurm_task(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process. Batch scripts and salloc's shells have the job's variables too."""
    shell = int(environment.get("SLURM_STEP_ID") or 0) >= SLURM_SHELLS
    return "SLURM_PROCID" in environment and int(environment.get("SLURM_STEP_NUM_TASKS") or 1) > 1 and not shell


def world_of_slurm(environment: Mapping[str, str]) -> World:
    """The place in Slurm's variables. Raises KeyError where one is missing and ValueError where one is wrong."""
    size, nodes = int(environment["SLURM_STEP_NUM_TASKS"]), int(environment.get("SLURM_STEP_NUM_NODES") or 1)
    step = int(environment["SLURM_JOB_ID"]) * 101 + int(environment.get("SLURM_STEP_ID") or 0)
    port = int(environment.get("MASTER_PORT") or SLURM_PORTS[0] + step * 101 % SLURM_PORTS[1])
    hosts = expand(environment["SLURM_STEP_NODELIST"])
    if size % nodes:
        raise ValueError(f"{size} tasks on {nodes} nodes; start as many on each")
    rank, local_rank = int(environment["SLURM_PROCID"]), int(environment["SLURM_LOCALID"])
    if len(visible_accelerators()) == 1:
        local_rank = 0  # Slurm gave this task one GPU, which is device 0 for it
    return World(rank, local_rank, size // nodes, size, port, hosts)
