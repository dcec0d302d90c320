"""The frameworks: everything that the shared code knows of one.

A new framework is an entry in FRAMEWORKS and a folder of its name with the scripts and its requirements.
"""

import importlib.util
import re
import socket
import sys
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tunebench.hardware import installed_versions
from tunebench.world import LOOPBACK, World, own_address

SHARED_PACKAGES = ("numpy", "datasets", "tokenizers", "sentencepiece", "safetensors")
ATTENTION_SIGNS = {"eager": ("softmax",), "sdpa": ("att",), "flash": ("flash", "varlen")}


def other_library(versions: Mapping[str, str]) -> str | None:
    """The library of models in place of the framework's usual one; None for that one.

    `versions` are those of a record or an interpreter. Paddle's usual one is PaddleNLP. Its training of language models
    moved to PaddleFormers in 2026. Where both are installed, the scripts take PaddleNLP (paddle/library.py).
    """
    return "PaddleFormers" if "paddleformers" in versions and "paddlenlp" not in versions else None


class Launch(NamedTuple):
    """What a launcher starts: the command `worker`, `nproc` times, on node `node_rank` of `nnodes`.

    `master` is HOST:PORT of node 0, or None for a single node. The launcher may write into `folder`.
    """

    worker: list[str | Path]
    nproc: int
    nnodes: int
    node_rank: int
    master: str | None
    folder: Path


@dataclass(frozen=True)
class Framework:
    """What the shared code knows of a framework.

    - `title`: the name in tables.
    - `packages`: the distributions that decide its speed. The version of `version_of` stands for all of them.
    - `build_file`: the file of its package that names the CUDA version which it was built for.
    - `launcher`: the launcher's name in messages. The launcher sets `rank_variable`.
    - `read_place`: reads the launcher's variables. `place_settings`: gives them for a process that Slurm started.
      `command`: the command line that starts the launcher.
    - `compiles`: whether --compile works.
    - `families`: the model families that its folder builds; None for all.
    - `attention_signs`: the parts of kernel names that prove an --attention. Its arguments are the flag, whether there
      is a GPU, and whether the model adds a bias for positions (ALiBi).
    - `trainer`: the peer whose rate others are divided by, where it was run: the framework's own trainer.
    """

    name: str
    title: str
    packages: tuple[str, ...]
    version_of: str
    build_file: str
    launcher: str
    rank_variable: str
    read_place: Callable[[Mapping[str, str]], World]
    place_settings: Callable[[World], dict[str, str]]
    command: Callable[[Launch], list[str | Path]]
    compiles: bool
    families: tuple[str, ...] | None
    attention_signs: Callable[[str, bool, bool], tuple[str, ...]]
    trainer: str

    def versions(self) -> dict[str, str]:
        """The versions of Python and of the packages that decide speed, as installed."""
        return installed_versions((*self.packages, *SHARED_PACKAGES))

    def cuda_of_build(self) -> str | None:
        """The CUDA version that the installed framework was built for, read without importing it; None for CPUs."""
        spec = importlib.util.find_spec(self.name)
        if spec is None or spec.origin is None:
            return None
        text = (Path(spec.origin).parent / self.build_file).read_text(encoding="utf-8")
        found = re.search(r"(?m)^cuda(_version)?\b[^=]*= *'(\d[\d.]*)'", text)
        return found and found[2]


def _torch_place(environment: Mapping[str, str]) -> World:
    size = int(environment["WORLD_SIZE"])
    nproc = int(environment.get("LOCAL_WORLD_SIZE") or size)
    return World(int(environment["RANK"]), int(environment["LOCAL_RANK"]), nproc, size)


def _torch_settings(world: World) -> dict[str, str]:
    host = world.hosts[0] if world.nnodes > 1 else LOOPBACK
    rank, size = str(world.rank), str(world.size)
    settings = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": str(world.local_rank)}
    return settings | {"LOCAL_WORLD_SIZE": str(world.nproc), "MASTER_ADDR": host, "MASTER_PORT": str(world.port)}


def _torch_command(launch: Launch) -> list[str | Path]:
    # The same as --standalone, which takes a free port, but by address instead of the host's name.
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={LOOPBACK}:0", f"--rdzv-id={uuid.uuid4().hex}"]
    meeting += [f"--local-addr={LOOPBACK}"]
    if launch.master is not None:
        host, _, port = launch.master.rpartition(":")
        meeting = [f"--nnodes={launch.nnodes}", f"--node-rank={launch.node_rank}"]
        meeting += [f"--master-addr={host}", f"--master-port={port}"]
    python = [sys.executable, "-P", "-m", "torch.distributed.run"]
    return [*python, *meeting, f"--nproc-per-node={launch.nproc}", "--", *launch.worker]


