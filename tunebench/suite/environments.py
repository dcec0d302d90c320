"""Makes the environments that a suite needs, by setup.sh."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tunebench import processes
from tunebench.errors import BadInput

LOOK = 0.25  # seconds between two looks at setup.sh


def make_environments(root: Path, names: Sequence[str], cpu: bool, stopped: Callable[[], bool]) -> bool:
    """Makes the environments `names` of the checkout `root`, of CPU builds with `cpu`.

    Returns False where it was `stopped`. Raises `BadInput` where setup.sh fails.
    """
    process = processes.start(["bash", root / "setup.sh", *names, *["--cpu"] * cpu], cwd=root)
    try:
        while process.poll() is None and not stopped():
            time.sleep(LOOK)
        code = process.returncode
    finally:
        processes.end(process)
    if code:
        raise BadInput(f"{root / 'setup.sh'} failed for {', '.join(names)} (its messages are above); mend that first")
    if code is None:
        print("interrupted during set-up; the same command goes on", flush=True)
    return code is not None
