"""Runs between the launcher and one worker. It starts the worker and keeps its exit code, which launchers misreport.

    python tunebench/bootstrap.py FRAMEWORK tunebench.run.worker SCRIPT [ARG ...]

It exits with the worker's exit code. The worker ends with this process, and this process with the launcher.
"""

import os
import signal
import sys
from pathlib import Path

import psutil

from tunebench import processes
from tunebench.errors import BadInput
from tunebench.frameworks import FRAMEWORKS
from tunebench.run.outcome import HIDDEN_DEVICES, RUN_FOLDER, RUN_SUPERVISOR, leave_exit


def main() -> int:
    """Runs the worker to its end."""
    processes.die_with_parent()
    launcher = psutil.Process(os.getppid())
    if launcher.ppid() != int(os.environ[RUN_SUPERVISOR]):  # the launcher ended before die_with_parent took effect
        return 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor handles Ctrl-C
    hidden = os.environ.pop(HIDDEN_DEVICES, None)
    if hidden is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = hidden
    worker = processes.start([sys.executable, *sys.argv[1:]])
    code = worker.wait()
    if code:
        variables = (framework.rank_variable for framework in FRAMEWORKS.values())
        rank = next(os.environ[name] for name in variables if os.environ.get(name))
        try:
            leave_exit(Path(os.environ[RUN_FOLDER]), rank, code)
        except BadInput as fault:
            print(f"rank {rank} ended with {code}; {fault}", file=sys.stderr)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
