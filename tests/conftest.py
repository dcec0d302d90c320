"""Shared by all tests: where things are, a cache of the session's own, and how a program is run as a user would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tunebench.record import Record, read_record

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "data"))


@pytest.fixture(scope="session", autouse=True)
def own_folders(tmp_path_factory):
    """For this process and all that it starts: no GPU, and a cache and a results folder that no other run shares."""
    patch = pytest.MonkeyPatch()
    patch.setenv("CUDA_VISIBLE_DEVICES", "")  # the same tests on a machine with GPUs
    patch.setenv("TUNEBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("TUNEBENCH_RESULTS", str(tmp_path_factory.mktemp("results")))
    yield
    patch.undo()


def run_program(*command: object, check: bool = False, **options) -> subprocess.CompletedProcess:
    """Runs `command` relative to the repository with this interpreter, from elsewhere, and returns what it printed."""
    program, *arguments = map(str, command)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")} | options.pop("env", {})
    done = subprocess.run(
        [sys.executable, str(ROOT / program), *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=options.pop("cwd", "/"),
        env=environment,
        **options,
    )
    if check and done.returncode:
        raise AssertionError(f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


def train(framework: str, method: str, out: Path, *flags: object) -> Record:
    """Runs a script to its end and reads its record."""
    run_program(f"{framework}/finetune_{method}.py", *flags, "--out", out, check=True)
    return read_record(out)


def refusal(done: subprocess.CompletedProcess) -> str:
    """The one line with which a program refused bad input; asserts that it was one line and exit code 2."""
    assert done.returncode == 2, f"exit code {done.returncode}:\n{done.stdout}\n{done.stderr}"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    return lines[0]
