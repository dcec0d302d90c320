"""Where files go: the cache for what can be made again, the results for what cannot, and how they are written."""

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tunebench.bootstrap import ROOT
from tunebench.errors import NOT_ALLOWED, BadInput, cannot_write


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
    name = os.fsencode(path.name)[:200].decode(errors="ignore")  # a longer one has no room for what is added
    part = path.with_name(f".{name}.{os.getpid()}-{secrets.token_hex(4)}")
    with cannot_write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("xb") as file:  # with the permissions that the umask leaves
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def follow_umask(path: Path) -> None:
    """Gives a file, which a library may have made for this user alone, the permissions of any new file."""
    umask = os.umask(0o077)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


@contextlib.contextmanager
def only_one(name: str) -> Iterator[None]:
    """Holds the machine-wide lock `name` of the cache, so that two runs at once make a thing once."""
    path = cache_folder() / f".{name}.lock"
    with cannot_write(path):
        lock = _lock_file(path)
    with lock or contextlib.nullcontext():
        if lock is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _lock_file(path: Path) -> IO | None:
    """Opened to write, or else to read, as another user's; None where neither is allowed, so that nothing is made."""
    try:
        return path.open("a")
    except OSError as error:
        if error.errno not in NOT_ALLOWED:
            raise
    try:
        return path.open("r")
    except OSError:
        return None
