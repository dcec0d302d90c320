"""Runs of several processes: their arithmetic is that of one process."""

import itertools
import os

import pytest
from conftest import FRAMEWORKS, assert_one_curve, assert_one_model, run_program

from tunebench.bootstrap import THREADS_LEFT_TO_US
from tunebench.record import read_record
from tunebench.run.place import read_world
from tunebench.world import expand, share_threads

# Each way of splitting work. Those that treat the last pass of a step differently also run with accumulation. Numbers
# of processes, families and methods alternate.
SETUPS = [
    ("llama", "full", ["--zero=3"]),
    ("llama", "full", ["--mp=2", "--micro-bsz=4"]),
    ("llama", "lora", ["--nproc=2"]),
    ("bloom", "full", ["--zero=2", "--micro-bsz=2"]),
    ("bloom", "full", ["--mp=2", "--nproc=4"]),
    ("bloom", "lora", ["--mp=2", "--nproc=4", "--micro-bsz=2"]),
    ("llama", "lora", ["--mp=4"]),
    ("bloom", "full", ["--zero=1", "--micro-bsz=2"]),
    ("llama", "full", ["--zero=2", "--nproc=4"]),
    ("bloom", "lora", ["--zero=3", "--micro-bsz=2"]),
    ("chatglm2", "full", ["--zero=3"]),
    ("chatglm2", "full", ["--mp=2", "--attention=sdpa"]),
    ("chatglm2", "lora", ["--zero=2"]),
    ("bloom", "full", ["--mp=2", "--attention=flash"]),
    # Tied heads, and with llama-3.2-1b a scaled rotary embedding.
    ("llama-3.2-1b", "full", ["--zero=3"]),
    ("llama-3.2-1b", "full", ["--mp=2"]),
    ("llama-3.2-1b", "lora", ["--mp=2", "--micro-bsz=2"]),
    ("qwen2.5-0.5b", "full", ["--mp=2", "--micro-bsz=2"]),
    ("llama-3.2-1b", "lora", ["--zero=3"]),
    ("llama-3.2-1b", "full", ["--nproc=2", "--micro-bsz=2"]),
]


@pytest.mark.frameworks
@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    ("family", "method", "setup"),
    SETUPS,
    ids=lambda part: "".join(part),
)
def test_several_processes_do_the_arithmetic_of_one(alone, forked, short, tmp_path, framework, family, method, setup):
    one = alone(framework, family, method)
    many = forked.train(framework, method, tmp_path / "r.json", f"--model={family}-tiny", *short, *setup)
    assert many.devices * many.setup.accumulation > 1
    assert len(many.peak_memory_bytes) == many.devices
    assert_one_model(many, one)
    assert_one_curve(many, one)


@pytest.mark.frameworks
@pytest.mark.parametrize(
    ("framework", "family", "method", "setup"),
    [
        *((framework, "llama", "full", ["--micro-bsz=4"]) for framework in FRAMEWORKS),
        *((framework, "llama", "lora", ["--nproc=4", "--recompute"]) for framework in FRAMEWORKS),
        *((framework, "qwen2", "full", ["--padding-free", "--attention=sdpa"]) for framework in FRAMEWORKS),
        *((framework, "chatglm2", "full", ["--attention=sdpa"]) for framework in FRAMEWORKS),
        *((framework, "llama-3.2-1b", "full", ["--recompute"]) for framework in FRAMEWORKS),  # its heads are tied
        ("torch", "bloom", "full", ["--nproc=4", "--micro-bsz=2"]),
        ("torch", "bloom", "lora", []),
        ("torch", "llama", "full", ["--tuned", "--order=plan"]),
        ("torch", "llama", "lora", ["--tuned", "--order=plan", "--recompute"]),
        ("paddle", "llama", "full", ["--overlap", "--lean", "--fuse-projections"]),
    ],
    ids=lambda part: "".join(part),
)
def test_tokens_may_be_split_between_sliced_products(alone, forked, short, tmp_path, framework, family, method, setup):
    one = alone(framework, family, method)
    flags = [f"--model={family}-tiny", *short, "--mp=2", "--sequence-parallel", *setup]
    many = forked.train(framework, method, tmp_path / "r.json", *flags)
    assert many.setup.sequence_parallel
    assert_one_model(many, one)
    assert_one_curve(many, one)


