"""Fixtures and helpers of all tests: paths, folders of the session, and programs run as a user runs them."""

import contextlib
import importlib.util
import json
import os
import runpy
import select
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tunebench import bootstrap, processes
from tunebench.flags import parse_flags
from tunebench.forecast.job import describe
from tunebench.frameworks import FRAMEWORKS as KNOWN
from tunebench.record import Record, read_record
from tunebench.run.run import Job
from tunebench.world import ALONE, World

ROOT = Path(__file__).resolve().parents[1]
FRAMEWORKS = ("torch", "paddle")
LIMIT = 600  # seconds that a program may take
HERE = "torch" if importlib.util.find_spec("torch") else "paddle"  # the framework of this environment
sys.path.insert(0, str(ROOT / "data"))
# The files that take longest, so that no worker of pytest-xdist begins one of them when the others have no more to do.
SLOWEST = (
    "run/test_nodes.py",
    "scripts/test_sharding.py",
    "scripts/test_tuned.py",
    "scripts/test_parallel.py",
    "run/test_ends.py",
    "suite/test_gpu_suites.py",
    "suite/test_versus.py",
    "test_conditions.py",
    "scripts/test_paddleformers.py",
    "scripts/test_scripts.py",
    "suite/test_suite.py",
    "run/test_faults.py",
    "forecast/test_forecast.py",
    "scripts/test_precision.py",
    "suite/test_check.py",
    "run/test_launch.py",
    "scripts/test_attention.py",
    "forecast/test_formula.py",
    "suite/test_peers.py",
    "models/test_weights.py",
    "profile/test_profile.py",
    "test_setup.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests of SLOWEST first. The others keep their order."""
    places = {ROOT / "tests" / name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


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


def own_environment() -> dict[str, str]:
    """This process's environment variables without pytest's."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}


def run_program(*command: object, check: bool = False, **options) -> subprocess.CompletedProcess:
    """Runs a program of the repository with this interpreter, from another folder; returns what it printed."""
    program, *arguments = map(str, command)
    done = subprocess.run(
        [sys.executable, str(ROOT / program), *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        cwd=options.pop("cwd", "/"),
        env=own_environment() | options.pop("env", {}),
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
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=LIMIT, cwd="/", check=False)


def train_altered(code: str, framework: str, method: str, out: Path, *flags: object) -> Record:
    """Runs a script as `run_altered` does and reads its record."""
    run_altered(code, framework, method, *flags, "--out", out)
    return read_record(out)


class ForkedRuns:
    """Runs of scripts as forks of servers, tests/fork_server.py, which says what such runs cannot test."""

    def __init__(self, folder: Path) -> None:
        """`folder` gets what runs and servers print."""
        self.folder = folder
        self.servers: dict[tuple[str, ...], subprocess.Popen] = {}
        self.number = 0

    def run(self, framework: str, method: str, *flags: object, code: str = "", **probe: str) -> tuple[int, str]:
        """Runs a script, with all its processes, after `code`. Returns the first exit code that is not 0, and what the
        processes printed. `probe` is for a program of tests/ that runs the script: PROGRAM=its name, and variables.
        """
        self.number += 1
        log = self.folder / f"{framework}-{self.number}"
        script = f"{framework}/finetune_{method}.py"
        program, known = ROOT / script, own_environment() | probe
        if probe:
            program, known["TUNEBENCH_PROBE"] = ROOT / "tests" / probe["PROGRAM"], script
        arguments = list(map(str, flags))
        parsed = parse_flags(method, arguments, framework=framework)
        size = 1 if parsed.plan else parsed.world_size
        packages = (framework, "deepspeed") if framework == "torch" and parsed.zero and size > 1 else (framework,)
        asked = {"script": str(program), "flags": arguments, "code": code, "log": str(log)}
        codes = self._ask(packages, asked | {"ranks": [known | place for place in places(framework, size)]})
        printed = "\n".join(file.read_text(errors="replace") for file in sorted(self.folder.glob(f"{log.name}-*")))
        return next((code for code in codes if code), 0), printed

    def train(self, framework: str, method: str, out: Path, *flags: object, code: str = "", **probe: str) -> Record:
        """Runs a script to its end, as `run` does, and reads its record. Without `code` it must end well, and a process
        must not print a warning for each step.
        """
        exit_code, printed = self.run(framework, method, *flags, "--out", out, code=code, **probe)
        if exit_code and not code:
            raise AssertionError(f"{framework} {method} {flags} ended with {exit_code}:\n{printed}")
        record = read_record(out)
        each_step = max(3, len(record.steps.loss) if record.steps else 0) * record.devices
        for line, times in Counter(line for line in printed.splitlines() if "Warning" in line).items():
            assert times < each_step, f"printed {times} times: {line}"
        return record

    def _ask(self, packages: tuple[str, ...], asked: dict[str, Any]) -> list[int]:
        server = self.servers.get(packages)
        if server is None or server.poll() is not None:
            server = self.servers[packages] = self._start(packages)
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(f"{json.dumps(asked)}\n")
        server.stdin.flush()
        answered, *_ = select.select([server.stdout], [], [], LIMIT)
        answer = server.stdout.readline() if answered else ""
        if not answer:
            processes.end(server, patience=1)
            said = (self.folder / f"server-{'-'.join(packages)}").read_text(errors="replace")
            raise AssertionError(f"no answer of the server of {' and '.join(packages)} to {asked}:\n{said}")
        return json.loads(answer)

    def _start(self, packages: tuple[str, ...]) -> subprocess.Popen:
        with (self.folder / f"server-{'-'.join(packages)}").open("a") as log:
            return subprocess.Popen(
                [ROOT / ".venv" / packages[0] / "bin" / "python", ROOT / "tests" / "fork_server.py", *packages],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd="/",
                env=own_environment() | {"DS_ACCELERATOR": "cpu"},  # as parallel.import_deepspeed sets it
                start_new_session=True,
                preexec_fn=processes.dying_with_parent(),
            )

    def end(self) -> None:
        """Ends the servers."""
        for server in self.servers.values():
            processes.end(server, patience=1)


def places(framework: str, size: int) -> list[dict[str, str]]:
    """The environment variables that a launcher sets for each of `size` processes of one run; of one process none."""
    if size == 1:
        return [{}]
    with socket.socket() as reserved:
        reserved.bind(("localhost", 0))
        port = reserved.getsockname()[1]
    settings = KNOWN[framework].place_settings
    return [settings(World(rank, rank, size, size, port, ("localhost",))) for rank in range(size)]


@pytest.fixture(scope="session")
def forked(own_folders, tmp_path_factory):
    """Runs of scripts as forks. The servers are started at the first run of their framework."""
    runs = ForkedRuns(tmp_path_factory.mktemp("forked"))
    yield runs
    runs.end()


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
def alone(short, shared_folder, forked):
    """A function that returns the record of a run of one process. Each run is made once in a session."""

    def record(framework, family, method):
        out = shared_folder / f"alone-{framework}-{family}-{method}.json"
        with FileLock(f"{out}.lock"):
            if out.exists() and (made := read_record(out)).status == "ok":
                return made
            return forked.train(framework, method, out, f"--model={family}-tiny", *short)

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
