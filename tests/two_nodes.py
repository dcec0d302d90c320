"""Two nodes on one machine: network namespaces with addresses and host names of their own, joined by a veth pair.

    .venv/torch/bin/python -P tests/two_nodes.py FOLDER [--rates full 1gbit 100mbit] [FLAG ...]

It runs finetune_full.py of both frameworks, a process on each node, over a link of each rate, and prints effective
tokens/s and their ratio to the first rate's. FLAG is the scripts'. Records: FOLDER/RATE/FRAMEWORK.json. It needs root.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tunebench import processes
from tunebench.bootstrap import ROOT, python_of
from tunebench.errors import BadInput, one_line_refusals
from tunebench.frameworks import FRAMEWORKS
from tunebench.record import read_record

ADDRESSES = {"a": "10.213.7.1", "b": "10.213.7.2"}
PORT = 29533
DEFAULT_FLAGS = ["--model=llama-tiny", "--bsz=8", "--steps=12", "--warmup-steps=4"]


class Nodes:
    """Two nodes, a and b. Their programs end with them. Logs and records are in `folder`, named by node.

    Raises `BadInput` where namespaces cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = {node: f"tunebench-{os.getpid()}-{node}" for node in ADDRESSES}
        self.running: list[subprocess.Popen] = []

    def __enter__(self) -> "Nodes":
        try:
            self._connect()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def _connect(self) -> None:
        for name in self.names.values():
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        ends = [["netns", self.names[node]] for node in ADDRESSES]
        run("ip", "link", "add", "cable", *ends[0], "type", "veth", "peer", "name", "cable", *ends[1])
        for node, name in self.names.items():
            run("ip", "-n", name, "addr", "add", f"{ADDRESSES[node]}/30", "dev", "cable")
            run("ip", "-n", name, "link", "set", "cable", "up")
            folder = Path("/etc/netns") / name  # `ip netns exec` shows these files as those in /etc
            folder.mkdir(parents=True)
            known = "".join(f"{address} node-{other}\n" for other, address in ADDRESSES.items())
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n::1 localhost\n{known}")
            # No name server can be reached. A library's question would otherwise wait for one.
            (folder / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")

    def slow(self, rate: str) -> None:
        """Limits the link to `rate` in both directions, in tc's words (`100mbit`)."""
        limit = ["tbf", "rate", rate, "burst", "1mb", "latency", "50ms"]
        for name in self.names.values():
            run("tc", "-n", name, "qdisc", "add", "dev", "cable", "root", *limit)

    def cut(self) -> None:
        """Takes the link down, as a pulled cable does: neither side is told."""
        run("ip", "-n", self.names["a"], "link", "set", "cable", "down")

    def start(self, node: str, framework: str, *flags: object, **environment: str) -> subprocess.Popen:
        """Starts finetune_full.py on a node; its record is NODE.json. The process is the script's own.

        Each command here replaces the one before.
        """
        inside = ["ip", "netns", "exec", self.names[node], "unshare", "--uts", "--", "sh", "-c"]
        inside += [f'hostname node-{node} && exec "$@"', "sh", python_of(framework)]
        inside += [ROOT / framework / "finetune_full.py", *map(str, flags), f"--out={self.folder / f'{node}.json'}"]
        threads = max(1, len(os.sched_getaffinity(0)) // len(ADDRESSES))  # the nodes share the cores
        known = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        known |= {"OMP_NUM_THREADS": str(threads)}
        with (self.folder / f"{node}.log").open("a") as log:
            self.running.append(processes.start(inside, stdout=log, stderr=log, cwd="/", env=known | environment))
        return self.running[-1]

    def train(self, framework: str, *flags: object) -> dict[str, subprocess.Popen]:
        """Starts one run on both nodes, node b first; the processes by node. Node a writes the record."""
        place = ["--nnodes=2", f"--master=node-a:{PORT}"]
        return {
            node: self.start(node, framework, *place, f"--node-rank={rank}", *flags)
            for rank, node in ((1, "b"), (0, "a"))
        }

    def log(self, node: str) -> str:
        """What the programs of a node have printed so far."""
        return (self.folder / f"{node}.log").read_text(errors="replace")

    def logs(self) -> str:
        """The logs of both nodes."""
        return "\n".join(f"node {node}: {self.log(node)}" for node in ADDRESSES)

    def pids(self, node: str) -> list[int]:
        """The processes of a node."""
        found = subprocess.run(["ip", "netns", "pids", self.names[node]], capture_output=True, text=True, check=False)
        return list(map(int, found.stdout.split()))

    def _remove(self) -> None:
        for process in self.running:
            processes.end(process, patience=1)
        for name in self.names.values():
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


def run(*command: str) -> None:
    """Runs a command. Raises `BadInput` with its words where it fails or is missing."""
    try:
        subprocess.run(command, capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BadInput(f"{' '.join(command)}: {getattr(error, 'stderr', None) or error}") from None


def measure(framework: str, rate: str, flags: list[str], out: Path) -> float:
    """Trains over a link of this rate and moves the record to `out`; effective tokens/s. Exits where a node fails."""
    with tempfile.TemporaryDirectory() as folder, Nodes(Path(folder)) as nodes:
        if rate != "full":
            nodes.slow(rate)
        codes = [process.wait() for process in nodes.train(framework, *flags).values()]
        if any(codes):
            sys.exit(f"{framework} at {rate} ended with {codes}:\n{nodes.logs()}")
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(Path(folder) / "a.json", out)
    return read_record(out).effective_tokens_per_second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rates", nargs="+", default=["full", "1gbit", "100mbit"], metavar="RATE")
    options, flags = parser.parse_known_args()
    print("| Framework | Link | Effective tokens/s | × |\n|---|---|---:|---:|")
    for framework in FRAMEWORKS:
        first = None
        for rate in options.rates:
            measured = measure(framework, rate, flags or DEFAULT_FLAGS, options.folder / rate / f"{framework}.json")
            first = first or measured
            print(f"| {framework} | {rate} | {measured:.0f} | {measured / first:.2f} |", flush=True)


if __name__ == "__main__":
    with one_line_refusals("two_nodes.py"):
        main()