def _torch_attention_signs(attention: str, on_gpu: bool, biased: bool) -> tuple[str, ...]:
    # torch's flash kernels take no bias. A model with one runs the fastest fused kernel that takes it.
    return ("att",) if attention == "flash" and biased else ATTENTION_SIGNS[attention]


def _paddle_place(environment: Mapping[str, str]) -> World:
    size = int(environment["PADDLE_TRAINERS_NUM"])
    nproc = int(environment.get("PADDLE_LOCAL_SIZE") or size)
    return World(int(environment["PADDLE_TRAINER_ID"]), int(environment["PADDLE_RANK_IN_NODE"]), nproc, size)


def _paddle_settings(world: World) -> dict[str, str]:
    hosts = world.hosts if world.nnodes > 1 else (LOOPBACK,)
    ends = [f"{hosts[i // world.nproc]}:{world.port + 1 + i}" for i in range(world.size)]
    local = str(world.local_rank)
    return {
        "PADDLE_TRAINER_ID": str(world.rank),
        "PADDLE_TRAINERS_NUM": str(world.size),
        "PADDLE_MASTER": f"{hosts[0]}:{world.port}",
        "PADDLE_TRAINER_ENDPOINTS": ",".join(ends),
        "PADDLE_CURRENT_ENDPOINT": ends[world.rank],
        "PADDLE_RANK_IN_NODE": local,
        "PADDLE_LOCAL_RANK": local,
        "PADDLE_LOCAL_SIZE": str(world.nproc),
        "FLAGS_selected_gpus": local,
    }


def _paddle_command(launch: Launch) -> list[str | Path]:
    # The launcher writes each worker's whole environment to its log folder, so the log folder is a temporary one.
    meeting = ["--nproc_per_node", str(launch.nproc), "--log_dir", str(launch.folder / "log"), "--log_level", "ERROR"]
    meeting += ["--enable_gpu_log", "False", "--job_id", uuid.uuid4().hex if launch.master is None else launch.master]
    if launch.master is None:
        meeting += ["--host", LOOPBACK]
    else:
        # The launcher compares IP addresses to decide whether it listens. By default it resolves the host's name, which
        # often gives the loopback address.
        host, _, port = launch.master.rpartition(":")
        meeting += ["--master", f"{socket.gethostbyname(host)}:{port}", "--host", own_address(host)]
        meeting += ["--nnodes", str(launch.nnodes), "--rank", str(launch.node_rank)]
    return [sys.executable, "-P", "-m", "paddle.distributed.launch", *meeting, *launch.worker]


def _paddle_attention_signs(attention: str, on_gpu: bool, biased: bool) -> tuple[str, ...]:
    if not on_gpu:  # on CPUs Paddle's scaled_dot_product_attention calls separate kernels
        return ATTENTION_SIGNS["eager"]
    return ("att",) if attention == "flash" and biased else ATTENTION_SIGNS[attention]


# In the order in which suites run them and tables show them.
FRAMEWORKS: dict[str, Framework] = {
    "paddle": Framework(
        name="paddle",
        title="Paddle",
        packages=("paddlepaddle", "paddlepaddle-gpu", "paddlenlp", "paddleformers"),
        version_of="paddlenlp",
        build_file="version/__init__.py",
        launcher="python -m paddle.distributed.launch",
        rank_variable="PADDLE_TRAINER_ID",
        read_place=_paddle_place,
        place_settings=_paddle_settings,
        command=_paddle_command,
        compiles=False,
        families=("llama", "qwen2", "glm", "bloom"),
        attention_signs=_paddle_attention_signs,
        trainer="paddlenlp-trainer",
    ),
    "torch": Framework(
        name="torch",
        title="Torch",
        packages=("torch", "transformers", "peft", "accelerate", "deepspeed"),
        version_of="torch",
        build_file="version.py",
        launcher="torchrun",
        rank_variable="RANK",
        read_place=_torch_place,
        place_settings=_torch_settings,
        command=_torch_command,
        compiles=True,
        families=None,
        attention_signs=_torch_attention_signs,
        trainer="hf-trainer",
    ),
}
