"""Fixtures and helpers of all tests: paths, folders of the session, and programs run as a user runs them."""

import contextlib
import importlib.util
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tunebench import bootstrap
from tunebench.flags import parse_flags
from tunebench.forecast.job import describe
from tunebench.record import Record, read_record
from tunebench.run.run import Job
from tunebench.world import ALONE

ROOT = Path(__file__).resolve().parents[1]
FRAMEWORKS = ("torch", "paddle")
HERE = "torch" if importlib.util.find_spec("torch") else "paddle"  # the framework of this environment
sys.path.insert(0, str(ROOT / "data"))


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """The folder that all workers of pytest-xdist share. Their own folders are inside it."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session", autouse=True)
def own_folders(shared_folder, tmp_path_factory):
    """Hides GPUs from this process and its children, and gives them a cache and a results folder of their own."""
    patch = pytest.MonkeyPatch()
    patch.setenv("CUDA_VISIBLE_DEVICES", "")  # the tests are the same on a machine with GPUs
    patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(shared_folder / "inductor"))  # compiled code
    patch.setenv("TUNEBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("TUNEBENCH_RESULTS", str(tmp_path_factory.mktemp("results")))
    yield
    patch.undo()


def run_program(*command: object, check: bool = False, **options) -> subprocess.CompletedProcess:
    """Runs a program of the repository with this interpreter, from another folder; returns what it printed."""
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


def train(framework: str, method: str, out: Path, *flags: object, **options) -> Record:
    """Runs a script to its end and reads its record."""
    run_program(f"{framework}/finetune_{method}.py", *flags, "--out", out, check=True, **options)
    return read_record(out)


ALTERED = """
import runpy, sys
script = sys.argv.pop(1)
sys.argv[0], sys.path[0] = script, script.rpartition("/")[0]
{code}
runpy.run_path(script, run_name="__main__")
"""


def run_altered(code: str, framework: str, method: str, *flags: object) -> subprocess.CompletedProcess:
    """Runs a script in an interpreter that has executed `code` before."""
    python = ROOT / ".venv" / framework / "bin" / "python"
    script = ROOT / framework / f"finetune_{method}.py"
    command = [python, "-c", ALTERED.format(code=code), script, *flags]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600, cwd="/", check=False)


def train_altered(code: str, framework: str, method: str, out: Path, *flags: object) -> Record:
    """Runs a script as `run_altered` does and reads its record."""
    run_altered(code, framework, method, *flags, "--out", out)
    return read_record(out)


def assert_one_curve(torch: Record, paddle: Record) -> None:
    """Asserts that both sides have the same losses and gradient norms at each step."""
    assert paddle.steps.loss[0] == pytest.approx(torch.steps.loss[0], rel=1e-5)
    assert paddle.steps.loss == pytest.approx(torch.steps.loss, rel=1e-4)
    assert paddle.steps.grad_norm == pytest.approx(torch.steps.grad_norm, rel=1e-4)


def assert_one_model(a: Record, b: Record) -> None:
    """Asserts that both runs trained the same model. Numbers read back from it may differ by float32 rounding."""
    assert a.model.built.contradiction(b.model.built) is None
    assert a.model == b.model.model_copy(update={"built": a.model.built})


def refusal(done: subprocess.CompletedProcess) -> str:
    """Asserts that a program refused bad input, by one line and exit code 2; returns the line."""
    assert done.returncode == 2, f"exit code {done.returncode}:\n{done.stdout}\n{done.stderr}"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.fixture(scope="session")
def short(tmp_path_factory):
    """Flags of a short run: samples of a few words, ten steps."""
    file = tmp_path_factory.mktemp("data") / "short.json"
    text = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    samples = [
        {"instruction": " ".join(text[: 2 + i % 7]), "output": " ".join(text[i % 5 : 4 + i % 5])}
        for i in range(40)  # five steps: the second half of ten steps repeats the batches of the first
    ]
    file.write_text(json.dumps(samples))
    return [f"--data={file}", "--bsz=8", "--steps=10", "--warmup-steps=2", "--lr=5e-4", "--seed=1"]


@pytest.fixture(scope="session")
def alone(short, shared_folder):
    """A function that returns the record of a run of one process. Each run is made once in a session."""

    def record(framework, family, method):
        out = shared_folder / f"alone-{framework}-{family}-{method}.json"
        with FileLock(f"{out}.lock"):
            if out.exists() and (made := read_record(out)).status == "ok":
                return made
            return train(framework, method, out, f"--model={family}-tiny", *short)

    return record


def job_of(method: str, *flags: object, gpu: str = "a100-80g") -> Job:
    """The job of these flags on a planned GPU."""
    given = parse_flags(method, [*map(str, flags), "--plan", f"--gpu={gpu}"], framework=HERE)
    described, checkpoint, plan, _ = describe(given)
    return Job(described, checkpoint, plan, ALONE)


@contextlib.contextmanager
def loaded_script(method: str) -> Iterator[dict[str, Any]]:
    """Yields the functions of this environment's script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT / HERE), *sys.path])
        arguments = ["--model=llama-tiny", "--bsz=1", "--samples=2", "--steps=2", "--warmup-steps=1"]
        patch.setattr(sys, "argv", [f"finetune_{method}.py", *arguments])
        for name in bootstrap.UNWANTED:  # the script would be started anew without them
            patch.delenv(name, raising=False)
        yield runpy.run_path(str(ROOT / HERE / f"finetune_{method}.py"))


@pytest.fixture(scope="module")
def script():
    """The functions of this environment's finetune_full.py."""
    with loaded_script("full") as functions:
        yield functions


@pytest.fixture(scope="module")
def scripts(script):
    """The functions of this environment's scripts, by method."""
    with loaded_script("lora") as functions:
        yield {"full": script, "lora": functions}
