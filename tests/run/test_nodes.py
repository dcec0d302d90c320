"""Several nodes: two network namespaces joined by a veth pair. Each test needs root, and skips where it may not."""

import contextlib
import os
import re
import subprocess
import time

import pytest
from conftest import FRAMEWORKS, assert_one_curve
from two_nodes import Nodes

from tunebench.errors import BadInput
from tunebench.record import read_record

pytestmark = pytest.mark.frameworks
LIMIT = 60  # seconds: the runs' own --timeout, of which start-up takes a part
TIMED_OUT = 124  # the exit code of a run that ended by it
LONG = ["--model=llama-tiny", "--samples=40", "--steps=2000", "--bsz=2", f"--timeout={LIMIT}"]


@pytest.fixture
def nodes(tmp_path):
    """Two nodes whose logs and records are in `tmp_path`."""
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(Nodes(tmp_path))
        except BadInput as error:
            pytest.skip(f"no network namespaces can be made here: {error}")
        yield made


def wait(nodes, running, seconds):
    """The exit code of a program that must end within `seconds`."""
    try:
        return running.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"not ended\n{nodes.logs()}") from None


def check(nodes, alone, framework, devices):
    """Asserts that node a left the record of a run over both nodes, with the losses of one process."""
    record = read_record(nodes.folder / "a.json")
    assert (record.status, record.setup.nnodes, record.devices) == ("ok", 2, devices)
    assert_one_curve(record, alone(framework, "llama", "full"))
    assert not (nodes.folder / "b.json").exists()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_two_nodes_have_the_losses_of_one_process(nodes, alone, short, framework):
    for running in nodes.train(framework, "--model=llama-tiny", *short, "--nproc=2").values():
        assert wait(nodes, running, 240) == 0, nodes.logs()
    check(nodes, alone, framework, devices=4)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_tasks_that_slurm_starts_on_two_nodes(nodes, alone, short, framework):
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "node-a,node-b"}
    step |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}
    for rank, node in enumerate("ab"):
        place = step | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": "0"}
        nodes.start(node, framework, "--model=llama-tiny", *short, **place)
    for running in nodes.running:
        assert wait(nodes, running, 240) == 0, nodes.logs()
    check(nodes, alone, framework, devices=2)


def start_long(nodes, framework):
    """Starts a run that outlasts its time-out, and waits for its first steps; its processes by node."""
    started = nodes.train(framework, *LONG)
    deadline = time.monotonic() + LIMIT
    while "step 2/" not in nodes.log("a"):
        assert time.monotonic() < deadline, nodes.logs()
        time.sleep(0.2)
    return started


def check_reason(nodes, code):
    """Asserts that node a's record says how far the run came, or what its process saw of the other node."""
    record = read_record(nodes.folder / "a.json")
    if code == TIMED_OUT:
        assert record.status == "timeout"
        assert re.fullmatch(rf"not done within --timeout {LIMIT} s, after step \d+", record.reason), record.reason
    else:
        assert record.status == "failed"
        assert re.search(r"(?i)connection|peer|timed? ?out|10\.213\.7\.2", record.reason), record.reason


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_cut_link_ends_both_nodes(nodes, framework):
    started = start_long(nodes, framework)
    nodes.cut()
    codes = {node: wait(nodes, running, LIMIT + 15) for node, running in started.items()}
    assert set(codes.values()) <= {1, TIMED_OUT}, nodes.logs()
    check_reason(nodes, codes["a"])


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_killed_node_ends_the_other(nodes, framework):
    started = start_long(nodes, framework)
    started["b"].kill()
    code = wait(nodes, started["a"], LIMIT + 15)
    assert code in (1, TIMED_OUT), nodes.logs()
    check_reason(nodes, code)
    assert not nodes.pids("b"), "a killed supervisor leaves none of its workers"
