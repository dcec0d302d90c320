"""Runs training scripts in forks of one process that has imported their framework, whose import takes most of a run.

    .venv/torch/bin/python tests/fork_server.py torch [PACKAGE ...]

PACKAGE is imported too.

A client writes one JSON request a line and gets one answer a line. A request is {"script": PATH, "flags": [FLAG, ...],
"code": TEXT, "ranks": [{VARIABLE: VALUE, ...}, ...], "log": PATH}; the answer is the list of the ranks' exit codes, a
signal's number negative. Each rank is a process of its own with these environment variables and no others. It runs
`code` and then the script as `__main__`, from its first line on, and prints to PATH-RANK. Several ranks have the
variables that a launcher sets: to the script that is a run that the user's own launcher started.

The server imports packages alone, and nothing of this project but what these lines need. It has one thread when it
forks. What a fork cannot test is the start of a program itself: the choice of the interpreter, this project's
launchers and supervisor, settings that libraries read when they load, and the memory that a process has.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("bloom", "glm", "llama", "qwen2")
SHARED = ("numpy", "psutil", "pydantic", "pynvml", "rich", "safetensors")
# What every run of a framework imports. Anything else is imported by the runs that need it.
PACKAGES = {
    "torch": (
        "torch.distributed.fsdp",
        "torch.distributed.tensor",
        "torch.nn.attention.varlen",
        "torch.profiler",
        "torch.utils._python_dispatch",
        "transformers.distributed.tensor_parallel",
        "transformers.integrations.sdpa_attention",
        "transformers.modeling_utils",
        *(f"transformers.models.{model}.modeling_{model}" for model in MODELS),
        "peft",
    ),
    "paddle": ("paddle", "paddle.distributed.fleet", "paddlenlp.transformers", "paddlenlp.peft"),
}
PATIENCE = 5.0  # seconds that the other ranks have to end after one failed
LOOK = 0.01  # seconds between two looks at the ranks


def main() -> None:
    """Answers requests until stdin is closed. In a fork it returns after the script, as a program ends."""
    framework, *more = sys.argv[1:]
    runpy.run_path(str(ROOT / "tunebench" / "bootstrap.py"))["enter_environment"](framework)
    from tunebench import processes

    gc.disable()
    for name in (*SHARED, *PACKAGES[framework], *more):
        importlib.import_module(name)
    for name in [name for name in sys.modules if name.partition(".")[0] == "tunebench"]:
        del sys.modules[name]
    gc.freeze()
    gc.enable()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    while request := sys.stdin.readline():
        asked: dict[str, Any] = json.loads(request)
        check_threads()
        ranks = []
        for number, environment in enumerate(asked["ranks"]):
            pid = os.fork()
            if not pid:
                answers.close()
                processes.die_with_parent()
                run(asked, number, environment)
                return
            ranks.append(pid)
        print(json.dumps(wait_for(ranks)), file=answers, flush=True)


def check_threads() -> None:
    """Raises RuntimeError where a fork would lack a thread. jemalloc, which pyarrow brings, starts its own again."""
    names = [(thread / "comm").read_text().strip() for thread in Path("/proc/self/task").iterdir()]
    names.remove(Path("/proc/self/comm").read_text().strip())
    if set(names) - {"jemalloc_bg_thd"}:
        raise RuntimeError(f"a fork would lack these threads of the server: {', '.join(names)}")


def run(asked: dict[str, Any], number: int, environment: dict[str, str]) -> None:
    """Runs the script in this process, which was forked for it."""
    os.setsid()
    log = os.open(f"{asked['log']}-{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir("/")
    os.environ.clear()
    os.environ.update(environment)
    script = asked["script"]
    sys.argv, sys.path[0] = [script, *asked["flags"]], str(Path(script).parent)
    exec(asked["code"], {"__name__": "altered"})
    runpy.run_path(script, run_name="__main__")


def wait_for(ranks: list[int]) -> list[int]:
    """The exit codes of all ranks. Where one failed, the others are ended after a while, as launchers do."""
    codes: dict[int, int] = {}
    deadline = None
    while len(codes) < len(ranks):
        for pid in ranks:
            if pid in codes:
                continue
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
                end_group(pid)
            elif deadline is not None and time.monotonic() > deadline:
                end_group(pid)
        if deadline is None and any(codes.values()):
            deadline = time.monotonic() + PATIENCE
        time.sleep(LOOK)
    return [codes[pid] for pid in ranks]


def end_group(pid: int) -> None:
    """Kills a rank and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
