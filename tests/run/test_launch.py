"""What may start the processes of a run: torchrun, Paddle's launcher, Slurm, one launch per node; and refusals."""

import os
import socket

import psutil
import pytest
from conftest import FRAMEWORKS, ROOT, places, refusal, run_program
from helpers import wait_for

from tunebench import processes
from tunebench.bootstrap import maths_settings
from tunebench.errors import BadInput
from tunebench.flags import place
from tunebench.models.presets import PRESETS, Preset
from tunebench.models.random_weights import write_random
from tunebench.record import Record, read_record

pytestmark = pytest.mark.frameworks
LAUNCHERS = {
    "torch": ["bin/torchrun", "--standalone", "--nproc-per-node=2"],
    "paddle": ["bin/python", "-m", "paddle.distributed.launch", "--nproc_per_node", "2"],
}


@pytest.fixture
def launch(short, tmp_path):
    """A function that starts a script, directly or by `launcher`. What still runs after the test is ended."""
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
        left = [p.cmdline() for p in psutil.Process().children(recursive=True)]
        assert not [words for words in left if "fork_server.py" not in " ".join(words)]

    start.wait = wait
    yield start
    for process, log in started:
        processes.end(process, patience=1)
        log.close()


def check(file, one, nproc, nnodes=1) -> Record:
    record = read_record(file)
    assert (record.status, record.setup.nproc, record.setup.nnodes) == ("ok", nproc, nnodes)
    assert record.devices == len(record.peak_memory_bytes) == nproc * nnodes
    assert record.steps.loss == pytest.approx(one.steps.loss, rel=1e-4)
    return record


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
def test_a_silent_process_may_make_weights_and_tokens(launch, tmp_path, framework):
    """Rank 1 may have the lock of the cache first. Here rank 0 starts when rank 1 has made all."""
    cache, ranks = tmp_path / "cache", places(framework, 2)
    for rank in (1, 0):
        launch(framework, "r.json", env=ranks[rank] | {"TUNEBENCH_CACHE": str(cache)})
        wait_for(lambda: list((cache / "plans").glob("*.safetensors")))
    launch.wait()
    assert "Traceback" not in (tmp_path / "0.log").read_text()
    assert read_record(tmp_path / "r.json").status == "ok"


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
def test_two_runs_at_the_same_time(alone, launch, tmp_path, framework, monkeypatch):
    """Each run has as many threads as a user's: its processes share the cores."""
    for run in "ab":
        launch(framework, f"{run}.json", "--nproc=2", env={"OMP_NUM_THREADS": None})
    launch.wait()
    one = alone(framework, "llama", "full")  # with the tests' one thread: other tests use this record too
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = int(maths_settings()["OMP_NUM_THREADS"])
    for run in "ab":
        record = check(tmp_path / f"{run}.json", one, nproc=2)
        assert record.hardware.threads == max(1, cores // 2)


@pytest.mark.parametrize(("framework", "program"), [("torch", "torchrun"), ("paddle", "paddle.distributed.launch")])
def test_the_other_frameworks_launcher_is_refused(framework, program):
    other = {"RANK": "0"} if framework == "paddle" else {"PADDLE_TRAINER_ID": "0"}
    line = refusal(run_program(f"{framework}/finetune_full.py", env=other))
    assert f"{next(iter(other))} is set" in line
    assert program in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mp=3"], "--mp 3 does not divide the model's 8 (attention heads); use 1 or 2"),
        (["--mp=2", "--zero=3"], "--zero 3 with --mp 2: not combined here"),
        (["--nproc=4", "--bsz=6"], "--bsz 6 does not divide over 4 replicas; use 4 or 8"),
        (
            ["--nnodes=2", "--master=no.such.host.invalid:1"],
            "--master no.such.host.invalid:1: no.such.host.invalid is not",
        ),
    ],
)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_refused_before_anything_starts(framework, arguments, message):
    assert message in refusal(run_program(f"{framework}/finetune_full.py", "--model=llama-tiny", *arguments))


@pytest.mark.parametrize(
    ("width", "called"), [("vocab_size", "8194 (vocabulary)"), ("intermediate_size", "690 (feed-forward width)")]
)
def test_a_width_that_paddle_cannot_slice_is_unsupported(tmp_path, width, called):
    preset = PRESETS["llama-tiny"]
    write_random(tmp_path, Preset(preset.config | {width: int(called.split()[0])}, preset.checkpoint_dtype), seed=0)
    out = tmp_path / "r.json"
    assert run_program("paddle/finetune_full.py", f"--model={tmp_path}", "--mp=4", f"--out={out}").returncode == 1
    record = read_record(out)
    assert record.status == "unsupported"
    assert f"slices into equal parts, and --mp 4 does not divide {called}" in record.reason


def test_more_processes_than_gpus_are_refused():
    options = {
        "nproc": 4,
        "nnodes": None,
        "node_rank": None,
        "master": None,
        "mp": 1,
        "zero": 0,
        "bsz": None,
        "micro_bsz": None,
    }
    with pytest.raises(BadInput, match=r"^--nproc 4: 2 GPU\(s\) visible; use at most 2, or hide"):
        place(options, gpus=2)
    options["nproc"] = None
    place(options, gpus=2)
    assert options["nproc"] == 2
