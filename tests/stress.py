"""Kills a suite of short runs again and again, at random moments, and looks whether a finished record was lost.

    .venv/torch/bin/python -P tests/stress.py --kills 200

Each kill takes the runner, a launcher, a worker or a script, by SIGKILL, SIGTERM or Ctrl-C. After each, every record
that was finished must be there, byte for byte, and every record must be whole; after the runner's end nothing it
started may run. In the end the suite runs undisturbed and must be complete. Exit code 1 where any of that fails.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from tunebench import processes
from tunebench.record import parse_record
from tunebench.suite.resume import FINAL

SUITE = """
title = "short runs to be killed"
defaults = { steps = 2, warmup-steps = 0, bsz = 2, samples = 20, model = "llama-tiny", data = "DATA" }
[[pair]]
name = "one"
script = "finetune_full.py"
[[pair]]
name = "two"
script = "finetune_lora.py"
flags = { nproc = 2 }
"""
RUNS = 4
SUITE_SECONDS = 150  # more than a suite takes on a busy machine
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


class Stress:
    """A suite in `folder` whose processes are killed. `finished`: the records that must not change, by path."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.results = folder / "results" / "mini"
        self.finished: dict[Path, bytes] = {}
        self.seen = self.suites = 0
        self.kills: Counter[str] = Counter()
        data = folder / "data.json"
        data.write_text('[{"instruction": "one two", "output": "three"}, {"instruction": "four", "output": "five"}]')
        (folder / "mini.toml").write_text(SUITE.replace("samples = 20", "samples = 2").replace("DATA", str(data)))

    def start(self, *arguments: str) -> subprocess.Popen:
        """Starts the runner. It continues where it was killed."""
        own = {"TUNEBENCH_RESULTS": str(self.folder / "results"), "TUNEBENCH_CACHE": str(self.folder / "cache")}
        with (self.folder / "log").open("ab") as log:
            return processes.start(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "tunebench.suite.runner",
                    f"--suite={self.folder / 'mini.toml'}",
                    "--anyway",
                    *arguments,
                ],
                stdout=log,
                stderr=log,
                env=os.environ | own,
                cwd="/",
            )

    def look(self) -> None:
        """Checks every record, and that all finished ones are still there. Raises AssertionError."""
        for path, content in self.finished.items():
            assert path.exists(), f"{path} is gone"
            assert path.read_bytes() == content, f"{path} has changed"
        for path in self.results.rglob("[!.]*.json"):
            with contextlib.suppress(FileNotFoundError):  # moved a moment ago, because it runs again
                content = path.read_bytes()
                if parse_record(content).status in FINAL and path not in self.finished:
                    self.finished[path] = content
                    self.seen += 1

    def set_aside(self) -> None:
        """Checks after --fresh that the finished records are in .previous, unchanged."""
        kept = {path.read_bytes() for path in (self.folder / "results" / ".previous").rglob("*.json")}
        assert set(self.finished.values()) <= kept, "--fresh lost a record"
        self.finished = {}

    def under_fire(self, kills: int) -> None:
        """Kills processes until `kills` were killed."""
        started = time.monotonic()
        running = self.start()
        assert running.wait(SUITE_SECONDS) == 0, f"exit code {running.returncode}"
        mean = (time.monotonic() - started) / RUNS  # a third of the runs then ends by itself
        while self.kills.total() < kills:
            time.sleep(self.random.expovariate(1 / mean))
            self.look()
            if running.poll() is not None:
                if running.returncode == 0:  # all runs are done: start anew
                    assert len(self.finished) == RUNS, f"{len(self.finished)} finished records of {RUNS}"
                    self.suites += 1
                    running = self.start("--fresh")
                    asked = time.monotonic()
                    while list(self.results.rglob("[!.]*.json")):
                        assert time.monotonic() - asked < 60, "--fresh does not start"
                        time.sleep(0.05)
                    self.set_aside()
                else:
                    running = self.start()
                continue
            self.kill(running)
            print(f"\rkills {self.kills.total()}/{kills}, finished records {self.seen}, suites {self.suites}", end="")
        self.end(running)

    def kill(self, running: subprocess.Popen) -> None:
        """Sends a signal to the runner (one case in three) or to a process below it."""
        started = psutil.Process(running.pid).children(recursive=True)
        number = self.random.choice(SIGNALS)
        if not started or self.random.random() < 1 / 3:
            self.kills[f"runner, {signal.Signals(number).name}"] += 1
            running.send_signal(number)
            running.wait(60)
            alive = psutil.wait_procs(started, timeout=5)[1]
            assert not alive, f"outlived the runner: {alive}"
        else:
            with contextlib.suppress(psutil.NoSuchProcess):
                self.random.choice(started).send_signal(number)
                self.kills[f"below it, {signal.Signals(number).name}"] += 1
        self.look()

    def end(self, running: subprocess.Popen) -> None:
        """Lets the suite end undisturbed and checks that all its records are there, and nothing else."""
        running.wait(SUITE_SECONDS)
        self.look()
        done = self.start()
        assert done.wait(SUITE_SECONDS) == 0, f"exit code {done.returncode}"
        self.look()
        assert len(self.finished) == RUNS, f"{len(self.finished)} finished records of {RUNS}"
        assert "Traceback" not in (self.folder / "log").read_text(errors="replace")
        parts = [path for path in self.results.rglob(".*") if path.is_file()]
        assert not parts, f"left over: {parts}"


def main() -> int:
    """Runs the test, prints what was killed and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tunebench-stress-") as folder:
        stress = Stress(Path(folder), options.seed)
        try:
            stress.under_fire(options.kills)
        except (AssertionError, ValueError, subprocess.TimeoutExpired) as fault:
            print(f"\nseed {options.seed}, after {stress.kills.total()} kills ({dict(stress.kills)}): {fault}")
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    print(f"still there: {process.pid} {process.status()} {' '.join(process.cmdline())}")
            print((Path(folder) / "log").read_text(errors="replace")[-4000:])
            return 1
    print(
        f"\nseed {options.seed}: {stress.kills.total()} kills in {time.monotonic() - started:.0f} s "
        f"({', '.join(f'{what}: {count}' for what, count in sorted(stress.kills.items()))}); "
        f"{stress.seen} records finished meanwhile, none lost or broken; {stress.suites} suites ran whole"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
