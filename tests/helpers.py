"""Functions that several test files share, beside the fixtures of conftest.py."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, ForkedRuns

from tunebench.flags import parse_flags
from tunebench.record import Record
from tunebench.run.run import describe_run

MODEL = "llama-tiny"  # the model whose bytes are counted
SUITE = """
title = "two short pairs"
[defaults]
steps = 4
"warmup-steps" = 1
bsz = 2
samples = 40
model = "llama-tiny"
recompute = false
[[pair]]
name = "full"
script = "finetune_full.py"
[[pair]]
name = "lora"
script = "finetune_lora.py"
flags = { steps = 20, recompute = true }
"""


def probe(forked: ForkedRuns, framework: str, method: str, folder: Path, *flags: object) -> tuple[list[dict], Record]:
    """Runs a script and returns the bytes that each rank held, by kind, and the run's record."""
    where = {"PROGRAM": "bytes_held.py", "TUNEBENCH_BYTES": str(folder)}
    record = forked.train(framework, method, folder / "record", *flags, **where)
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(record.devices)]
    for held in ranks:
        assert held["passes"][-1] == held["gradients"]
        for kind in ("trainable", "frozen"):  # the step gathers weights and must free them again
            assert held["after"][kind] == held[kind]
    return ranks, record


def ask_uv(*arguments: object) -> str:
    """What uv prints, with pip's index. The test is skipped where the index cannot be reached."""
    uv = shutil.which("uv", path=ROOT / ".venv/uv/bin") or shutil.which("uv")
    if uv is None:
        pytest.skip("uv is neither in .venv/uv nor on the path")
    how = {"capture_output": True, "text": True, "check": False}
    config = subprocess.run(["python3", "-m", "pip", "config", "get", "global.index-url"], **how).stdout.strip()
    index = os.environ.get("UV_DEFAULT_INDEX") or os.environ.get("PIP_INDEX_URL") or config
    env = os.environ | ({"UV_DEFAULT_INDEX": index} if index else {})
    try:
        done = subprocess.run([uv, "pip", *map(str, arguments)], env=env, cwd=ROOT, timeout=300, **how)
    except subprocess.TimeoutExpired:
        pytest.skip("the package index took longer than 300 s")
    if "Failed to fetch" in done.stderr:
        pytest.skip(f"the package index cannot be reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return done.stdout


def close(size: float):
    """Equal but for padding that aligns a slice in a buffer."""
    return pytest.approx(size, rel=1e-4)


def record(**changes) -> Record:
    """The record that a runner writes of a run that never started, with changes."""
    known = describe_run("torch", "full", parse_flags("full", ["--model=llama-tiny"]), ["finetune_full.py"])
    unknown = {"model": None, "plan": None, "steps": None, "setup_seconds": None, "peak_memory_bytes": [], "log": []}
    return Record(**(known | unknown | {"status": "failed", "reason": "killed by SIGKILL (9)"} | changes))


def wait_for(what, timeout: float = 180):
    """Calls `what` until its result is true; returns it."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def start_suite(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    """Starts the runner on `folder`/mini.toml, its results in `folder`/results, from a folder that is neither.

    OMP_NUM_THREADS is 1: on a busy machine, torch waited up to 5 s a step for a second thread.
    """
    own = {"TUNEBENCH_RESULTS": str(folder / "results"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [
            sys.executable,
            "-P",
            "-m",
            "tunebench.suite.runner",
            f"--suite={folder / 'mini.toml'}",
            "--anyway",
            *arguments,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
        env=os.environ | own | environment,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # nohup, under which tests may run, ignores it
    )


def finish_suite(running: subprocess.Popen, exit_code: int, seconds: float = 300) -> str:
    """Waits for the runner, asserts its exit code and that it printed no traceback; returns its output."""
    printed, errors = running.communicate(timeout=seconds)
    assert running.returncode == exit_code, printed + errors
    assert "Traceback" not in printed + errors
    return printed


def refusal_of_suite(folder: Path, *arguments: str) -> str:
    """Asserts that the runner refused its input by one line and made no file; returns the line."""
    running = start_suite(folder, *arguments)
    printed, errors = running.communicate(timeout=60)
    assert (running.returncode, printed) == (2, ""), printed + errors
    assert errors.count("\n") == 1
    assert not (folder / "results").exists()
    return errors
