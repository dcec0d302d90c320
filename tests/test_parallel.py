"""Several processes for real: the arithmetic of one."""

import itertools
import os

import pytest
from conftest import FRAMEWORKS, train

from tunebench.bootstrap import THREADS_LEFT_TO_US
from tunebench.launch import expand, read_world, share_threads

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
# Accumulation, where each way of splitting tells the last pass of a step from the others; and plain replicas.
MORE = [
    *(["--nproc=2", "--micro-bsz=2"], ["--mp=2", "--nproc=4", "--micro-bsz=2"], ["--zero=1", "--micro-bsz=2"]),
    *(["--zero=3", "--micro-bsz=2"], ["--nproc=4"]),
]
MATRIX = [case for case in itertools.product(("llama", "bloom"), ("full", "lora"), SETUPS) if case not in CORE]
MATRIX += [(*which, setup) for which in (("llama", "full"), ("bloom", "lora")) for setup in MORE]


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


def test_the_place_that_slurm_gives():
    step = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
    step |= {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu[08-09]"}
    world = read_world("torch", step)
    assert (world.rank, world.local_rank, world.nproc, world.nnodes, world.hosts) == (3, 1, 2, 2, ("gpu08", "gpu09"))
    assert read_world("torch", {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) is None, "a batch script is no worker"
    assert expand("a[1-2,4]-ib,b") == ("a1-ib", "a2-ib", "a4-ib", "b")


def test_a_task_that_slurm_has_bound_to_cores_has_its_share(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setenv(THREADS_LEFT_TO_US, "8")
    for on_node, threads in ((cores, {"OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "4"}), (cores + 1, {})):
        monkeypatch.setenv("SLURM_CPUS_ON_NODE", str(on_node))
        assert share_threads(2) == threads


def test_no_launcher_started_this():
    assert read_world("paddle", {"PATH": os.environ["PATH"]}) is None
