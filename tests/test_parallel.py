"""Several processes for real: the arithmetic of one, and how a run ends when one of them dies or hangs."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT, refusal, run_program, train

from tunebench.launch import expand, read_world
from tunebench.record import read_record

FRAMEWORKS = ("torch", "paddle")
WORK = ["--bsz=8", "--steps=10", "--warmup-steps=2", "--lr=5e-4", "--seed=1"]
SETUPS = [
    *(["--zero=1"], ["--zero=1", "--nproc=4"], ["--zero=2"], ["--zero=2", "--nproc=4"], ["--zero=3"]),
    *(["--zero=3", "--nproc=4"], ["--mp=2"], ["--mp=4"], ["--mp=2", "--nproc=4"], ["--micro-bsz=4"], ["--micro-bsz=2"]),
]
# A few of these and of their combinations, so that each way of splitting, each method and each family is among them.
CORE = [
    ("llama", "full", ["--zero=3"]),
    ("llama", "full", ["--mp=2", "--micro-bsz=4"]),
    ("llama", "lora", ["--nproc=2"]),
    ("bloom", "full", ["--zero=2", "--micro-bsz=2"]),
    ("bloom", "full", ["--mp=2", "--nproc=4"]),
    ("bloom", "lora", ["--mp=2"]),
]
MATRIX = [case for case in itertools.product(("llama", "bloom"), ("full", "lora"), SETUPS) if case not in CORE]


@pytest.fixture(scope="session")
def short(tmp_path_factory):
    """Flags for samples of a few words, so that starting a run takes longer than its steps."""
    file = tmp_path_factory.mktemp("data") / "short.json"
    text = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    samples = [
        {"instruction": " ".join(text[: 2 + i % 7]), "output": " ".join(text[i % 5 : 4 + i % 5])} for i in range(80)
    ]
    file.write_text(json.dumps(samples))
    return [f"--data={file}", *WORK]


@pytest.fixture(scope="session")
def alone(short, tmp_path_factory):
    """The records of one process, by framework, family and method; each is made when first asked for."""
    folder, made = tmp_path_factory.mktemp("alone"), {}

    def record(*key):
        if key not in made:
            framework, family, method = key
            out = folder / f"{'-'.join(key)}.json"
            made[key] = train(framework, method, out, f"--model={family}-tiny", *short)
        return made[key]

    return record


@pytest.mark.frameworks
@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    ("family", "method", "setup"),
    [*CORE, *(pytest.param(*case, marks=pytest.mark.matrix) for case in MATRIX)],
    ids=lambda part: "".join(part),
)
def test_several_processes_do_the_arithmetic_of_one(alone, short, tmp_path, framework, family, method, setup):
    one = alone(framework, family, method)
    many = train(framework, method, tmp_path / "r.json", f"--model={family}-tiny", *short, *setup)
    assert many.devices * many.setup.accumulation > 1
    assert len(many.peak_memory_bytes) == many.devices
    assert many.model == one.model
    assert many.steps.loss == pytest.approx(one.steps.loss, rel=1e-4)
    assert many.steps.grad_norm == pytest.approx(one.steps.grad_norm, rel=1e-4)


def start(framework: str, *flags: str) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """A run that has done its first step, and all processes that it started."""
    command = [sys.executable, str(ROOT / framework / "finetune_full.py"), "--model=llama-tiny", *flags]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in running.stdout:
        if line.startswith("step 1/"):
            return running, psutil.Process(running.pid).children(recursive=True)
    raise AssertionError(f"ended with {running.wait()}")


def worker(processes: list[psutil.Process], rank: int) -> psutil.Process:
    """The process that trains as `rank`."""
    for process in processes:
        variables = process.environ()
        if "finetune_full" in process.cmdline()[1] and rank == int(
            variables.get("RANK") or variables.get("PADDLE_TRAINER_ID") or -1
        ):
            return process
    raise AssertionError(f"no rank {rank}")


@pytest.mark.frameworks
@pytest.mark.parametrize("framework", FRAMEWORKS)
class TestEnds:
    LONG = ("--samples=40", "--steps=500", "--bsz=2")

    def test_a_killed_rank_ends_the_run_and_is_named(self, tmp_path, framework):
        out = tmp_path / "r.json"
        running, started = start(framework, *self.LONG, "--nproc=2", f"--out={out}")
        worker(started, 1).kill()
        killed = time.monotonic()
        running.communicate(timeout=60)
        assert time.monotonic() - killed < 20
        assert running.returncode == 1
        assert not psutil.wait_procs(started, timeout=3)[1]
        record = read_record(out)
        assert (record.status, record.reason) == ("failed", "rank 1 was killed by SIGKILL (9)")

    def test_nothing_outlives_a_killed_supervisor(self, tmp_path, framework):
        running, started = start(framework, *self.LONG, "--nproc=2", f"--out={tmp_path / 'r.json'}")
        running.kill()
        assert not psutil.wait_procs(started, timeout=5)[1]

    def test_a_rank_that_hangs_ends_at_the_timeout(self, tmp_path, framework):
        out = tmp_path / "r.json"
        running, started = start(framework, *self.LONG, "--nproc=2", "--timeout=25", f"--out={out}")
        worker(started, 1).send_signal(signal.SIGSTOP)
        running.communicate(timeout=90)
        assert running.returncode == 124
        assert not psutil.wait_procs(started, timeout=3)[1]
        assert read_record(out).status == "timeout"


@pytest.mark.frameworks
def test_what_cannot_be_cut_up_is_refused():
    assert "--mp 3 does not divide the model's 8 (attention heads); use 1 or 2" in refusal(
        run_program("torch/finetune_full.py", "--model=llama-tiny", "--mp=3")
    )


def test_the_place_that_slurm_gives():
    step = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
    step |= {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu[08-09]"}
    world = read_world("torch", step)
    assert (world.rank, world.local_rank, world.nproc, world.nnodes, world.hosts) == (3, 1, 2, 2, ("gpu08", "gpu09"))
    assert read_world("torch", {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) is None, "a batch script is no worker"
    assert expand("a[1-2,4]-ib,b") == ("a1-ib", "a2-ib", "a4-ib", "b")


def test_no_launcher_started_this(monkeypatch):
    assert read_world("paddle", {"PATH": os.environ["PATH"]}) is None