@pytest.mark.frameworks
@pytest.mark.parametrize(
    ("family", "method", "setup"),
    [
        ("llama", "full", ["--zero=3", "--micro-bsz=2"]),
        ("bloom", "full", ["--zero=2", "--nproc=4"]),
        ("llama", "lora", ["--zero=3", "--recompute"]),
        ("chatglm2", "lora", ["--zero=2", "--micro-bsz=2"]),
        ("llama-3.2-1b", "full", ["--zero=3", "--nproc=4"]),
    ],
    ids=lambda part: "".join(part),
)
def test_fsdp_does_the_arithmetic_of_one_process(alone, forked, short, tmp_path, family, method, setup):
    one = alone("torch", family, method)
    flags = [f"--model={family}-tiny", *short, *setup, "--sharding=fsdp"]
    many = forked.train("torch", method, tmp_path / "r.json", *flags)
    assert (many.setup.sharding, many.devices) == ("fsdp", len(many.peak_memory_bytes))
    assert_one_model(many, one)
    assert_one_curve(many, one)


@pytest.mark.frameworks
@pytest.mark.parametrize(
    ("family", "method"),
    [
        *itertools.product(["qwen2", "chatglm2"], ["full", "lora"]),
        *(("llama-3.2-1b", method) for method in ("full", "lora")),
        *((family, "full") for family in ("llama-3.1-8b", "qwen2.5-0.5b")),
    ],
)
def test_both_frameworks_do_the_same(alone, family, method):
    """The families that test_scripts.py does not compare. The layers of ChatGLM2 differ between the frameworks."""
    torch, paddle = (alone(framework, family, method) for framework in ("torch", "paddle"))
    assert_one_model(torch, paddle)
    assert_one_curve(torch, paddle)


@pytest.mark.frameworks
def test_what_a_framework_does_not_offer_is_unsupported(forked, short, tmp_path):
    flags = ["--model=chatglm2-tiny", "--mp=2", *short, f"--out={tmp_path / 'r.json'}"]
    assert run_program("torch/finetune_lora.py", *flags).returncode == 1
    record = read_record(tmp_path / "r.json")
    assert record.status == "unsupported"
    assert "peft" in record.reason
    flags = ["--model=llama-tiny", "--zero=2", "--sharding=fsdp", *short, f"--out={tmp_path / 'fsdp.json'}"]
    assert run_program("paddle/finetune_full.py", *flags).returncode == 1
    assert "sharding of its own" in read_record(tmp_path / "fsdp.json").reason
    # Paddle's LoRA also adapts layers split along their inputs. A is a slice there: this tests its start values.
    one = forked.train("paddle", "lora", tmp_path / "1.json", "--model=chatglm2-tiny", *short)
    two = forked.train("paddle", "lora", tmp_path / "2.json", "--model=chatglm2-tiny", "--mp=2", *short)
    assert two.steps.loss == pytest.approx(one.steps.loss, rel=1e-4)


def test_the_place_that_slurm_gives():
    step = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
    step |= {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu[08-09]"}
    world = read_world("torch", step)
    assert (world.rank, world.local_rank, world.nproc, world.nnodes, world.hosts) == (3, 1, 2, 2, ("gpu08", "gpu09"))
    assert read_world("torch", {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) is None, "a batch script is no worker"
    assert expand("a[1-2,4]-ib,b") == ("a1-ib", "a2-ib", "a4-ib", "b")


@pytest.mark.parametrize("nodes", ["a[1-", "a[1-]", "[", "", "a[0-999999999999]"])
def test_node_lists_that_are_none(nodes):
    with pytest.raises(ValueError, match=r"no list of hosts|more than 100000 hosts|invalid literal"):
        expand(nodes)


def test_a_task_that_slurm_has_bound_to_cores_has_its_share(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setenv(THREADS_LEFT_TO_US, "8")
    shared = {"OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "4"}
    for on_node, threads in ((cores, shared), ("2(x2)", shared), (cores + 1, {})):
        monkeypatch.setenv("SLURM_CPUS_ON_NODE", str(on_node))
        assert share_threads(2) == threads


def test_no_launcher_started_this():
    assert read_world("paddle", {"PATH": os.environ["PATH"]}) is None
