"""A run of several processes in which one is killed, hangs or gets no memory: it is named, and no process is left."""

import contextlib
import json
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import FRAMEWORKS, ROOT

from tunebench import processes
from tunebench.record import read_record
from tunebench.run.outcome import RUN_RECORD
from tunebench.run.supervisor import cause_of_abort

LONG = ["--samples=40", "--steps=2000", "--bsz=2"]


class Started:
    """A run of two processes."""

    def __init__(self, framework, out, *flags):
        self.out = out
        script = ROOT / framework / "finetune_full.py"
        self.supervisor = processes.start(
            [sys.executable, script, "--model=llama-tiny", "--nproc=2", *flags, f"--out={out}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for(self, line):
        """Reads the run's output up to a line that starts with `line`."""
        for printed in self.supervisor.stdout:
            if printed.startswith(line):
                return
        raise AssertionError(f"ended with {self.supervisor.wait()}")

    def left(self):
        """The launcher and all processes below it. They inherit the supervisor's environment variables."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(RUN_RECORD) == str(self.out) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def worker(self, rank):
        """The process that trains as `rank`."""
        for process in self.left():
            variables = process.environ()
            place = variables.get("RANK") or variables.get("PADDLE_TRAINER_ID")
            if "finetune_full" in process.cmdline()[1] and place == str(rank):
                return process
        raise AssertionError(f"no rank {rank}")

    def end(self, within):
        """Waits for the end of the run; the record."""
        asked = time.monotonic()
        self.supervisor.communicate(timeout=within + 60)
        assert time.monotonic() - asked < within
        assert not psutil.wait_procs(self.left(), timeout=3)[1]
        return read_record(self.out)


@pytest.fixture
def start(tmp_path):
    """A function that starts a run and waits for its first step. What is left after the test is killed."""
    runs = []

    def start(framework, *flags):
        runs.append(Started(framework, tmp_path / f"{framework}.json", *flags))
        runs[-1].wait_for("step 1/")
        return runs[-1]

    yield start
    for run in runs:
        run.supervisor.kill()
        run.supervisor.communicate()
        for process in run.left():
            process.kill()


@pytest.mark.frameworks
@pytest.mark.parametrize("framework", FRAMEWORKS)
class TestEnds:
    def test_a_killed_rank_is_named(self, start, framework):
        run = start(framework, *LONG)
        run.worker(1).kill()
        record = run.end(within=20)
        assert run.supervisor.returncode == 1
        assert (record.status, record.reason) == ("failed", "rank 1 was killed by SIGKILL (9)")

    def test_nothing_outlives_a_killed_launcher(self, start, framework):
        run = start(framework, *LONG)
        (launcher,) = psutil.Process(run.supervisor.pid).children()
        launcher.kill()
        record = run.end(within=20)
        assert run.supervisor.returncode == 1
        assert (record.status, record.reason) == ("failed", "the launcher was killed by SIGKILL (9)")

    def test_nothing_outlives_a_killed_supervisor(self, start, framework):
        run = start(framework, *LONG)
        started = run.left()
        assert len(started) > 2
        run.supervisor.kill()
        assert not psutil.wait_procs(started, timeout=5)[1]

    @pytest.mark.parametrize("nproc", [1, 2])
    def test_a_process_that_gets_no_memory(self, start, tmp_path, framework, nproc):
        data = tmp_path / "data.json"
        lengths = [2] * 800 + [500] * 160  # the first 50 steps are short and leave time to set the limit
        data.write_text(json.dumps([{"instruction": "one " * length, "output": "two"} for length in lengths]))
        run = start(framework, f"--data={data}", "--bsz=16", "--steps=60", "--no-paired-halves", f"--nproc={nproc}")
        worker = run.worker(1) if nproc == 2 else psutil.Process(run.supervisor.pid)
        limit = worker.memory_info().vms + 64 * 2**20
        worker.rlimit(psutil.RLIMIT_AS, (limit, limit))
        record = run.end(within=120)
        assert run.supervisor.returncode == 1
        assert record.status == "oom"
        assert record.predicted_peak_memory_bytes >= 16 * record.model.parameters  # weight, gradient, two moments
        assert record.reason.startswith("rank 1: ") == (nproc == 2)


@pytest.mark.frameworks
def test_a_rank_that_hangs_ends_at_the_timeout(start):
    """Both frameworks run at the same time, because the test mostly waits."""
    runs = []
    for framework in FRAMEWORKS:
        run = start(framework, *LONG, "--timeout=40")  # before gloo's own limit, 30 s from the stop on
        run.worker(1).send_signal(signal.SIGSTOP)
        runs.append((framework, run, time.monotonic()))
    for framework, run, stopped in runs:
        record = run.end(within=stopped + 60 - time.monotonic())
        assert (record.framework, record.status, run.supervisor.returncode) == (framework, "timeout", 124)
        assert record.reason.startswith("not done within --timeout 40 s, after step ")


GLOO = "E1129 [third_party/gloo/gloo/transport/tcp/pair.cc:584] TIMEOUT self_rank = 0 peer_str = [10.0.0.2]:26804"
SUMMARY = ["ChildFailedError:", "=" * 60]  # torchrun's words come last


@pytest.mark.parametrize(
    ("printed", "cause"),
    [
        (["terminate called after throwing", "  what():  not here", "  what():  peer is gone", *SUMMARY], "not here"),
        (["step 1/9: 1.0 s", GLOO, "terminate called without an active exception", "  what():", *SUMMARY], GLOO),
        (["free(): invalid pointer", "Fatal Python error: Aborted", *SUMMARY], "free(): invalid pointer"),
        (["step 1/9: 1.0 s", *SUMMARY], ""),
        ([], ""),
    ],
)
def test_why_a_process_aborted(printed, cause):
    assert cause_of_abort(printed) == cause
