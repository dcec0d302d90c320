"""This process's place among the workers of a run, as whoever started it says: a launcher, Slurm, or this project."""

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

import psutil

from tunebench.bootstrap import THREADS_LEFT_TO_US
from tunebench.errors import BadInput
from tunebench.hardware import visible_accelerators

# What a run tells its own workers: where they report to, whose record it is, who must be alive, which GPUs are hidden.
RUN_FOLDER, RUN_RECORD, RUN_SUPERVISOR = "TUNEBENCH_RUN_FOLDER", "TUNEBENCH_RUN_RECORD", "TUNEBENCH_RUN_SUPERVISOR"
HIDDEN_DEVICES = "TUNEBENCH_HIDDEN_DEVICES"
LOOPBACK = "127.0.0.1"  # where the processes of one node meet: the host's name may stand for nothing
SLURM_SHELLS = 2**32 - 6  # the first id of a step that is none: the shell of salloc, a batch script and others
MOST_HOSTS = 100_000
SLURM_PORTS = 20_000, 12_000  # the first port that a job step on Slurm may take, and how many there are


class World(NamedTuple):
    """This process's place. `nproc` workers run on each node.

    `port` and `hosts` are known from Slurm alone: a launcher tells them to the framework.
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


def read_world(framework: str, environment: Mapping[str, str] = os.environ, on_terminal: bool = False) -> World | None:
    """The place that torchrun, Paddle's launcher or Slurm gave this process; None where none of them started it.

    `on_terminal`: somebody types here. srun gives a terminal to an interactive shell, whose other tasks start nothing.
    Raises `BadInput` where the variables contradict each other, or are those of the other framework's launcher.
    """
    variables = {"torch": ("RANK", "torchrun"), "paddle": ("PADDLE_TRAINER_ID", "python -m paddle.distributed.launch")}
    ours, theirs = variables.pop(framework), *variables.values()
    by_slurm = "SLURM_PROCID" in environment and ours[0] not in environment
    hint = "; where srun did not start this script itself, unset SLURM_PROCID" if by_slurm else ""
    try:
        if ours[0] in environment:
            world = _of_torchrun(environment) if framework == "torch" else _of_paddle(environment)
        elif theirs[0] in environment:
            raise BadInput(f"{theirs[0]} is set, as {theirs[1]} does; start this script by {ours[1]}, or plainly")
        elif _is_slurm_task(environment):
            world = _of_slurm(environment)
            if on_terminal:
                raise BadInput(
                    f"SLURM_PROCID says that this is one of {world.size} tasks, but it was started on a terminal; "
                    "unset SLURM_PROCID for a run of this node's processes (--nproc), or start the script by srun"
                )
        else:
            return None
    except KeyError as missing:
        raise BadInput(f"the launcher's variables are incomplete: {missing.args[0]} is not set{hint}") from None
    except ValueError as error:
        raise BadInput(f"the launcher's variables are wrong: {error}{hint}") from None
    if world.nproc < 1 or world.size % world.nproc or not 0 <= world.rank < world.size:
        raise BadInput(
            f"the launcher's variables give rank {world.rank} of {world.size} with {world.nproc} on this node; "
            f"start as many on each node{hint}"
        )
    return world


def export(world: World, framework: str) -> None:
    """Sets what the framework itself reads, where Slurm and no launcher has started this process; for one node gloo's
    device, which otherwise is the one that the host's name stands for."""
    if world.nnodes == 1 and (device := device_of(LOOPBACK)):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", device)
    if not world.hosts:
        return
    if not world.rank:
        print(f"Slurm's task 0 of {world.size}; in a shell of your own unset SLURM_PROCID first", flush=True)
    hosts = world.hosts if world.nnodes > 1 else (LOOPBACK,)
    rank, size, local, host = str(world.rank), str(world.size), str(world.local_rank), hosts[0]
    if framework == "torch":
        settings = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": str(world.nproc)}
        settings |= {"MASTER_ADDR": host, "MASTER_PORT": str(world.port)}
    else:
        ends = [f"{hosts[i // world.nproc]}:{world.port + 1 + i}" for i in range(world.size)]
        settings = {"PADDLE_TRAINER_ID": rank, "PADDLE_TRAINERS_NUM": size, "PADDLE_MASTER": f"{host}:{world.port}"}
        settings |= {"PADDLE_TRAINER_ENDPOINTS": ",".join(ends), "PADDLE_CURRENT_ENDPOINT": ends[world.rank]}
        settings |= {"PADDLE_RANK_IN_NODE": local, "PADDLE_LOCAL_RANK": local, "PADDLE_LOCAL_SIZE": str(world.nproc)}
        settings |= {"FLAGS_selected_gpus": local}
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def device_of(address: str) -> str | None:
    """The network device with this IP address; None where no device has it."""
    devices = psutil.net_if_addrs().items()
    return next((name for name, addresses in devices if address in [each.address for each in addresses]), None)


def share_threads(nproc: int) -> dict[str, str]:
    """The maths libraries' threads of one worker out of `nproc`: its share of the cores, unless the user chose.

    A task that Slurm has bound to a part of the job's cores has its share already.
    """
    cores = re.match("[0-9]{1,9}$", os.environ.get("SLURM_CPUS_ON_NODE", ""))
    bound = cores is not None and len(os.sched_getaffinity(0)) < int(cores[0])
    if nproc == 1 or THREADS_LEFT_TO_US not in os.environ or bound:
        return {}
    threads = str(max(1, int(os.environ[THREADS_LEFT_TO_US]) // nproc))
    return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}


def expand(nodes: str) -> tuple[str, ...]:
    """The hosts of a Slurm node list such as `gpu[03-05,9],login`."""
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


def _is_slurm_task(environment: Mapping[str, str]) -> bool:
    """Whether srun started this: batch scripts and the shells of salloc have the job's variables too."""
    shell = int(environment.get("SLURM_STEP_ID") or 0) >= SLURM_SHELLS
    return "SLURM_PROCID" in environment and int(environment.get("SLURM_STEP_NUM_TASKS") or 1) > 1 and not shell


def _of_torchrun(environment: Mapping[str, str]) -> World:
    size = int(environment["WORLD_SIZE"])
    nproc = int(environment.get("LOCAL_WORLD_SIZE") or size)
    return World(int(environment["RANK"]), int(environment["LOCAL_RANK"]), nproc, size)


def _of_paddle(environment: Mapping[str, str]) -> World:
    size = int(environment["PADDLE_TRAINERS_NUM"])
    nproc = int(environment.get("PADDLE_LOCAL_SIZE") or size)
    return World(int(environment["PADDLE_TRAINER_ID"]), int(environment["PADDLE_RANK_IN_NODE"]), nproc, size)


def _of_slurm(environment: Mapping[str, str]) -> World:
    size, nodes = int(environment["SLURM_STEP_NUM_TASKS"]), int(environment.get("SLURM_STEP_NUM_NODES") or 1)
    step = int(environment["SLURM_JOB_ID"]) * 101 + int(environment.get("SLURM_STEP_ID") or 0)
    port = int(environment.get("MASTER_PORT") or SLURM_PORTS[0] + step * 101 % SLURM_PORTS[1])
    hosts = expand(environment["SLURM_STEP_NODELIST"])
    if size % nodes:
        raise ValueError(f"{size} tasks on {nodes} nodes; start as many on each")
    rank, local_rank = int(environment["SLURM_PROCID"]), int(environment["SLURM_LOCALID"])
    if len(visible_accelerators()) == 1:
        local_rank = 0  # a task that was given a GPU of its own counts from 0
    return World(rank, local_rank, size // nodes, size, port, hosts)
