"""Where files go: the cache for what can be made again, the results for what cannot, and how they are written."""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tunebench.bootstrap import ROOT
from tunebench.errors import BadInput, cannot_write


def cache_folder() -> Path:
    """`.cache` in the repository, or where TUNEBENCH_CACHE says; made when missing."""
    folder = _folder("TUNEBENCH_CACHE", ".cache")
    with cannot_write(folder, "TUNEBENCH_CACHE names another folder"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def results_folder() -> Path:
    """`results` in the repository, or where TUNEBENCH_RESULTS says; made by the first record."""
    return _folder("TUNEBENCH_RESULTS", "results")


def _folder(variable: str, name: str) -> Path:
    given = os.environ.get(variable)
    try:
        return Path(given or ROOT / name).expanduser().resolve()
    except (OSError, RuntimeError) as error:
        raise BadInput(f"{variable}={given}: no such folder: {error}") from None


def write_atomically(path: Path, content: bytes) -> None:
    """Puts `content` at `path` whole or not at all; a reader never sees half a file. Raises `BadInput`."""
    with cannot_write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".part-", delete=False) as part:
            try:
                part.write(content)
                part.flush()
                os.fsync(part.fileno())
                Path(part.name).chmod(0o644)
                Path(part.name).replace(path)
            except BaseException:
                Path(part.name).unlink(missing_ok=True)
                raise


@contextlib.contextmanager
def only_one(name: str) -> Iterator[None]:
    """Holds the machine-wide lock `name` of the cache, so that two runs at once make a thing once."""
    path = cache_folder() / f".{name}.lock"
    with cannot_write(path):
        lock = path.open("w")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
