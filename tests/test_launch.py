"""Who may start the processes of a run: torchrun, Paddle's launcher, Slurm, a launch per node, several at once."""

import os
import socket

import psutil
import pytest
from conftest import FRAMEWORKS, ROOT

from tunebench import processes
from tunebench.record import read_record

pytestmark = pytest.mark.frameworks
LAUNCHERS = {
    "torch": ["bin/torchrun", "--standalone", "--nproc-per-node=2"],
    "paddle": ["bin/python", "-m", "paddle.distributed.launch", "--nproc_per_node", "2"],
}


@pytest.fixture
def launch(short, tmp_path):
    """Starts a script, by this interpreter or by `launcher`; what still runs after the test is ended."""
    started = []

    def start(framework, out, *flags, launcher=(), env=None):
        program, *options = launcher or ["bin/python"]
        script = [ROOT / framework / "finetune_full.py", "--model=llama-tiny", *short, f"--out={tmp_path / out}"]
        log = (tmp_path / f"{len(started)}.log").open("w+")
        process = processes.start(
            [ROOT / ".venv" / framework / program, *options, *script, *flags],
            env={name: value for name, value in (os.environ | (env or {})).items() if value is not None},
            cwd=tmp_path,  # Paddle's launcher writes its logs there
            stdout=log,
            stderr=log,
        )
        started.append((process, log))

    def wait():
        for process, log in started:
            code = process.wait(timeout=240)
            log.seek(0)
            assert code == 0, log.read()
        left = {p.pid: p.cmdline() for p in psutil.Process().children(recursive=True)}
        assert not left

    start.wait = wait
    yield start
    for process, log in started:
        processes.end(process, patience=1)
        log.close()


def check(file, one, nproc, nnodes=1):
    record = read_record(file)
    assert (record.status, record.setup.nproc, record.setup.nnodes) == ("ok", nproc, nnodes)
    assert record.devices == len(record.peak_memory_bytes) == nproc * nnodes
    assert record.steps.loss == pytest.approx(one.steps.loss, rel=1e-4)


def free_port():
    with socket.socket() as reserved:
        reserved.bind(("", 0))
        return reserved.getsockname()[1]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_frameworks_own_launcher(alone, launch, tmp_path, framework):
    # Paddle's launcher takes the variable for a GPU even where it is empty.
    launch(framework, "r.json", launcher=LAUNCHERS[framework], env={"CUDA_VISIBLE_DEVICES": None})
    launch.wait()
    check(tmp_path / "r.json", alone(framework, "llama", "full"), nproc=2)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_slurm(alone, launch, tmp_path, framework):
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost"}
    step |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_NTASKS": "2"}
    for rank in ("0", "1"):
        launch(framework, "r.json", "--zero=1", env=step | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank})
    launch.wait()
    check(tmp_path / "r.json", alone(framework, "llama", "full"), nproc=2)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_two_nodes(alone, launch, tmp_path, framework):
    nodes = ["--nnodes=2", f"--master=localhost:{free_port()}"]
    for node in (1, 0):
        launch(framework, f"{node}.json", *nodes, f"--node-rank={node}")
    launch.wait()
    check(tmp_path / "0.json", alone(framework, "llama", "full"), nproc=1, nnodes=2)
    assert not (tmp_path / "1.json").exists()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_two_runs_at_the_same_time(alone, launch, tmp_path, framework):
    for run in "ab":
        launch(framework, f"{run}.json", "--nproc=2")
    launch.wait()
    for run in "ab":
        check(tmp_path / f"{run}.json", alone(framework, "llama", "full"), nproc=2)
