"""Finds and reads the records of files and folders."""

import contextlib
import gc
import itertools
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from tunebench import processes
from tunebench.errors import BadInput
from tunebench.files import results_folder
from tunebench.record import Record, faults_of, parse_record, parse_unchecked, read_record

REHEARSALS = "rehearsals"
# Folders of records that are searched only where they are named, and how others of them begin.
KEPT_APART = ("measured", "published", REHEARSALS)
VERSUS = "versus-"  # runs of run_all.sh --versus; OF_SUITE and the suite follow in results/measured/
OF_SUITE = "-of-"
PREVIOUS = ".previous"  # earlier results that run_all.sh set aside
GROWTH = "growth.json"  # tables of benchmarks/growth.py beside the records
# From MANY files on, helpers on further cores compute the digests, which take about as long as all else. One in OWN is
# left to this process, so that it is done when one helper is.
MANY, OWN, HELPERS = 500, 10, 3


def load_records(paths: list[Path]) -> tuple[list[Record], list[str]]:
    """The records of files and folders by start time, and a line for each broken file and for copies of others.

    It searches folders, but for hidden ones and those that are kept apart. Raises `BadInput`.
    """
    return load_files(list(itertools.chain.from_iterable(record_files(path) for path in paths)))


def load_files(
    files: list[Path], is_other: Callable[[Path, bytes], bool] = lambda file, content: False
) -> tuple[list[Record], list[str]]:
    """The records in `files` by start time, and a line for each broken file. A record of several files counts once.

    `is_other` tells by a file's content that it is something else, which is left out.
    """
    records: dict[int, Record] = {}
    broken: dict[int, str] = {}
    places: dict[int, int] = {}  # by the hash of a content, the first file that has it
    again: dict[int, int] = {}  # files that have the content of an earlier one, and which
    unchecked: list[tuple[int, str]] = []  # the index of a file, and the digest that it has
    helped = range(0) if len(files) < MANY else range(len(files))
    with without_collector(), digests_beside([files[i] for i in helped if i % OWN]) as wait:
        for i, file in enumerate(files):
            try:
                with faults_of(file):
                    content = file.read_bytes()
                    if is_other(file, content):
                        continue
                    first = places.setdefault(hash(content), i)
                    if first != i:
                        again[i] = first
                    if wait and i % OWN:
                        records[i], kept, _ = parse_unchecked(content)
                        unchecked.append((i, kept))
                    else:
                        records[i] = parse_record(content)
            except BadInput as fault:
                broken[i] = str(fault)
        digests = wait() if wait else {}
        for i, kept in unchecked:
            # A helper may have read the file before or after a change of it. `read_record` decides.
            if digests.get(files[i]) != kept:
                try:
                    records[i] = read_record(files[i])
                except BadInput as fault:
                    broken[i] = str(fault)
                    del records[i]
    if helped:
        gc.freeze()  # the next collection would scan all records too, which takes longer than to parse a tenth of them
    again = {i: first for i, first in again.items() if i in records and records[i] == records.get(first)}
    by_start = sorted((records[i] for i in sorted(records.keys() - again)), key=lambda record: record.started_at)
    faults = [broken[i] for i in sorted(broken)]
    if again:
        i, first = next(iter(again.items()))
        more = f", and {len(again) - 1} more such files" * (len(again) > 1)
        faults.append(f"{files[i]}: the same record as {files[first]}, which counts once{more}")
    return by_start, faults


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Stops Python's collector of cycles in a body. It would scan all records again and again, which hold none."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def digests_beside(files: list[Path]) -> Iterator[Callable[[], dict[Path, str]] | None]:
    """Computes the digests of record files on further cores. Yields a function that waits for them.

    A file that cannot be read has no digest or an empty one. Yields None where there are no files or no further cores.
    """
    cores = min(len(os.sched_getaffinity(0)) - 1, HELPERS) if files else 0
    with contextlib.ExitStack() as ended:
        helpers = [(part, *_helper(part, ended)) for part in (files[i::cores] for i in range(cores))]

        def wait() -> dict[Path, str]:
            found: dict[Path, str] = {}
            for part, process, output in helpers:
                process.wait()
                output.seek(0)
                found.update(zip(part, output.read().decode().split("\n"), strict=False))
            return found

        yield wait if helpers else None


def _helper(files: list[Path], ended: contextlib.ExitStack) -> tuple[subprocess.Popen, IO[bytes]]:
    """A process that computes the digests of `files`, and its output. `ended` ends it."""
    given, output = (ended.enter_context(os.fdopen(os.memfd_create(name), "w+b")) for name in ("paths", "digests"))
    given.write(b"\0".join(map(os.fsencode, files)))
    given.seek(0)
    command = [sys.executable, "-P", "-m", "tunebench.digest"]
    process = processes.start(command, stdin=given, stdout=output, stderr=subprocess.DEVNULL)
    ended.callback(_end, process)
    return process, output


def _end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        processes.end(process)


def record_files(path: Path) -> list[Path]:
    """The file `path`, or the record files of the folder `path`. Raises `BadInput`.

    The results folder may be missing: the first record makes it.
    """
    try:
        if path.is_file():
            return [path]
        is_folder = path.is_dir()
    except OSError as error:
        raise BadInput(f"{str(path)[:80]}: {error.strerror}; name record files or folders of them") from None
    if not is_folder:
        if path == results_folder():
            return []
        raise BadInput(f"{path}: no such file or folder; name record files or folders of them")
    found: list[tuple[str, str]] = []
    for folder, folders, files in os.walk(path):  # twice as fast as Path.rglob
        folders[:] = [name for name in folders if not is_left_out(name)]
        named = [name for name in (*folders, *files) if name.endswith(".json") and not is_left_out(name)]
        found += [(folder, name) for name in named if not _is_special(os.path.join(folder, name))]  # noqa: PTH118 (speed)
    # In the order of their parts, as paths are sorted: a separator comes before all other characters.
    return [Path(*each) for each in sorted(found, key=lambda each: "/".join(each).replace("/", "\0"))]


def _is_special(path: str) -> bool:
    """Whether a path is a pipe, a socket or a device. To read one could take for ever."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 (speed)
    except OSError:  # reading it says why
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def is_left_out(name: str) -> bool:
    """Whether the search of a folder leaves a file or folder of this name out."""
    return name.startswith((".", VERSUS)) or name == GROWTH or name in KEPT_APART


def may_hold_records(name: str) -> bool:
    """Whether the search of a folder looks for records in a folder of this name. One named as a record is a fault."""
    return not is_left_out(name) and not name.endswith(".json")
