"""Reads which place among a run's workers this process was given: by a launcher, by Slurm or by this project."""

import os
from collections.abc import Mapping

from tunebench.errors import BadInput
from tunebench.frameworks import FRAMEWORKS
from tunebench.world import LOOPBACK, World, device_of, is_slurm_task, world_of_slurm


def read_world(framework: str, environment: Mapping[str, str] = os.environ, on_terminal: bool = False) -> World | None:
    """The place that the framework's launcher or Slurm gave this process; None where neither started it.

    `on_terminal` says that stdin is a terminal, as in an interactive shell of srun: the other tasks of that shell would
    start nothing. Raises `BadInput` where the variables contradict each other or belong to another framework.
    """
    own, others = FRAMEWORKS[framework], (other for name, other in FRAMEWORKS.items() if name != framework)
    other = next((other for other in others if other.rank_variable in environment), None)
    by_slurm = "SLURM_PROCID" in environment and own.rank_variable not in environment
    hint = "; where srun did not start this script itself, unset SLURM_PROCID" if by_slurm else ""
    try:
        if own.rank_variable in environment:
            world = own.read_place(environment)
        elif other:
            raise BadInput(
                f"{other.rank_variable} is set, as {other.launcher} does; start this script by {own.launcher}, "
                "or plainly"
            )
        elif is_slurm_task(environment):
            world = world_of_slurm(environment)
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


def export_place(world: World, framework: str) -> None:
    """Sets the variables that the framework reads, where Slurm started this process without a launcher.

    On a single node it also sets gloo's network device. By default gloo takes the device of the host's name.
    """
    if world.nnodes == 1 and (device := device_of(LOOPBACK)):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", device)
    if not world.hosts:
        return
    if not world.rank:
        print(f"Slurm's task 0 of {world.size}; in a shell of your own unset SLURM_PROCID first", flush=True)
    for name, value in FRAMEWORKS[framework].place_settings(world).items():
        os.environ.setdefault(name, value)
