"""The folders of files, and how files are written. The cache holds what can be made again, the results what cannot."""

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tunebench.bootstrap import ROOT
from tunebench.errors import NOT_ALLOWED, BadInput, cannot_write


def cache_folder() -> Path:
    """`.cache` in the repository, or the folder in TUNEBENCH_CACHE; made when missing."""
    folder = _folder("TUNEBENCH_CACHE", ".cache")
    with cannot_write(folder, "TUNEBENCH_CACHE names another folder"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def results_folder() -> Path:
    """`results` in the repository, or the folder in TUNEBENCH_RESULTS. The first record makes it."""
    return _folder("TUNEBENCH_RESULTS", "results")


def _folder(variable: str, name: str) -> Path:
    given = os.environ.get(variable)
    try:
        return Path(given or ROOT / name).expanduser().resolve()
    except (OSError, RuntimeError) as error:
        raise BadInput(f"{variable}={given}: no such folder: {error}") from None


def free_bytes(folder: Path) -> int:
    """The free bytes of the disk of a folder, which need not exist yet."""
    return shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.exists())).free


def write_atomically(path: Path, content: bytes) -> None:
    """Writes `content` to `path` whole or not at all: a reader never sees half a file. Raises `BadInput`.

    It refuses a folder or a device, such as /dev/stdout: as root it would put a file in its place.
    """
    if not path.name or (path.exists() and not path.is_file()):
        raise BadInput(f"{path} is no regular file, which would be replaced; name another file")
    name = os.fsencode(path.name)[:200].decode(errors="ignore")  # leaves room in 255 bytes for the suffix below
    part = path.with_name(f".{name}.{os.getpid()}-{secrets.token_hex(4)}")
    with cannot_write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("xb") as file:  # unlike tempfile's, this file has the permissions that the umask allows
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def follow_umask(path: Path) -> None:
    """Gives a file the permissions of any new file. A library may have made it readable for this user alone."""
    umask = os.umask(0o077)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


@contextlib.contextmanager
def only_one(name: str) -> Iterator[None]:
    """Holds the lock `name` of the cache, so that of several runs at once only one makes a file."""
    path = cache_folder() / f".{name}.lock"
    with cannot_write(path):
        lock = _lock_file(path)
    with lock or contextlib.nullcontext():
        if lock is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _lock_file(path: Path) -> IO | None:
    """The lock file, opened to append or, where it is another user's, to read.

    None where neither is allowed: then this user cannot make files in the cache either.
    """
    try:
        return path.open("a")
    except OSError as error:
        if error.errno not in NOT_ALLOWED:
            raise
    try:
        return path.open("r")
    except OSError:
        return None
