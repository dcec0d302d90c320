"""The files and variables by which a run's processes tell each other how the run went.

A worker that fails leaves a file in the run's own folder. The supervisor reads these files after the launcher ended.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tunebench.files import write_atomically
from tunebench.record import Steps

# The variables that a supervisor sets for its workers: the run's folder, the record's path, the supervisor's process
# id, and the user's CUDA_VISIBLE_DEVICES where it hides all GPUs.
RUN_FOLDER, RUN_RECORD, RUN_SUPERVISOR = "TUNEBENCH_RUN_FOLDER", "TUNEBENCH_RUN_RECORD", "TUNEBENCH_RUN_SUPERVISOR"
HIDDEN_DEVICES = "TUNEBENCH_HIDDEN_DEVICES"
DONE, FAILURE, EXIT = "done", "failure-", "exit-"
TIMEOUT_EXIT = 124  # as timeout(1) has it


class Failure(NamedTuple):
    """How a worker ended, in its own words. `steps` are the whole run's finished steps, where the worker knows them."""

    rank: int
    status: str
    reason: str
    log: list[str]
    steps: dict[str, list[float]] | None

    def told(self) -> tuple[str, str, list[str], Steps | None]:
        """Status, reason, log and steps for the record."""
        steps = None if self.steps is None else Steps.model_validate(self.steps)
        return self.status, f"rank {self.rank}: {self.reason}", self.log, steps


def folder_of_run() -> Path | None:
    """The folder of this worker's run; None where the process has no supervisor."""
    return Path(os.environ[RUN_FOLDER]) if RUN_FOLDER in os.environ else None


def leave_failure(folder: Path, rank: int, status: str, reason: str, log: Sequence[str], steps: Steps | None) -> None:
    """Tells the supervisor how a worker ended. Raises `BadInput` where the file cannot be written."""
    failure = Failure(rank, status, reason, list(log), steps.model_dump() if steps else None)
    write_atomically(folder / f"{FAILURE}{rank}", json.dumps(failure._asdict()).encode())


def leave_exit(folder: Path, rank: str, code: int) -> None:
    """Tells the supervisor a worker's exit code, since launchers do not report it reliably. Raises `BadInput`."""
    write_atomically(folder / f"{EXIT}{rank}", str(code).encode())


def leave_done(folder: Path) -> None:
    """Tells the supervisor that the record is written."""
    (folder / DONE).touch()


def is_done(folder: Path) -> bool:
    """Whether the record is written."""
    return (folder / DONE).exists()


def has_failed(folder: Path) -> bool:
    """Whether a worker has reported that it failed."""
    return any(folder.glob(f"{EXIT}*")) or any(folder.glob(f"{FAILURE}*"))


def failures(folder: Path) -> list[Failure]:
    """The reports of the workers that failed, the earliest first."""
    return [Failure(**json.loads(file.read_text())) for file in _oldest_first(folder.glob(f"{FAILURE}*"))]


def exits(folder: Path) -> list[tuple[str, int]]:
    """Rank and exit code of the workers that failed, the earliest first. A signal's code is negative."""
    files = _oldest_first(folder.glob(f"{EXIT}*"))
    return [(file.name.removeprefix(EXIT), int(file.read_text())) for file in files]


def _oldest_first(files: Iterator[Path]) -> list[Path]:
    return sorted(files, key=lambda file: file.stat().st_mtime_ns)
